"""One at a time, the small before the large: for what takes as long as what a client sends is large.

`server/body.py`, `server/chat_prompts.py` and `server/admission.py` take turns at parsing large bodies, at the chat
template and at long texts. First come, first served would let one client's dozen of large bodies hold up everybody's
small ones; a large one waits no longer for smaller ones that came later than its own size is worth.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections.abc import AsyncIterator, Callable

SECONDS_A_BYTE = 1e-5
"""How much later a body or text may be taken for its size: 10 s for 1 MB. A chat of 1 MB takes about half a second."""


class Turns:
    """For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._is_taken = False
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._num_waited = 0

    @contextlib.asynccontextmanager
    async def of(self, size: int) -> AsyncIterator[None]:
        """The turn of something of so many bytes or characters."""
        await self._take(size)
        try:
            yield
        finally:
            self._give()

    async def _take(self, size: int) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._num_waited += 1
        heapq.heappush(self._waiting, (self._clock() + size * SECONDS_A_BYTE, self._num_waited, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given just before
                self._give()
            raise

    def _give(self) -> None:
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._is_taken = False
