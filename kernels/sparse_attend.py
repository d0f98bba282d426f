"""Attention of one query token a request to chosen groups of its paged context, dense and sparse in one launch.

out[i, h] = sum over kept j of softmax_j(f(scale * q[i, h] . k[j, h / group])) v[j, h / group], and lse the log of that
softmax's denominator, both as in `paged_decode`; kept are the positions inside the groups that `unit_select` keeps for
the pair (request i, KV head h / group), or the whole visible context where the pair's budget covers it.

One kernel. Every program selects its pair's groups for itself (`unit_select`), while others do the same, and attends to
a run of their tiles with `attend_tile`; one program a pair writes what was left out (`unit_mass`), one of its own where
the device has room. When all pairs are dense, runs, tiles and the order of every sum are those of `paged_decode`, and
the result is bit-identical to it. Beside sparse pairs the runs of dense ones are cut elsewhere, which moves the last
bits. The last program of a pair to finish (an atomic counter that it sets back to zero) merges the runs; a sparse pair
of one run needs no merge. Where the step's slots are given, programs before those of attention write the summaries that
`summarize` would: a launch less in every layer. Called by `sparse_decode`, which checks the inputs.

Limits: those of `paged_decode`. Positions outside the kept groups, the context and the window are never read.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch

from vashista.kernels import paged_decode as dense
from vashista.kernels.key_summary import GROUP_TOKENS, SummaryLevel, summarize_newest, unit_bytes
from vashista.kernels.l2_fetch import fetch_bytes, is_aligned, locate_unit
from vashista.kernels.paged_tile import TileShape, attend_tile
from vashista.kernels.pair_deal import deal_pairs, find_run, has_pdl, load_pairs
from vashista.kernels.run_merge import merge_group, merge_head
from vashista.kernels.selection import ScoreOptions, Selection
from vashista.kernels.triton_guard import jit, next_power_of_two, round_to, tl
from vashista.kernels.unit_mass import BOUND_SLACK, weigh_units
from vashista.kernels.unit_search import begin_search, pick_found, search_on
from vashista.kernels.unit_select import (
    count_forced,
    count_kept,
    keep_newest,
    keep_units,
    list_units,
    load_keys,
    locate_candidates,
)

SPARSE_RUN_TILES = 1
"""A run of a sparse pair has at least so many tiles: its loads are scattered, and many programs hide the delay."""
LONG_SPARSE_KEYS = 2048
"""A longer run of a sparse pair is cut, so that no slow program ends alone."""
SHORT_STAGES = 1
"""The pipeline's depth where every sparse run is one tile: what is loaded ahead of a loop of one costs time. Long dense
pairs among such sparse ones are slower for it."""
FETCH_GROUPS = 8
"""Where every sparse run is one tile and groups are selected in one step, a run fetches so many groups while the last
of the selection is open; 0: none. Elsewhere what the fetch needs is late, and takes more time than it saves (H100)."""
SHORT_MERGE_ELEMENTS = 8192
"""Numbers that a merge loads at a time where every sparse run is one tile: all runs of 2,048 tokens at once; with two
turns a step of batch 1 took 3 us longer (H100)."""
MERGE_ELEMENTS = 4096
"""The same elsewhere."""


@dataclass(frozen=True)
class RunScratch:
    """What programs leave for the one that merges."""

    acc: torch.Tensor
    """[num_programs, group, dim] float32."""
    peak: torch.Tensor
    """[num_programs, group] float32, in units of log 2."""
    total: torch.Tensor
    """[num_programs, group] float32."""
    counters: torch.Tensor
    """[num_pairs] int32, zero between calls."""


def attend_reference(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, options: ScoreOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair in float64: (out [group, head_dim], lse [group]); keys, values [n, head_dim]; kept: positions, int64."""
    logits = q.double() @ keys[kept].double().T * options.scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    return torch.softmax(logits, 1) @ values[kept].double(), torch.logsumexp(logits, 1)


@jit()
def load_groups(tile, is_sparse, num_groups, units_row, KEYS: tl.constexpr, GROUP_KEYS: tl.constexpr):
    """The kept group of each key of a tile, [KEYS] int32; -1 where there is none, or of a pair that is not sparse."""
    slot = (tile * KEYS + tl.arange(0, KEYS)) // GROUP_KEYS
    return tl.load(units_row + slot, mask=is_sparse & (slot < num_groups), other=-1)


@jit()
def locate_keys(
    tile, group, is_sparse, page_row, low, high,
    KEYS: tl.constexpr, GROUP_KEYS: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """(position, page) of the keys of a tile, [KEYS] int32; the position is `high` where there is none.

    One loop serves both kinds of pair, since two would take the shared memory of two (Triton 3.7.1). The pages of the
    next tile are loaded while this one is worked on, see `load_pages`, and its groups one tile earlier still.
    """
    index = tile * KEYS + tl.arange(0, KEYS)
    position = tl.where(is_sparse, tl.where(group >= 0, group * GROUP_KEYS + index % GROUP_KEYS, high), index)
    is_visible = (position >= low) & (position < high)
    return position, tl.load(page_row + position // PAGE_SIZE, mask=is_visible, other=0)


@jit(
    "table_stride", "num_requests", "num_programs", "one_wave", "window", "num_upkeep", "num_weighers", "num_sinks",
    "num_recent",
)  # fmt: skip
def _attend_kernel(  # noqa: PLR0912, PLR0915 - address by address, as Triton wants it
    q, k_cache, v_cache, page_table, context_lens, budgets, scores, keys, bounds, peaks, sums, bound_sums,
    parts, units, num_kept, mass, coarse_units, coarse_kept, coarse_mass,
    slots, codes, steps, coarse_codes, coarse_steps, out, lse, run_acc, run_peak, run_total, counters,
    q_stride_row, q_stride_head, k_stride_page, k_stride_head, k_stride_token,
    v_stride_page, v_stride_head, v_stride_token, out_stride_row, out_stride_head, lse_stride, table_stride,
    capacity, part_capacity, max_kept, max_coarse,
    num_requests, num_kv_heads, num_programs, one_wave, scale, window, softcap, num_sinks, num_recent,
    num_upkeep, num_weighers,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    GROUP_KEYS: tl.constexpr, PAGE_SIZE: tl.constexpr, PAIRS: tl.constexpr, MIN_RUN_TILES: tl.constexpr,
    LONG_RUN_TILES: tl.constexpr, SHORT_TILES: tl.constexpr, LONG_SHORT_TILES: tl.constexpr, RUNS: tl.constexpr,
    SPARSE_RUNS: tl.constexpr, MEMBERS: tl.constexpr, RULE: tl.constexpr, UNIT_BYTES: tl.constexpr,
    COARSE: tl.constexpr, PER_COARSE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    FORCED: tl.constexpr, SAME_STRIDES: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LSE: tl.constexpr,
    IS_SPLIT: tl.constexpr, SLACK: tl.constexpr, HAS_PDL: tl.constexpr, FETCH: tl.constexpr, NEAR: tl.constexpr,
    IS_RANKED: tl.constexpr, IS_DENSE_ALONE: tl.constexpr,
):  # fmt: skip
    """Programs write summaries, then weigh, each for one pair; then program p attends to run p.

    Runs are ordered by request, then KV head, then position. Without weighers the first run of a pair weighs. With
    IS_DENSE_ALONE the kernel before this one attends to sparse pairs: their programs do nothing but wait for it.
    """
    if HAS_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    GROUP_BYTES: tl.constexpr = GROUP_KEYS * HEAD_DIM * k_cache.dtype.element_ty.primitive_bitwidth // 8
    num_pairs = num_requests * num_kv_heads
    program = tl.program_id(0) - num_upkeep - num_weighers
    if IS_RANKED:  # noqa: SIM102 - the outer is decided when the kernel is compiled
        if tl.program_id(0) < num_upkeep:
            summarize_newest(
                tl.program_id(0), num_pairs, slots, k_cache, codes, steps, coarse_codes, coarse_steps, num_kv_heads,
                k_stride_page, k_stride_head, k_stride_token,
                HEAD_DIM, DIM, PAGE_SIZE, GROUP_KEYS, COARSE, UNIT_BYTES, RULE,
            )  # fmt: skip
            return
    lows, highs, is_sparse = load_pairs(context_lens, budgets, num_requests, num_kv_heads, window, HAS_WINDOW, PAIRS)
    index = tl.arange(0, PAIRS)
    wanted = tl.load(budgets + index, mask=index < num_pairs, other=0) // GROUP_KEYS
    # what a coarse level leaves may be fewer groups, never more
    most_groups = count_kept(highs, lows // GROUP_KEYS, wanted, num_sinks, num_recent, GROUP_KEYS)
    dense_tiles = tl.cdiv(highs, KEYS) - lows // KEYS
    tiles = tl.where(is_sparse, tl.cdiv(most_groups * GROUP_KEYS, KEYS), dense_tiles)
    tiles = tl.where(highs > 0, tiles, 0)
    if IS_DENSE_ALONE:
        tiles = tl.where(is_sparse, 0, tiles)
    runs = deal_pairs(
        tiles, is_sparse, num_pairs, num_programs, one_wave, MIN_RUN_TILES, SHORT_TILES, LONG_RUN_TILES,
        LONG_SHORT_TILES, PAIRS,
    )  # fmt: skip
    pair, run, runs_here = find_run(runs, program, PAIRS)
    is_weigher = program < 0
    if is_weigher:
        pair, run = program + num_weighers, program * 0
    if pair >= num_pairs:
        return
    request, head = (pair // num_kv_heads).to(tl.int64), (pair % num_kv_heads).to(tl.int64)
    high = tl.load(context_lens + request)
    low = tl.maximum(high - window, 0) if HAS_WINDOW else high * 0
    budget = tl.load(budgets + pair)
    is_pair_sparse = budget < high - low
    if IS_DENSE_ALONE:  # noqa: SIM102 - the outer is decided when the kernel is compiled
        if is_pair_sparse:
            if HAS_PDL:
                tl.extra.cuda.gdc_wait()
            return
    num_tiles = tl.sum(tl.where(index == pair, tiles, 0), 0)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    q_offset = request * q_stride_row + (head * GROUP + row[:, None]) * q_stride_head + dim[None, :]
    query = tl.load(q + q_offset, mask=(row[:, None] < GROUP) & (dim[None, :] < HEAD_DIM), other=0.0)
    acc = tl.zeros([ROWS, DIM], dtype=tl.float32)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    row_low = tl.zeros([ROWS], dtype=tl.int32) + low
    row_high = tl.zeros([ROWS], dtype=tl.int32) + (high - 1)
    page_row = page_table + request * table_stride
    if SAME_STRIDES:  # then the compiler works out one address for two
        v_stride_page, v_stride_token = k_stride_page, k_stride_token
    k_head, v_head = k_cache + head * k_stride_head, v_cache + head * v_stride_head
    first_group = low // GROUP_KEYS
    has_fetch = is_pair_sparse & (is_weigher == 0)
    if FETCH > 0:
        forced = tl.arange(0, FORCED)
        sinks, recent, visible = count_forced(high, first_group, num_sinks, num_recent, GROUP_KEYS)
        forced_group = first_group + tl.where(forced < sinks, forced, tl.maximum(recent, sinks) + forced - sinks)
        is_mine = has_fetch & (forced_group < first_group + visible) & (forced % runs_here == run)
        forced_keys, forced_values = locate_unit(
            forced_group, is_mine, page_row, k_head, v_head, k_stride_page, k_stride_token,
            v_stride_page, v_stride_token, GROUP_KEYS, PAGE_SIZE,
        )  # fmt: skip
        fetch_bytes(forced_keys, is_mine, GROUP_BYTES)
        fetch_bytes(forced_values, is_mine, GROUP_BYTES)
    if HAS_PDL:
        tl.extra.cuda.gdc_wait()
    long_pair = pair.to(tl.int64)
    units_row = units + long_pair * max_kept
    num_groups = budget * 0
    mass_row = mass + pair * 4
    is_teller = (run == 0) & (is_weigher | (num_weighers == 0))
    if is_pair_sparse:
        if IS_RANKED:
            peak_row = peaks + long_pair * part_capacity
            num_large = tl.load(coarse_kept + pair, cache_modifier=".cg") if PER_COARSE > 0 else 0
            row_at = long_pair * capacity
            part_row, list_row = parts + long_pair * max_kept, coarse_units + long_pair * max_coarse
            num_items, num_listed, need, is_opened = list_units(
                peak_row, part_row, num_large, high, first_group, budget // GROUP_KEYS, num_sinks, num_recent, max_kept,
                BLOCK, PARTS, PART, COLUMNS, GROUP_KEYS, PER_COARSE,
            )  # fmt: skip
            item, group = locate_candidates(
                tl.arange(0, BLOCK), part_row, list_row, num_listed, first_group, PARTS, PART, PER_COARSE
            )
            key = load_keys(keys + row_at, item, num_items)
            if FETCH > 0:
                # candidates that lie where this run's groups are if the kept ones are evenly spread
                begin_at = (num_listed * run) // runs_here
                near = begin_at + tl.arange(0, NEAR)
                end_at = (num_listed * (run + 1)) // runs_here
                end_at = tl.minimum(end_at, begin_at + num_listed * FETCH // (need + 1) + 1)
                near_item, near_group = locate_candidates(
                    near, part_row, list_row, num_listed, first_group, PARTS, PART, PER_COARSE
                )
                near_key = load_keys(keys + row_at, tl.where(near < end_at, near_item, 0x3FFFFFF), num_items)
                near_keys, near_values = locate_unit(
                    near_group, has_fetch & (near_key > float("-inf")), page_row, k_head, v_head, k_stride_page,
                    k_stride_token, v_stride_page, v_stride_token, GROUP_KEYS, PAGE_SIZE,
                )  # fmt: skip
            least, most, num_free, guess, deviation = begin_search(key, need)
            num_least, num_most = num_free, num_free * 0
            last = tl.where((need > 0) & (need < num_free), 99, 0)
            if FETCH > 0:
                least, most, num_least, num_most = search_on(
                    key, least, most, num_least, num_most, need, need, 0, tl.minimum(last, 1), guess, deviation, BLOCK
                )
                # of them, those kept for certain, or nearly so
                threshold = tl.where(num_least <= need + need // 8, least, most)
                is_wanted = has_fetch & (near_key >= threshold) & (near_key > float("-inf"))
                fetch_bytes(near_keys, is_wanted, GROUP_BYTES)
                fetch_bytes(near_values, is_wanted, GROUP_BYTES)
            least, most, num_least, num_most = search_on(
                key, least, most, num_least, num_most, need, need, tl.where(FETCH > 0, 1, 0), last, guess, deviation,
                BLOCK,
            )  # fmt: skip
            is_kept, num_free = pick_found(key, least, most, num_least, num_most, num_free, need, need, BLOCK, COLUMNS)
            num_groups = keep_units(
                units_row, group, is_kept, num_free, high, first_group, num_sinks, num_recent, max_kept,
                BLOCK, FORCED, COLUMNS, GROUP_KEYS,
            )  # fmt: skip
            if is_teller:
                tl.store(num_kept + pair, num_groups)
                weigh_units(
                    mass_row, coarse_mass + pair * 4, scores + row_at, bounds + row_at, peak_row,
                    sums + long_pair * part_capacity, bound_sums + long_pair * part_capacity,
                    item, key, is_kept, is_opened, high, first_group, num_sinks, num_recent, num_large,
                    PARTS, PART, FORCED, GROUP_KEYS, PER_COARSE, SLACK,
                )  # fmt: skip
        else:
            num_groups = keep_newest(
                units_row, high, first_group, budget // GROUP_KEYS, num_sinks, num_recent, max_kept, COLUMNS, GROUP_KEYS
            )
            if is_teller:
                tl.store(num_kept + pair, num_groups)
                column = tl.arange(0, 4)
                tl.store(mass_row + column, tl.where(column == 3, float("inf"), float("nan")))
    elif is_teller:
        tl.store(num_kept + pair, 0)
        tl.store(mass_row + tl.arange(0, 4), tl.full([4], float("-inf"), tl.float32))
    if is_weigher:
        return
    begin, end = (num_tiles * run) // runs_here, (num_tiles * (run + 1)) // runs_here
    first_tile = tl.where(is_pair_sparse, 0, low // KEYS)
    group = load_groups(first_tile + begin, is_pair_sparse, num_groups, units_row, KEYS, GROUP_KEYS)
    next_group = load_groups(first_tile + begin + 1, is_pair_sparse, num_groups, units_row, KEYS, GROUP_KEYS)
    position, pages = locate_keys(
        first_tile + begin, group, is_pair_sparse, page_row, low, high, KEYS, GROUP_KEYS, PAGE_SIZE
    )
    for tile in range(first_tile + begin, first_tile + end):
        next_position, next_pages = locate_keys(
            tile + 1, next_group, is_pair_sparse, page_row, low, high, KEYS, GROUP_KEYS, PAGE_SIZE
        )
        next_group = load_groups(tile + 2, is_pair_sparse, num_groups, units_row, KEYS, GROUP_KEYS)
        acc, peak, total = attend_tile(
            acc, peak, total, query, position - tl.arange(0, KEYS), low, high, row_low, row_high, pages,
            k_head, v_head, k_stride_page, k_stride_token, v_stride_page, v_stride_token, scale, softcap,
            HEAD_DIM, DIM, KEYS, PAGE_SIZE, HAS_SOFTCAP, True, IS_SPLIT,
        )  # fmt: skip
        position, pages = next_position, next_pages

    first_head = head * GROUP
    if is_pair_sparse & (runs_here == 1):  # nothing to merge
        to = out + request * out_stride_row + (first_head + row[:, None]) * out_stride_head + dim[None, :]
        result = round_to(acc / total[:, None], out.dtype.element_ty)
        tl.store(to, result, mask=(row[:, None] < GROUP) & (dim[None, :] < HEAD_DIM))
        if HAS_LSE:
            log_total = peak * 0.6931471805599453 + tl.log(total)
            tl.store(lse + request * lse_stride + first_head + row, log_total, mask=row < GROUP)
        return
    slot = program.to(tl.int64) * GROUP + row
    tl.store(run_peak + slot, peak, mask=row < GROUP)
    tl.store(run_total + slot, total, mask=row < GROUP)
    tl.store(run_acc + slot[:, None] * DIM + dim[None, :], acc, mask=row[:, None] < GROUP)
    tl.debug_barrier()
    if tl.atomic_add(counters + pair, 1, sem="acq_rel") == runs_here - 1:
        tl.store(counters + pair, 0)
        if is_pair_sparse:
            merge_group(
                out + request * out_stride_row + first_head * out_stride_head, lse + request * lse_stride + first_head,
                out_stride_head, run_acc, run_peak, run_total, program - run, runs_here, GROUP, MEMBERS, HEAD_DIM, DIM,
                SPARSE_RUNS, HAS_LSE,
            )  # fmt: skip
        else:
            num_runs = tl.where(num_tiles == 0, 0, runs_here)
            for member in range(0, GROUP):
                to_head = first_head + member
                merge_head(
                    out + request * out_stride_row + to_head * out_stride_head, lse + request * lse_stride + to_head,
                    run_acc, run_peak, run_total, program - run, num_runs, member, GROUP, HEAD_DIM, DIM, RUNS, HAS_LSE,
                )  # fmt: skip


def make_run_scratch(q: torch.Tensor, num_kv_heads: int, max_context: int | None, tile: TileShape) -> RunScratch:
    """Scratch for `attend` of queries of this shape; `max_context` as given to the calls."""
    num_programs, _ = dense.count_programs(q, num_kv_heads, max_context, tile.keys)
    group, dim = q.shape[1] // num_kv_heads, next_power_of_two(q.shape[2])
    peak = torch.empty(num_programs, group, dtype=torch.float32, device=q.device)
    return RunScratch(
        acc=torch.empty(num_programs, group, dim, dtype=torch.float32, device=q.device),
        peak=peak,
        total=torch.empty_like(peak),
        counters=torch.zeros(q.shape[0] * num_kv_heads, dtype=torch.int32, device=q.device),
    )


def attend_groups(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    budgets: torch.Tensor,
    options: ScoreOptions,
    kept: tuple[Selection, Selection | None],
    scratch: RunScratch,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    levels: tuple[SummaryLevel, ...],
    slots: torch.Tensor | None,
    *,
    has_clusters: bool = False,
) -> None:
    """Launch; kept: the scores of the groups, and what the coarse level kept; `out` and, if given, `lse` are filled
    for every request; summaries are written where `slots` are given. Without levels nothing was scored: sinks and the
    newest groups are kept, and of the masses the bound is +inf and the others NaN. has_clusters: `cuda.cluster` attends
    to sparse pairs and was launched before.

    The tensors were checked by `sparse_decode`.
    """
    k_cache, v_cache = caches
    groups, above = kept[0], kept[1] or kept[0]
    num_requests, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_cache.shape[1], k_cache.shape[2]
    num_pairs = num_requests * num_kv_heads
    group, dim = num_heads // num_kv_heads, next_power_of_two(head_dim)
    tile = dense.choose_decode_tile(q, group)
    num_programs = scratch.acc.shape[0]
    one_wave = dense.count_programs(q, num_kv_heads, None, tile.keys)[1]
    num_weighers = num_pairs if 16 * num_pairs <= one_wave else 0
    num_upkeep = 0 if slots is None else num_pairs * len(levels)
    is_short = num_pairs * -(-groups.units.shape[1] * GROUP_TOKENS // tile.keys) <= one_wave
    merge_elements = SHORT_MERGE_ELEMENTS if is_short else MERGE_ELEMENTS
    # what this kernel reads before it waits was written before the scores were made; without scores nothing is known
    pdl = has_pdl(q.device) and bool(levels)
    records = tuple(part for level in (levels[0], levels[-1]) for part in (level.first, level.steps)) if levels else ()
    if has_clusters:
        num_weighers = 0
    is_whole = all(is_aligned(cache) and cache.stride(2) == head_dim for cache in caches)
    has_fetch = pdl and not has_clusters and is_whole and is_short and not kept[1] and not groups.part_units
    launch = {"launch_pdl": True} if pdl else {}
    with torch.cuda.device_of(q):
        _attend_kernel[(num_upkeep + num_weighers + num_programs,)](
            q, k_cache, v_cache, page_table, context_lens, budgets,
            groups.scores, groups.keys, groups.bounds, *groups.part_sums,
            groups.parts, groups.units, groups.num_kept, groups.mass, above.units, above.num_kept, above.mass,
            page_table if slots is None else slots, *(records or (page_table,) * 4),
            out, scratch.peak if lse is None else lse, scratch.acc, scratch.peak, scratch.total, scratch.counters,
            *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *out.stride()[:2],
            0 if lse is None else lse.stride(0), page_table.stride(0),
            groups.scores.shape[1], groups.part_sums.shape[2], groups.units.shape[1], above.units.shape[1],
            num_requests, num_kv_heads, num_programs, one_wave,
            options.scale, options.window or 0, options.softcap or 0.0, options.num_sinks, options.num_recent,
            num_upkeep, num_weighers,
            GROUP=group, HEAD_DIM=head_dim, DIM=dim, ROWS=tile.rows, KEYS=tile.keys, GROUP_KEYS=GROUP_TOKENS,
            PAGE_SIZE=page_size, PAIRS=max(64, next_power_of_two(num_pairs)),
            MIN_RUN_TILES=max(1, dense.MIN_RUN_KEYS // tile.keys),
            LONG_RUN_TILES=max(1, dense.LONG_RUN_KEYS // tile.keys), SHORT_TILES=SPARSE_RUN_TILES,
            LONG_SHORT_TILES=max(1, LONG_SPARSE_KEYS // tile.keys), RUNS=dense.MERGE_RUNS,
            SPARSE_RUNS=max(1, merge_elements // (next_power_of_two(group) * dim)), MEMBERS=next_power_of_two(group),
            RULE=int(levels[0].rule) if levels else 0,
            UNIT_BYTES=unit_bytes(levels[0].rule, head_dim) if levels else 0,
            COARSE=levels[-1].unit_tokens if levels else 0,
            PER_COARSE=levels[1].unit_tokens // GROUP_TOKENS if kept[1] else 0, BLOCK=groups.block,
            PARTS=groups.num_parts, PART=groups.part_units, FORCED=groups.max_forced,
            SAME_STRIDES=k_cache.stride() == v_cache.stride(), COLUMNS=min(groups.block, 32 * tile.num_warps),
            HAS_WINDOW=options.window is not None, HAS_SOFTCAP=options.softcap is not None, HAS_LSE=lse is not None,
            IS_SPLIT=q.dtype in dense.SPLIT_DTYPES, SLACK=BOUND_SLACK, HAS_PDL=pdl,
            FETCH=FETCH_GROUPS if has_fetch else 0, NEAR=32 * tile.num_warps, IS_RANKED=bool(levels),
            IS_DENSE_ALONE=has_clusters,
            num_warps=tile.num_warps, num_stages=SHORT_STAGES if is_short else tile.num_stages, **launch,
        )  # fmt: skip
