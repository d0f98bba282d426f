"""The events of the engine requests behind one HTTP request, as its route consumes them.

`EngineClient.submit` makes a stream and pushes events into it; the route takes them with `next_events` and closes it
in every case. Closing aborts whatever still runs, so a client that goes away frees its pages at once. A stream is
settled when the engine's last word on each of its requests is there: only then are its shares of busy time complete.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from vashista.engine.errors import ERRORS, InternalError, QueueFullError, RetryableError, VashistaError
from vashista.engine.messages import FinishReason, TokenEvent
from vashista.server.prices import Spending


class RequestStream:
    """Events of one or more requests in the order of their arrival. For use on one event loop."""

    def __init__(
        self,
        request_ids: Iterable[str],
        abort: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._unfinished = set(request_ids)
        self._unsettled = set(self._unfinished)
        self._callbacks: list[Callable[[], object]] = []
        self.spending = Spending()
        """What the engine's steps took for these requests."""
        self._abort = abort
        self._events: deque[tuple[float, TokenEvent]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: VashistaError | None = None

    def push(self, event: TokenEvent) -> None:
        """Called by the client for each event of these requests."""
        if event.finish_reason is not None:
            self._unfinished.discard(event.request_id)
            self.settle(event.request_id)
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self._error = self._error or error_from_engine(event.error_code, event.error_message)
        else:
            self._events.append((self._clock() - event.age_s, event))
        self._wake()

    def fail(self, error: VashistaError) -> None:
        """End the stream with an error after the events that are there; what still runs is aborted on close."""
        self._error = self._error or error
        self._wake()

    async def next_events(self) -> list[tuple[float, TokenEvent]]:
        """All events since the last call, each with its time of arrival; waits for one. [] at the end.

        Raises the stream's error. The time is taken when the engine's message arrives, so that a client that reads
        slowly does not make the engine look slow.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events = list(self._events)
        self._events.clear()
        return events

    @property
    def is_settled(self) -> bool:
        """Whether `spending` is complete."""
        return not self._unsettled

    def settle(self, request_id: str) -> None:
        """Called when no more shares can come for a request."""
        self._unsettled.discard(request_id)
        if not self._unsettled:
            callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()

    def when_settled(self, callback: Callable[[], object]) -> None:
        """Call it once the stream is settled; at once if it is."""
        if self._unsettled:
            self._callbacks.append(callback)
        else:
            callback()

    async def wait_settled(self) -> None:
        """Return once the stream is settled."""
        done = asyncio.Event()
        self.when_settled(done.set)
        await done.wait()

    def close(self) -> None:
        """Abort what still runs."""
        while self._unfinished:
            self._abort(self._unfinished.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def error_from_engine(code: str | None, message: str | None) -> VashistaError:
    """The error that the engine reported by its code; an unknown code is an InternalError."""
    error_type = ERRORS.get(code or "", InternalError)
    if error_type is QueueFullError:
        return QueueFullError(message or "The engine's queue is full.", retry_after_s=1.0)
    if issubclass(error_type, RetryableError):
        return error_type(message or "The engine gave no reason.", retry_after_s=1.0)
    return error_type(message or "The engine gave no reason.")
