"""Big tensors on the CPU in pages of 2 MiB, where the operating system has such pages.

Reading through memory costs a translation for every page of 4 KiB, under a hypervisor through two tables. Measured on
two cores of a virtual AMD EPYC (`madvise` against none, 256 MiB read in order, best of 20): one thread 31 and 24 GB/s,
two threads 34 and 31. `vashista.engine` keeps KV stores, key summaries and weights so.

It is a wish: Linux grants it where /sys/kernel/mm/transparent_hugepage/enabled says `madvise` or `always`, and nothing
but speed depends on it. What is not written takes no memory, but whoever writes a byte takes 2 MiB.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

PAGE_BYTES = 1 << 21
_SMALLEST_PAGE_BYTES = 1 << 12


def large_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor on the CPU, not written. Raises MemoryError if the system has no such room."""
    num_bytes = math.prod(shape) * dtype.itemsize
    wish = getattr(mmap, "MADV_HUGEPAGE", None)
    if num_bytes < PAGE_BYTES or wish is None:
        return torch.empty(shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, num_bytes + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"The system has no {num_bytes} bytes for a tensor {list(shape)} of {dtype}.") from error
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(wish)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE_BYTES
    return whole[start : start + num_bytes].view(dtype).view(shape)


def take_memory(room: torch.Tensor) -> None:
    """Have the system give the memory of a tensor now. What it holds stays, if nobody writes to it meanwhile.

    room: [num_bytes], uint8, contiguous.
    """
    room[::_SMALLEST_PAGE_BYTES] += 0
    room[-1:] += 0
