"""Memory that the steps of one module use one after another, so that a step in a request's middle makes none.

attend.py and sparse.py keep one in each step record. What is asked for lives until more of it is asked for, and what a
step left there is written over by the next.

Between two runs of the kernels, which sweep the caches, every kind of call costs Python some 20 to 50 us, also those
that take one when they are repeated: that is why a step of one token should make as few as it can.
"""

from __future__ import annotations

from array import array

import torch


class StepMemory:
    """Tensors and tables by name."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._tables: dict[str, tuple[list[int], array[int], int]] = {}

    def room(self, name: str, num: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of at least `num` numbers, not written."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.numel() < num:
            tensor = self._tensors[name] = torch.empty(num + num // 8, dtype=dtype)
        return tensor

    def shaped(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape, not written."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != shape:
            tensor = self._tensors[name] = torch.empty(shape, dtype=dtype)
        return tensor

    def table(self, name: str, numbers: list[int]) -> int:
        """Where these numbers lie, as int64."""
        known = self._tables.get(name)
        if known is None or known[0] != numbers:
            written = array("q", numbers)
            known = self._tables[name] = (list(numbers), written, written.buffer_info()[0])
        return known[2]
