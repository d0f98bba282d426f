"""The bounded queue, as the server counts it: who may enter, who waits, who is inside, and when to come back.

`server/admission.py` takes a `Place` for each engine request before it submits it; `server/generation.py` says when the
request started and gives the place back when it ended. A request waits until its first event. The engine alone decides
the order; this class only bounds how much can pile up there.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from vashista.engine.errors import DrainingError, QueueFullError

THROUGHPUT_WINDOW_S = 60.0
DEFAULT_RETRY_S, LONGEST_RETRY_S = 2.0, 120.0


class Place:
    """One request's entry in the books. `start` and `leave` may be called more than once."""

    __slots__ = ("_has_left", "_is_waiting", "_num_tokens", "_room")

    def __init__(self, room: WaitingRoom, num_tokens: int) -> None:
        self._room = room
        self._num_tokens = num_tokens
        self._is_waiting = True
        self._has_left = False

    def start(self) -> None:
        """The request runs."""
        if self._is_waiting:
            self._is_waiting = False
            self._room._start(self._num_tokens)

    def leave(self) -> None:
        """The request ended, however it did."""
        if not self._has_left:
            self.start()
            self._has_left = True
            self._room._leave()


class WaitingRoom:
    """Counts the requests and prompt tokens that wait for the engine."""

    def __init__(
        self,
        *,
        max_running_requests: int,
        max_waiting_requests: int,
        max_waiting_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_running_requests = max_running_requests
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._clock = clock
        self._finish_times: deque[float] = deque(maxlen=4096)
        self._empty = asyncio.Event()
        self._empty.set()
        self.num_inside = 0
        """Admitted requests that have not ended."""
        self.num_waiting = 0
        """Those of them without a first event."""
        self.num_waiting_tokens = 0
        self.is_closed = False

    @property
    def max_requests(self) -> int:
        """Engine requests that can be inside at once."""
        return self._max_running_requests + self._max_waiting_requests

    def close(self) -> None:
        """From now on nobody enters."""
        self.is_closed = True

    def check_open(self) -> None:
        """DrainingError once the room is closed."""
        if self.is_closed:
            raise DrainingError("The server is shutting down and takes no new requests.")

    def check(self, token_counts: Sequence[int]) -> None:
        """What `enter` would raise."""
        self.check_open()
        num_requests, num_tokens = len(token_counts), sum(token_counts)
        waiting = self.num_waiting + num_requests
        if waiting > self._max_waiting_requests and self.num_inside + num_requests > self._max_running_requests:
            raise self._full(f"{self.num_waiting} requests are waiting; at most {self._max_waiting_requests} may")
        # A prompt larger than the whole allowance may enter an empty room, or it never could.
        if self.num_waiting and self.num_waiting_tokens + num_tokens > self._max_waiting_tokens:
            raise self._full(
                f"{self.num_waiting_tokens} prompt tokens are waiting; with the {num_tokens} of this request they "
                f"would be more than {self._max_waiting_tokens}"
            )

    def enter(self, token_counts: Sequence[int]) -> list[Place]:
        """A place for each request, for all or none; QueueFullError when there is no room for them."""
        self.check(token_counts)
        self.num_inside += len(token_counts)
        self.num_waiting += len(token_counts)
        self.num_waiting_tokens += sum(token_counts)
        self._empty.clear()
        return [Place(self, count) for count in token_counts]

    async def wait_empty(self) -> None:
        """Wait until nobody is inside."""
        await self._empty.wait()

    def retry_after_s(self) -> float:
        """Seconds in which the requests that wait now should have started, by the throughput of the last minute."""
        now_s = self._clock()
        recent = sum(1 for finish_s in self._finish_times if now_s - finish_s <= THROUGHPUT_WINDOW_S)
        if not recent:
            return DEFAULT_RETRY_S
        span_s = min(THROUGHPUT_WINDOW_S, max(1.0, now_s - self._finish_times[0]))
        return min(LONGEST_RETRY_S, self.num_waiting * span_s / recent)

    def _full(self, reason: str) -> QueueFullError:
        return QueueFullError(f"The queue is full: {reason}.", retry_after_s=self.retry_after_s())

    def _start(self, num_tokens: int) -> None:
        self.num_waiting -= 1
        self.num_waiting_tokens -= num_tokens

    def _leave(self) -> None:
        self.num_inside -= 1
        self._finish_times.append(self._clock())
        if self.num_inside == 0:
            self._empty.set()
