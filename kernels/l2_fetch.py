"""Brings bytes that a program will soon read into the L2 cache, without reading them.

Called by `unit_score` (summaries, before the wait for the kernel before it) and `sparse_attend` (keys and values, while
the last of a selection is still open). A fetch changes nothing that a program sees: what is fetched and then not used,
or written by others meanwhile, costs bandwidth alone. Addresses must lie inside tensors, 16 bytes aligned; sizes are
multiples of 16.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch

from vashista.kernels.triton_guard import IS_INTERPRETED, jit, tl


def is_aligned(tensor: torch.Tensor) -> bool:
    """True if every row of the tensor's last dimension starts at 16 bytes, and those rows are of whole 16 bytes."""
    size = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(
        step * size % 16 == 0 for step in (*tensor.stride()[:-1], tensor.shape[-1])
    )


@jit()
def fetch_bytes(address, is_wanted, size):
    """Fetch `size` bytes from each address [n] that is wanted, for compute capability 9.0.

    Few large pieces, since each is a step of a loop over the threads of a warp.
    """
    if not IS_INTERPRETED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.ne.s32 p, $2, 0;
            @p cp.async.bulk.prefetch.L2.global [$1], $3;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r",
            [address.to(tl.int64), is_wanted.to(tl.int32), size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit()
def locate_unit(
    unit, is_there, page_row, k_head, v_head, k_stride_page, k_stride_token, v_stride_page, v_stride_token,
    UNIT: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Pointers [n] to the keys and to the values of units of UNIT tokens; page_row: the request's of the page table."""
    page = tl.load(page_row + unit * UNIT // PAGE_SIZE, mask=is_there, other=0).to(tl.int64)
    token = unit * UNIT % PAGE_SIZE
    return k_head + page * k_stride_page + token * k_stride_token, (
        v_head + page * v_stride_page + token * v_stride_token
    )
