"""Rotary position embedding of a step's queries and keys, and the write of its keys and values into the paged cache.

With h = rotary_dim / 2 and, for i < h, the pair (x[i], x[i + h]) of each head (the "rotate_half" convention of Hugging
Face's Llama; not the interleaved one of the paper):
    x'[i]     = x[i] cos[t, i] - x[i + h] sin[t, i]
    x'[i + h] = x[i + h] cos[t, i] + x[i] sin[t, i]
and x'[i] = x[i] for i >= rotary_dim. Source: RoFormer (arXiv 2104.09864).

Layout: q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim], strided views of one qkv
tensor if you like; cos, sin [num_tokens, rotary_dim / 2] float32, the table's rows at the step's positions (scaled by
the rope type's attention factor if it has one); caches [num_pages, num_kv_heads, page_size, head_dim] with any strides
in the first three dimensions; slots [num_tokens] int64, page * page_size + offset, or -1 for a token that is not
written. q is rotated in place, or into an `out` that overlaps nothing else; k and v are left as they are.

Limits: those of `paged_decode`; rotary_dim even, at most head_dim. Products and sums are float32, rounded once. The
caller vouches that slots lie inside the cache and that no two are the same.

Measured by `python bench/device_check.py`, H100 80GB, 2026-11, 32 + 2 x 8 heads of 128, bfloat16: 1 token 4.9 us (an
empty kernel took 3.6), 8192 tokens 81 us, 2.5 TB/s.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch

from vashista.kernels.requirements import check_cache, check_heads, check_integers, check_out, check_tensor, require
from vashista.kernels.triton_guard import jit, next_power_of_two, require_triton, round_to, tl

ELEMENTS = 2048
"""Elements that one program handles: enough for 16-byte loads by four warps."""


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [num_tokens, heads, head_dim], rotated, in float64. cos, sin: [num_tokens, rotary_dim / 2]."""
    half = cos.shape[1]
    cos, sin, x = cos.double()[:, None], sin.double()[:, None], x.double()
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def rope_and_write_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rotated q, k_cache, v_cache) as new tensors in float64: unlike the kernel, nothing is written to."""
    k_out, v_out = k_cache.double(), v_cache.double()
    rotated_k = rotate_reference(k, cos, sin)
    page_size = k_cache.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_out[slot // page_size, :, slot % page_size] = rotated_k[token]
            v_out[slot // page_size, :, slot % page_size] = v[token].double()
    return rotate_reference(q, cos, sin), k_out, v_out


@jit()
def rotate_halves(x, x_offset, cos, sin, is_half, HALF: tl.constexpr):
    """The two rotated halves of x's heads, float32. x_offset: [HEADS, PAIRS], of the first half; is_half: its mask."""
    first = tl.load(x + x_offset, mask=is_half, other=0.0).to(tl.float32)
    second = tl.load(x + x_offset + HALF, mask=is_half, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@jit()
def _rope_and_write_kernel(
    q,
    out,
    k,
    v,
    cos,
    sin,
    k_cache,
    v_cache,
    slots,
    q_stride_row,
    q_stride_head,
    out_stride_row,
    out_stride_head,
    k_stride_row,
    k_stride_head,
    v_stride_row,
    v_stride_head,
    table_stride,
    k_cache_stride_page,
    k_cache_stride_head,
    k_cache_stride_token,
    v_cache_stride_page,
    v_cache_stride_head,
    v_cache_stride_token,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    IS_IN_PLACE: tl.constexpr,
):
    """Program (token, b): block b of HEADS heads; the blocks of q come first, then those of k and v."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    dim = tl.arange(0, DIM)
    cos_row = tl.load(cos + token * table_stride + pair, mask=pair < HALF, other=0.0)[None, :]
    sin_row = tl.load(sin + token * table_stride + pair, mask=pair < HALF, other=0.0)[None, :]
    NUM_Q_BLOCKS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    if block < NUM_Q_BLOCKS:
        head = block * HEADS + tl.arange(0, HEADS)[:, None].to(tl.int64)
        is_half = (head < NUM_HEADS) & (pair < HALF)[None, :]
        q_offset = token * q_stride_row + head * q_stride_head
        to_out = token * out_stride_row + head * out_stride_head
        first, second = rotate_halves(q, q_offset + pair[None, :], cos_row, sin_row, is_half, HALF)
        tl.store(out + to_out + pair[None, :], round_to(first, q.dtype.element_ty), mask=is_half)
        tl.store(out + to_out + pair[None, :] + HALF, round_to(second, q.dtype.element_ty), mask=is_half)
        if 2 * HALF < HEAD_DIM and not IS_IN_PLACE:
            is_rest = (head < NUM_HEADS) & ((dim >= 2 * HALF) & (dim < HEAD_DIM))[None, :]
            tl.store(out + to_out + dim[None, :], tl.load(q + q_offset + dim[None, :], mask=is_rest), mask=is_rest)
        return
    slot = tl.load(slots + token)
    if slot < 0:
        return
    page = slot // PAGE_SIZE
    head = (block - NUM_Q_BLOCKS) * HEADS + tl.arange(0, HEADS)[:, None].to(tl.int64)
    is_head = head < NUM_KV_HEADS
    is_half = is_head & (pair < HALF)[None, :]
    is_whole = is_head & (dim < HEAD_DIM)[None, :]
    k_offset = token * k_stride_row + head * k_stride_head
    to_k = page * k_cache_stride_page + head * k_cache_stride_head + (slot % PAGE_SIZE) * k_cache_stride_token
    first, second = rotate_halves(k, k_offset + pair[None, :], cos_row, sin_row, is_half, HALF)
    tl.store(k_cache + to_k + pair[None, :], round_to(first, k_cache.dtype.element_ty), mask=is_half)
    tl.store(k_cache + to_k + pair[None, :] + HALF, round_to(second, k_cache.dtype.element_ty), mask=is_half)
    if 2 * HALF < HEAD_DIM:
        is_rest = is_whole & (dim >= 2 * HALF)[None, :]
        rest = tl.load(k + k_offset + dim[None, :], mask=is_rest, other=0.0)
        tl.store(k_cache + to_k + dim[None, :], rest, mask=is_rest)
    value = tl.load(v + token * v_stride_row + head * v_stride_head + dim[None, :], mask=is_whole, other=0.0)
    to_v = page * v_cache_stride_page + head * v_cache_stride_head + (slot % PAGE_SIZE) * v_cache_stride_token
    tl.store(v_cache + to_v + dim[None, :], value, mask=is_whole)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    check_heads("q", q)
    check_cache(k_cache, v_cache, q)
    num_tokens, _, head_dim = q.shape
    for name, tensor in (("k", k), ("v", v)):
        check_heads(name, tensor)
        check_tensor(name, tensor, (num_tokens, k_cache.shape[1], head_dim), q.device)
        require(tensor.dtype == q.dtype, f"{name} is {tensor.dtype}, q is {q.dtype}; they must be the same")
    require(cos.dim() == 2, f"cos has {cos.dim()} dimensions; it needs [num_tokens, rotary_dim / 2]")
    half = cos.shape[1]
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_tensor(name, tensor, (num_tokens, half), q.device)
        check_integers(name, tensor, torch.float32)
    require(
        0 < 2 * half <= head_dim, f"cos has {half} columns; possible are 1 to {head_dim // 2} for head_dim {head_dim}"
    )
    require(cos.stride(0) == sin.stride(0), "cos and sin have different row strides; they must be laid out alike")
    check_tensor("slots", slots, (num_tokens,), q.device)
    check_integers("slots", slots, torch.int64)


def rope_and_write_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Check and launch; returns the rotated queries."""
    _check(q, k, v, cos, sin, k_cache, v_cache, slots)
    num_tokens, num_heads, head_dim = q.shape
    if out is None:
        out = q
    else:
        check_out(out, q)
    if num_tokens == 0:
        return out
    num_kv_heads, dim = k.shape[1], next_power_of_two(head_dim)
    heads = max(1, min(ELEMENTS // dim, next_power_of_two(num_heads)))
    num_blocks = -(-num_heads // heads) + -(-num_kv_heads // heads)
    with torch.cuda.device_of(q):
        _rope_and_write_kernel[(num_tokens, num_blocks)](
            q, out, k, v, cos, sin, k_cache, v_cache, slots,
            *q.stride()[:2], *out.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0),
            *k_cache.stride()[:3], *v_cache.stride()[:3],
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HALF=cos.shape[1],
            PAIRS=next_power_of_two(cos.shape[1]), DIM=dim, HEADS=heads, PAGE_SIZE=k_cache.shape[2],
            IS_IN_PLACE=out is q, num_warps=4,
        )  # fmt: skip
    return out


def rope_and_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate q in place, or into `out`, and return that; write rotated k, and v, into the caches at `slots`.

    Shapes: the module's header; out: like q. Never waits for the device. Raises KernelUnavailableError without Triton
    or a GPU of compute capability 8.0, KernelInputError for bad tensors.
    """
    require_triton("rope_and_write", q)
    return rope_and_write_triton(q, k, v, cos, sin, k_cache, v_cache, slots, out)
