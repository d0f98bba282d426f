"""Tensors in large pages: the same as any others, but for where they lie."""

from __future__ import annotations

import pytest
import torch

from vashista.kernels.cpu.large_pages import PAGE_BYTES, large_empty


@pytest.mark.parametrize("shape", [(0, 4), (3, 5), (2, 3, PAGE_BYTES // 8 + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_tensor_has_its_shape_and_room_of_its_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    first, second = large_empty(shape, dtype), large_empty(shape, dtype)
    assert (first.shape, first.dtype, first.is_contiguous()) == (shape, dtype, True)
    first.fill_(1), second.fill_(2)
    assert bool((first == 1).all())
    assert bool((second == 2).all())


def test_a_big_one_begins_with_a_large_page() -> None:
    assert large_empty((PAGE_BYTES,), torch.int8).data_ptr() % PAGE_BYTES == 0


def test_more_than_the_system_has_is_refused_by_name() -> None:
    with pytest.raises(MemoryError, match=r"no 4611686018427387904 bytes for a tensor \[1152921504606846976\]"):
        large_empty((1 << 60,), torch.float32)
