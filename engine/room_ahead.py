"""Lets the operating system give the memory of KV pages before a step writes to them.

A store on the CPU is only reserved when the engine starts; the system gives its memory, zeroed, to whoever writes
first. In pages of 2 MiB a step waits for many at once, as all layers reach the end of theirs together: on a virtual AMD
EPYC, 5 ms for each, 39 ms in one chat's prompt of three, which else takes 50, and 155 ms where all parts of the store
have their ends together (reference-26m, two cores). So a thread of low priority has the system give the memory of the
pages that come next, no more than LEAD_BYTES ahead of what was in use: a server that serves little takes little. What
is written in the store it neither reads nor writes, so that steps may run meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence

import torch

from vashista.kernels.cpu.large_pages import PAGE_BYTES, take_memory

LEAD_BYTES = 256 << 20
NICE = 10
"""Of the thread: beside steps that want all cores it gets about a tenth of one."""


class RoomAhead:
    """Of one store."""

    def __init__(self, stretches: Sequence[torch.Tensor], *, lead_bytes: int = LEAD_BYTES) -> None:
        """stretches: parts of the store, [num_pages, bytes of a page in this part] each, contiguous; none on a GPU."""
        self._stretches = stretches
        self._ends = [0] * len(stretches)
        """Pages from the first on whose memory is there, or was in use, of each."""
        page_bytes = sum(stretch.shape[1] for stretch in stretches)
        self._lead_pages = -(-lead_bytes // page_bytes) if page_bytes else 0
        self._num_used = self._next_used = 0
        self._thread: threading.Thread | None = None

    def follow(self, num_used: int) -> None:
        """All pages before `num_used` are or were in use: see to what comes next, if a quarter of the lead is gone."""
        self._num_used = num_used
        if num_used < self._next_used or not self._stretches or (self._thread is not None and self._thread.is_alive()):
            return
        self._next_used = num_used + max(1, self._lead_pages // 4)
        self._thread = threading.Thread(target=self._fill, name="room-ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is done. For tests."""
        if self._thread is not None:
            self._thread.join()

    def _fill(self) -> None:
        with contextlib.suppress(OSError):  # then it has the priority of the others
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while self._extend():
            pass

    def _extend(self) -> bool:
        """Some 2 MiB more; False if there is enough, or the system does not give any."""
        num_used = self._num_used
        index = min(range(len(self._ends)), key=self._ends.__getitem__)
        stretch = self._stretches[index]
        start = max(self._ends[index], num_used)
        end = min(start + max(1, PAGE_BYTES // stretch.shape[1]), num_used + self._lead_pages, stretch.shape[0])
        if end <= start or not take_memory(stretch[start:end].view(-1)):
            return False
        self._ends[index] = end
        return True
