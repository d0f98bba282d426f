"""Paged decode attention: one query token a request, the key range split over the whole device.

out[i, h] = sum over j of softmax_j(f(scale * q[i, h] . k[j, h / group])) v[j, h / group],  f(s) = s or c tanh(s / c),
over the positions j of request i's context, or its last `window` positions; lse[i, h] = log sum over j of exp(f(s_j)).

Source: split keys and merge by log-sum-exp as Flash-Decoding (Dao, Haziza, Massa, Sizov 2023), the running softmax of
FlashAttention-2 (arXiv 2307.08691). The split is not by capacity: the tiles of all requests and KV heads are dealt out
evenly, from the lengths on the device, over a fixed number of programs, so that one CUDA graph serves any lengths and
one long request among short ones is spread over the device.

Layout: q, out [num_requests, num_heads, head_dim]; caches [num_pages, num_kv_heads, page_size, head_dim], each with any
strides in its first dimensions and 64-bit addresses; page_table [num_requests, max_pages] int32; context_lens
[num_requests] int32, the query's own token included; 0 is a padding row: output 0, lse -inf.
Two kernels: `_paged_decode_kernel` lets one program take a run of tiles of one (request, KV head) with the head's whole
query group as rows (padded to 16) and writes acc, peak and total; `_paged_decode_merge_kernel` joins the runs.

Limits: head_dim a multiple of 8 from 16 to 256; page size a power of two from 16 to 256; query groups to 128; float32
(exact float32 products, no tensor cores), bfloat16, float16. The caller vouches for the values: page numbers inside the
cache and lengths inside the page table. Pages outside the window and slots past a length are never read.

Measured by `python bench/device_check.py --tune`, H100 80GB, torch 2.11, triton 3.6, 2026-11: 32 heads, 8 KV heads,
head_dim 128, bfloat16, page 64, CUDA graph, cold L2, microseconds (TB/s of keys and values). Each column was measured
with that many waves fixed; the choice of waves by length (LONG_RUN_KEYS), which takes the better one, came after.
    batch x context     1 x 32k      1 x 128k     1 x 512k     8 x 32k      8 x 128k      32 x 32k      32 x 128k
    one wave            68 (1.98)    201 (2.68)   850 (2.53)   451 (2.38)   1746 (2.46)   1425 (3.01)   5609 (3.06)
    two waves           75 (1.78)    208 (2.58)   730 (2.94)   390 (2.75)   1458 (2.95)   1425 (3.01)   5596 (3.07)
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
)
from vashista.kernels.run_merge import merge_head
from vashista.kernels.triton_guard import jit, next_power_of_two, require_triton, tl

PROGRAMS_PER_MULTIPROCESSOR = 2
"""So many are at work at once: one wave (shared memory, H100)."""
MAX_WAVES = 2
LONG_RUN_KEYS = 4096
"""Runs longer than this are cut into up to MAX_WAVES waves, so that no slow program ends alone; shorter into one."""
MIN_RUN_KEYS = 256
"""A run is at least so many keys: shorter ones cost more in the merge than they gain."""
MERGE_RUNS = 32
NUM_WARPS = 4
SPLIT_DTYPES = (torch.bfloat16,)
"""Whose weights enter the second product as two numbers: one bfloat16 alone would cost 1.2e-3."""


def paged_decode_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float64: (out [num_requests, num_heads, head_dim], lse [num_requests, num_heads])."""
    outs, lses = [], []
    for request, length in enumerate(context_lens.tolist()):
        keys = gather_tokens(k_cache, page_table[request], length)
        values = gather_tokens(v_cache, page_table[request], length)
        query = q[request : request + 1]
        if length == 0:
            outs.append(torch.zeros_like(query, dtype=torch.float64))
            lses.append(torch.full(query.shape[:2], float("-inf"), dtype=torch.float64, device=q.device))
            continue
        out, lse = attend_reference(query, keys, values, scale=scale, window=window, softcap=softcap)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


@jit()
def deal_runs(
    context_lens,
    num_requests,
    num_kv_heads,
    num_programs,
    one_wave,
    window,
    HAS_WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_RUN_TILES: tl.constexpr,
    LONG_RUN_TILES: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """Deal the tiles of all requests out in runs: (runs a KV head of each request [REQUESTS], a run's most tiles).

    All KV heads together never need more than `num_programs` runs: sum ceil(t_i / most) <= sum t_i / most + requests,
    and `most` is chosen so that the first term is at most num_programs - requests * heads.
    """
    index = tl.arange(0, REQUESTS)
    length = tl.load(context_lens + index, mask=index < num_requests, other=0)
    first = tl.maximum(length - window, 0) // KEYS if HAS_WINDOW else length * 0
    num_tiles = tl.maximum(tl.cdiv(length, KEYS) - first, 0)
    spare = num_programs - num_requests * num_kv_heads
    all_tiles = tl.sum(num_tiles, 0) * num_kv_heads
    usual_tiles = tl.minimum(tl.cdiv(all_tiles, one_wave), LONG_RUN_TILES)
    most_tiles = tl.maximum(tl.maximum(tl.cdiv(all_tiles, spare), usual_tiles), MIN_RUN_TILES)
    return tl.cdiv(num_tiles, most_tiles), most_tiles


@jit("table_stride", "num_requests", "num_programs", "one_wave", "window")
def _paged_decode_kernel(
    q,
    k_cache,
    v_cache,
    page_table,
    context_lens,
    run_acc,
    run_peak,
    run_total,
    q_stride_row,
    q_stride_head,
    k_stride_page,
    k_stride_head,
    k_stride_token,
    v_stride_page,
    v_stride_head,
    v_stride_token,
    table_stride,
    num_requests,
    num_kv_heads,
    num_programs,
    one_wave,
    scale,
    window,
    softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    REQUESTS: tl.constexpr,
    MIN_RUN_TILES: tl.constexpr,
    LONG_RUN_TILES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Program p attends to run p: runs are ordered by request, then KV head, then position."""
    program = tl.program_id(0)
    num_runs, _ = deal_runs(
        context_lens, num_requests, num_kv_heads, num_programs, one_wave, window,
        HAS_WINDOW, KEYS, MIN_RUN_TILES, LONG_RUN_TILES, REQUESTS,
    )  # fmt: skip
    runs_through = tl.cumsum(num_runs * num_kv_heads, 0)
    request = tl.sum((runs_through <= program).to(tl.int32), 0)
    if request >= num_requests:
        return
    index = tl.arange(0, REQUESTS)
    runs_before = tl.sum(tl.where(index < request, num_runs, 0), 0) * num_kv_heads
    runs_here = tl.sum(tl.where(index == request, num_runs, 0), 0)
    head = ((program - runs_before) // runs_here).to(tl.int64)
    run = (program - runs_before) % runs_here

    high = tl.load(context_lens + request)
    low = tl.maximum(high - window, 0) if HAS_WINDOW else high * 0
    first_tile = low // KEYS
    num_tiles = tl.cdiv(high, KEYS) - first_tile
    # runs of one request differ by one tile at most
    begin = first_tile + (num_tiles * run) // runs_here
    end = first_tile + (num_tiles * (run + 1)) // runs_here

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    q_offset = request.to(tl.int64) * q_stride_row + (head * GROUP + row[:, None]) * q_stride_head + dim[None, :]
    query = tl.load(q + q_offset, mask=(row[:, None] < GROUP) & (dim[None, :] < HEAD_DIM), other=0.0)
    acc = tl.zeros([ROWS, DIM], dtype=tl.float32)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    row_low = tl.zeros([ROWS], dtype=tl.int32) + low
    row_high = tl.zeros([ROWS], dtype=tl.int32) + (high - 1)
    page_row = page_table + request.to(tl.int64) * table_stride
    k_head = k_cache + head * k_stride_head
    v_head = v_cache + head * v_stride_head
    acc, peak, total = attend_tiles(
        acc, peak, total, query, begin, end, low, high, row_low, row_high, page_row, k_head, v_head,
        k_stride_page, k_stride_token, v_stride_page, v_stride_token, scale, softcap,
        HEAD_DIM, DIM, KEYS, PAGE_SIZE, HAS_SOFTCAP, True, IS_SPLIT,
    )  # fmt: skip

    slot = program.to(tl.int64) * GROUP + row
    tl.store(run_peak + slot, peak, mask=row < GROUP)
    tl.store(run_total + slot, total, mask=row < GROUP)
    tl.store(run_acc + slot[:, None] * DIM + dim[None, :], acc, mask=row[:, None] < GROUP)


@jit("num_requests", "num_programs", "one_wave", "window")
def _paged_decode_merge_kernel(
    out,
    lse,
    context_lens,
    run_acc,
    run_peak,
    run_total,
    out_stride_row,
    out_stride_head,
    lse_stride,
    num_requests,
    num_kv_heads,
    num_programs,
    one_wave,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    REQUESTS: tl.constexpr,
    MIN_RUN_TILES: tl.constexpr,
    LONG_RUN_TILES: tl.constexpr,
    RUNS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Program (request, head) joins the runs of its KV head: sum 2^(peak_r - peak) acc_r over the same of total_r."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    num_runs, _ = deal_runs(
        context_lens, num_requests, num_kv_heads, num_programs, one_wave, window,
        HAS_WINDOW, KEYS, MIN_RUN_TILES, LONG_RUN_TILES, REQUESTS,
    )  # fmt: skip
    index = tl.arange(0, REQUESTS)
    runs_before = tl.sum(tl.where(index < request, num_runs, 0), 0) * num_kv_heads
    runs_here = tl.sum(tl.where(index == request, num_runs, 0), 0)
    first = runs_before + (head // GROUP) * runs_here

    row = request.to(tl.int64)
    merge_head(
        out + row * out_stride_row + head * out_stride_head, lse + row * lse_stride + head,
        run_acc, run_peak, run_total, first, runs_here, head % GROUP, GROUP, HEAD_DIM, DIM, RUNS, HAS_LSE,
    )  # fmt: skip


def choose_decode_tile(q: torch.Tensor, group: int) -> TileShape:
    """A tile of about 32 KiB of keys, and as many in flight as leave room for two programs a multiprocessor.

    Of 128 keys of 128 numbers that is one: dense decode is as fast as with 64 keys and three in flight, and sparse
    decode of batches 10 % faster, since a tile costs as many instructions besides its keys (H100).
    """
    row_bytes = next_power_of_two(q.shape[2]) * q.element_size()
    rows = max(16, next_power_of_two(group))
    shared_bytes = device_limits(q.device).shared_bytes
    keys = fit_keys(max(16, min(128, (32 << 10) // row_bytes)), rows, q, shared_bytes)
    # mma.sync keeps one buffer less than the pipeline is deep
    num_stages = 1 + fit_stages(2 * keys * row_bytes, rows * (row_bytes + keys * 4), shared_bytes // 2, most=3)
    return TileShape(rows=rows, keys=keys, num_warps=NUM_WARPS, num_stages=num_stages)


def count_programs(q: torch.Tensor, num_kv_heads: int, max_context: int | None, keys: int) -> tuple[int, int]:
    """(programs of the first kernel, how many of them the device works on at once).

    The programs are one for each (request, KV head), and those that runs can be spread over.
    """
    num_pairs = q.shape[0] * num_kv_heads
    one_wave = device_limits(q.device).num_multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    spare = one_wave * MAX_WAVES
    if max_context is not None:
        spare = min(spare, num_pairs * -(-max_context // max(keys, MIN_RUN_KEYS)))
    return num_pairs + max(spare, 1), one_wave


def _check(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, page_table: torch.Tensor, context_lens: torch.Tensor
) -> None:
    check_heads("q", q)
    check_cache(k_cache, v_cache, q)
    check_tensor("page_table", page_table, (q.shape[0], None), q.device)
    check_integers("page_table", page_table, torch.int32)
    check_tensor("context_lens", context_lens, (q.shape[0],), q.device)
    check_integers("context_lens", context_lens, torch.int32)


def paged_decode_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    max_context: int | None = None,
    tile: TileShape | None = None,
) -> torch.Tensor:
    """Check, allocate, launch. `tile` overrides the choice by shape; its rows must hold the query group."""
    _check(q, k_cache, v_cache, page_table, context_lens)
    check_options(scale, window, softcap)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check_out(out, q)
    if lse is not None:
        check_tensor("lse", lse, (q.shape[0], q.shape[1]), q.device)
        check_integers("lse", lse, torch.float32)
    num_requests, num_heads, head_dim = q.shape
    if num_requests == 0:
        return out
    num_kv_heads, page_size = k_cache.shape[1], k_cache.shape[2]
    group, dim = num_heads // num_kv_heads, next_power_of_two(head_dim)
    tile = tile or choose_decode_tile(q, group)
    num_programs, one_wave = count_programs(q, num_kv_heads, max_context, tile.keys)
    run_acc = torch.empty(num_programs, group, dim, dtype=torch.float32, device=q.device)
    run_peak = torch.empty(num_programs, group, dtype=torch.float32, device=q.device)
    run_total = torch.empty_like(run_peak)
    deal = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "DIM": dim,
        "KEYS": tile.keys,
        "REQUESTS": max(64, next_power_of_two(num_requests)),
        "MIN_RUN_TILES": max(1, MIN_RUN_KEYS // tile.keys),
        "LONG_RUN_TILES": max(1, LONG_RUN_KEYS // tile.keys),
        "HAS_WINDOW": window is not None,
    }
    with torch.cuda.device_of(q):
        _paged_decode_kernel[(num_programs,)](
            q, k_cache, v_cache, page_table, context_lens, run_acc, run_peak, run_total,
            *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], page_table.stride(0),
            num_requests, num_kv_heads, num_programs, one_wave, scale, window or 0, softcap or 0.0,
            ROWS=tile.rows, PAGE_SIZE=page_size, HAS_SOFTCAP=softcap is not None, IS_SPLIT=q.dtype in SPLIT_DTYPES,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **deal,
        )  # fmt: skip
        _paged_decode_merge_kernel[(num_requests, num_heads)](
            out, run_peak if lse is None else lse, context_lens, run_acc, run_peak, run_total,
            *out.stride()[:2], 0 if lse is None else lse.stride(0),
            num_requests, num_kv_heads, num_programs, one_wave, window or 0,
            RUNS=MERGE_RUNS, HAS_LSE=lse is not None, num_warps=4, **deal,
        )  # fmt: skip
    return out


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    max_context: int | None = None,
) -> torch.Tensor:
    """Attention of one query token a request over its paged context; shapes and limits stand in the module's header.

    scale multiplies the logits; window: a query at position p sees positions p - window + 1 .. p; softcap bounds the
    logits by softcap * tanh(s / softcap). out: like q; made when None; returned. lse: [num_requests, num_heads],
    float32, is filled with the natural log of the softmax's denominator when given. max_context: no length is above
    it; it only spares programs when all contexts are known to be short. Never waits for the device, so that a
    CUDA graph of the call is valid for any lengths and pages put into the same tensors.
    Raises KernelUnavailableError without Triton or a GPU of compute capability 8.0, KernelInputError for bad tensors.
    """
    require_triton("paged_decode", q)
    return paged_decode_triton(
        q, k_cache, v_cache, page_table, context_lens,
        scale=scale, window=window, softcap=softcap, out=out, lse=lse, max_context=max_context,
    )  # fmt: skip
