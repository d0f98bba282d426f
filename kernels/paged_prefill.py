"""Paged prefill attention: causal attention of chunks of queries, of any length each, over their paged contexts.

out[t, h] = sum over j of softmax_j(f(scale * q[t, h] . k[j, h / group])) v[j, h / group],  f(s) = s or c tanh(s / c),
over the positions j <= p(t) of the request's context, with `window` only the last `window` of them. The queries of
request i, rows query_starts[i] .. query_starts[i + 1] of q, stand at the last positions of its context; their own keys
are in the cache before the call (`rope_and_write`).

Source: FlashAttention-2 (arXiv 2307.08691); the query group is folded into the rows of a tile, so that each key is read
once for the whole group, as in FlashInfer (arXiv 2501.01005).

Layout: q, out [num_tokens, num_heads, head_dim]; caches [num_pages, num_kv_heads, page_size, head_dim], each with any
strides in its first dimensions and 64-bit addresses; page_table [num_requests, max_pages] int32; query_starts
[num_requests + 1] int32, rising from 0; context_lens [num_requests] int32, the chunk included.
One program takes a block of tokens of one request with the whole query group of one KV head; which, it finds from
query_starts on the device: the grid needs num_tokens and num_requests alone. The longest rows start first.

Limits: those of `paged_decode`. The caller vouches for the values: context_lens[i] is at least the chunk's length (a
request with context 0 gets output 0), pages lie inside the cache. Rows of q beyond the last start are neither read
nor written. The softmax weights are rounded to the values' dtype before the second product, as in FlashAttention: for
bfloat16 that and the rounding of the output make 2.3e-3 relative error.

Measured by `python bench/device_check.py`, H100 80GB, torch 2.11, triton 3.6, 2026-11: 32 heads, 8 KV heads, head_dim
128, bfloat16, page 64: 2048 tokens of 2048 126 us (273 TFLOP/s), 8192 of 8192 1350 us (407), 2048 of 32768 2618 us
(407). torch's own attention over contiguous keys took 85 us (404) and 882 us (623) for the first two.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch

from vashista.kernels.paged_reference import attend_reference, gather_tokens
from vashista.kernels.paged_tile import TileShape, attend_tiles, device_limits, fit_keys, fit_stages
from vashista.kernels.requirements import (
    check_cache,
    check_heads,
    check_integers,
    check_options,
    check_out,
    check_tensor,
    require,
)
from vashista.kernels.triton_guard import jit, next_power_of_two, require_triton, round_to, tl


def paged_prefill_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same in float64: [num_tokens, num_heads, head_dim]; rows of no request and of context 0 are 0."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    starts = query_starts.tolist()
    for request, length in enumerate(context_lens.tolist()):
        begin, end = starts[request], starts[request + 1]
        if begin == end or length == 0:
            continue
        keys = gather_tokens(k_cache, page_table[request], length)
        values = gather_tokens(v_cache, page_table[request], length)
        out[begin:end], _ = attend_reference(q[begin:end], keys, values, scale=scale, window=window, softcap=softcap)
    return out


@jit("table_stride", "num_requests", "window")
def _paged_prefill_kernel(
    q,
    out,
    k_cache,
    v_cache,
    page_table,
    query_starts,
    context_lens,
    q_stride_row,
    q_stride_head,
    out_stride_row,
    out_stride_head,
    k_stride_page,
    k_stride_head,
    k_stride_token,
    v_stride_page,
    v_stride_head,
    v_stride_token,
    table_stride,
    num_requests,
    scale,
    window,
    softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    REQUESTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Program (b, head) takes block b, counted from the last: TOKENS tokens of one request, GROUP heads of each."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    index = tl.arange(0, REQUESTS)
    is_request = index < num_requests
    starts = tl.load(query_starts + index, mask=is_request, other=0)
    ends = tl.load(query_starts + index + 1, mask=is_request, other=0)
    num_blocks = tl.cdiv(ends - starts, TOKENS)
    request = tl.sum((tl.cumsum(num_blocks, 0) <= block).to(tl.int32), 0)
    if request >= num_requests:
        return
    first_token = (block - tl.sum(tl.where(index < request, num_blocks, 0), 0)) * TOKENS
    start = tl.load(query_starts + request)
    num_queries = tl.load(query_starts + request + 1) - start
    high = tl.load(context_lens + request)
    first_position = high - num_queries + first_token
    last_position = tl.minimum(first_position + TOKENS, high) - 1

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    token = first_token + row // GROUP
    is_row = (row < TOKENS * GROUP) & (token < num_queries)
    is_live = is_row[:, None] & (dim < HEAD_DIM)[None, :]
    q_row = (start + token).to(tl.int64)[:, None]
    q_head = (head * GROUP + row % GROUP)[:, None]
    query = tl.load(q + q_row * q_stride_row + q_head * q_stride_head + dim[None, :], mask=is_live, other=0.0)
    row_high = high - num_queries + token
    row_low = tl.maximum(row_high - window + 1, 0) if HAS_WINDOW else row_high * 0

    low = tl.maximum(first_position - window + 1, 0) if HAS_WINDOW else high * 0
    end = last_position + 1
    begin_tile = low // KEYS
    end_tile = tl.cdiv(end, KEYS)
    # tiles inside [begin_full, end_full) are seen by every row whole and need no mask
    begin_full = begin_tile
    if HAS_WINDOW:
        begin_full = tl.minimum(tl.cdiv(tl.maximum(last_position - window + 1, 0), KEYS), end_tile)
    end_full = tl.maximum((first_position + 1) // KEYS, begin_full)

    acc = tl.zeros([ROWS, DIM], dtype=tl.float32)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    page_row = page_table + request.to(tl.int64) * table_stride
    k_head = k_cache + head * k_stride_head
    v_head = v_cache + head * v_stride_head
    if HAS_WINDOW:
        acc, peak, total = attend_tiles(
            acc, peak, total, query, begin_tile, begin_full, low, end, row_low, row_high, page_row, k_head, v_head,
            k_stride_page, k_stride_token, v_stride_page, v_stride_token, scale, softcap,
            HEAD_DIM, DIM, KEYS, PAGE_SIZE, HAS_SOFTCAP, True, False,
        )  # fmt: skip
    acc, peak, total = attend_tiles(
        acc, peak, total, query, begin_full, end_full, low, end, row_low, row_high, page_row, k_head, v_head,
        k_stride_page, k_stride_token, v_stride_page, v_stride_token, scale, softcap,
        HEAD_DIM, DIM, KEYS, PAGE_SIZE, HAS_SOFTCAP, False, False,
    )  # fmt: skip
    acc, peak, total = attend_tiles(
        acc, peak, total, query, end_full, end_tile, low, end, row_low, row_high, page_row, k_head, v_head,
        k_stride_page, k_stride_token, v_stride_page, v_stride_token, scale, softcap,
        HEAD_DIM, DIM, KEYS, PAGE_SIZE, HAS_SOFTCAP, True, False,
    )  # fmt: skip

    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    out_offset = q_row * out_stride_row + q_head * out_stride_head + dim[None, :]
    tl.store(out + out_offset, round_to(result, out.dtype.element_ty), mask=is_live)


def choose_prefill_tile(q: torch.Tensor, group: int, max_query_len: int) -> TileShape:
    """As many rows as the chunk can fill, to 128; keys and stages by what the device's shared memory holds."""
    dim = next_power_of_two(q.shape[2])
    row_bytes = dim * q.element_size()
    is_wide = row_bytes > 256
    most_rows = max(32 if q.dtype == torch.float32 else 128, next_power_of_two(group))
    rows = max(16, min(most_rows, next_power_of_two(group * max_query_len)), next_power_of_two(group))
    shared_bytes = device_limits(q.device).shared_bytes
    keys = fit_keys(32 if is_wide else 64, rows, q, shared_bytes)
    num_stages = fit_stages(2 * keys * row_bytes, rows * row_bytes, shared_bytes, most=3)
    return TileShape(rows=rows, keys=keys, num_warps=8 if rows >= 128 else 4, num_stages=num_stages)


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
) -> None:
    check_heads("q", q)
    check_cache(k_cache, v_cache, q)
    require(context_lens.dim() == 1, f"context_lens has {context_lens.dim()} dimensions; it needs [num_requests]")
    num_requests = context_lens.shape[0]
    check_tensor("context_lens", context_lens, (num_requests,), q.device)
    check_integers("context_lens", context_lens, torch.int32)
    check_tensor("page_table", page_table, (num_requests, None), q.device)
    check_integers("page_table", page_table, torch.int32)
    check_tensor("query_starts", query_starts, (num_requests + 1,), q.device)
    check_integers("query_starts", query_starts, torch.int32)


def paged_prefill_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
    tile: TileShape | None = None,
) -> torch.Tensor:
    """Check, allocate, launch. `tile` overrides the choice by shape; its rows must hold the query group."""
    _check(q, k_cache, v_cache, page_table, query_starts, context_lens)
    check_options(scale, window, softcap)
    require(max_query_len > 0, f"max_query_len is {max_query_len}; it must be positive")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check_out(out, q)
    num_tokens, num_heads, head_dim = q.shape
    num_requests = context_lens.shape[0]
    if num_tokens == 0 or num_requests == 0:
        return out
    num_kv_heads, page_size = k_cache.shape[1], k_cache.shape[2]
    group = num_heads // num_kv_heads
    tile = tile or choose_prefill_tile(q, group, max_query_len)
    tokens = tile.rows // group
    # sum ceil(n_i / tokens) <= num_tokens / tokens + num_requests
    num_blocks = num_tokens // tokens + num_requests
    with torch.cuda.device_of(q):
        _paged_prefill_kernel[(num_blocks, num_kv_heads)](
            q, out, k_cache, v_cache, page_table, query_starts, context_lens,
            *q.stride()[:2], *out.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], page_table.stride(0),
            num_requests, scale, window or 0, softcap or 0.0,
            GROUP=group, HEAD_DIM=head_dim, DIM=next_power_of_two(head_dim), ROWS=tile.rows, TOKENS=tokens,
            KEYS=tile.keys, PAGE_SIZE=page_size, REQUESTS=max(64, next_power_of_two(num_requests)),
            HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def paged_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each request's last queries over its paged context; shapes stand in the module's header.

    scale, window, softcap and out: as in `paged_decode`. max_query_len: the longest chunk, known to the host; it
    chooses the tile's height and nothing else, so the result is right for any value. Never waits for the device.
    Raises KernelUnavailableError without Triton or a GPU of compute capability 8.0, KernelInputError for bad tensors.
    """
    require_triton("paged_prefill", q)
    return paged_prefill_triton(
        q, k_cache, v_cache, page_table, query_starts, context_lens,
        scale=scale, max_query_len=max_query_len, window=window, softcap=softcap, out=out,
    )  # fmt: skip
