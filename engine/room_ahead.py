"""Lets the operating system give the memory of KV pages before a step writes to them.

A store on the CPU is only reserved when the engine starts; the system gives its memory, zeroed, to whoever writes
first. In pages of 2 MiB a step waits for many at once, as all layers reach the end of theirs together: on a virtual AMD
EPYC, 5 ms for each, 39 ms in one chat's prompt of three, which else takes 50, and 155 ms where all parts of the store
have their ends together (reference-26m, two cores). While an engine has nothing to do it takes the memory of the pages
that come next, a little at a time, and between steps where little is left. No more than LEAD_BYTES lie ahead of what
was in use: a server that serves little takes little.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vashista.kernels.cpu.large_pages import PAGE_BYTES, take_memory

LEAD_BYTES = 256 << 20


class RoomAhead:
    """Of one store."""

    def __init__(self, stretches: Sequence[torch.Tensor], *, lead_bytes: int = LEAD_BYTES) -> None:
        """stretches: parts of the store, [num_pages, bytes of a page in this part] each, contiguous; none on a GPU."""
        self._stretches = stretches
        self._ends = [0] * len(stretches)
        """Pages from the first on whose memory is there, or was in use, of each."""
        page_bytes = sum(stretch.shape[1] for stretch in stretches)
        self._lead_pages = -(-lead_bytes // page_bytes) if page_bytes else 0

    def is_short(self, num_used: int) -> bool:
        """Whether less than a quarter of what should lie ahead does, so that it is not to wait for a pause."""
        wanted = [min(num_used + self._lead_pages // 4, stretch.shape[0]) for stretch in self._stretches]
        return any(end < least for end, least in zip(self._ends, wanted, strict=True))

    def extend(self, num_used: int) -> bool:
        """Take some 2 MiB more, where all pages before `num_used` have been in use; False if there is enough.

        What is written in the store stays. Not while a step runs.
        """
        if not self._stretches:
            return False
        index = min(range(len(self._ends)), key=self._ends.__getitem__)
        stretch = self._stretches[index]
        start = max(self._ends[index], num_used)
        end = min(start + max(1, PAGE_BYTES // stretch.shape[1]), num_used + self._lead_pages, stretch.shape[0])
        if end <= start:
            return False
        take_memory(stretch[start:end].view(-1))
        self._ends[index] = end
        return True
