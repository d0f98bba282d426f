"""Attention of one query token a request to chosen groups of its paged context, dense and sparse in one launch.

out[i, h] = sum over kept j of softmax_j(f(scale * q[i, h] . k[j, h / group])) v[j, h / group], and lse the log of that
softmax's denominator, both as in `paged_decode`; kept are the positions inside the groups that `unit_select` keeps for
the pair (request i, KV head h / group), or the whole visible context where the pair's budget covers it.

One kernel. Every program selects its pair's groups for itself (`unit_select`), while others do the same, and attends to
a run of their tiles with `attend_tile`; one program a pair writes what was left out (`unit_mass`), one of its own where
the device has room. When all pairs are dense, runs, tiles
and the order of every sum are those of `paged_decode`, and the result is bit-identical to it. Beside sparse pairs the
runs of dense ones are cut elsewhere, which moves the last bits. The last program of a pair to finish (an atomic
counter that it sets back to zero) merges the runs. Where the step's slots are given, programs past those of attention
write the summaries that `summarize` would: a launch less in every layer. Called by `sparse_decode`, which checks the
inputs.

Limits: those of `paged_decode`. Positions outside the kept groups, the context and the window are never read.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch

from vashista.kernels import paged_decode as dense
from vashista.kernels.key_summary import GROUP_TOKENS, SummaryLevel, summarize_unit, unit_bytes
from vashista.kernels.paged_tile import TileShape, attend_tile
from vashista.kernels.pair_deal import deal_pairs, find_run, has_pdl, load_pairs
from vashista.kernels.selection import ScoreOptions, Selection
from vashista.kernels.triton_guard import INTERPRETED, jit, next_power_of_two, round_to, tl
from vashista.kernels.unit_mass import BOUND_SLACK, weigh_units
from vashista.kernels.unit_select import count_kept, select_units

SPARSE_RUN_TILES = 1
"""A run of a sparse pair has at least so many tiles: its loads are scattered, and many programs hide the delay."""
LONG_SPARSE_KEYS = 2048
"""A longer run of a sparse pair is cut, so that no slow program ends alone."""
SHORT_STAGES = 2
"""The pipeline's depth where every sparse run is one tile: what is loaded ahead of a loop of one costs time. Long dense
pairs among such sparse ones are slower for it."""
MAX_REGISTERS = 0
MERGE_ELEMENTS = 16384
"""Numbers that a merge loads at a time: 128 a thread; with half of that a step of batch 1 took 3 us longer (H100)."""


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


@jit()
def merge_head(
    out, lse, run_acc, run_peak, run_total, first, num_runs, head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, RUNS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Join the runs of one query head, as `_paged_decode_merge_kernel` does; out, lse: pointers to the head's own."""
    dim = tl.arange(0, DIM)
    acc = tl.zeros([DIM], dtype=tl.float32)
    peak = tl.full([], float("-inf"), dtype=tl.float32)
    total = tl.zeros([], dtype=tl.float32)
    for begin in range(0, num_runs, RUNS):
        run = begin + tl.arange(0, RUNS)
        is_there = run < num_runs
        slot = (first + run).to(tl.int64) * GROUP + head
        peaks = tl.load(run_peak + slot, mask=is_there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(run_total + slot, mask=is_there, other=0.0, cache_modifier=".cg")
        at = run_acc + slot[:, None] * DIM + dim[None, :]
        accs = tl.load(at, mask=is_there[:, None], other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        fade = tl.exp2(peak - new_peak)
        weight = tl.exp2(peaks - new_peak)
        acc = acc * fade + tl.sum(accs * weight[:, None], 0)
        total = total * fade + tl.sum(totals * weight, 0)
        peak = new_peak
    is_empty = num_runs == 0
    result = acc / tl.where(is_empty, 1.0, total)
    tl.store(out + dim, round_to(result, out.dtype.element_ty), mask=dim < HEAD_DIM)
    if HAS_LSE:
        tl.store(lse, peak * 0.6931471805599453 + tl.log(tl.where(is_empty, 1.0, total)))


@jit()
def merge_group(
    out, lse, out_stride_head, run_acc, run_peak, run_total, first, num_runs,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, RUNS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Join the runs of all heads of a sparse pair at once: many loads in flight; `merge_head` waits for each."""
    member = tl.arange(0, MEMBERS)
    is_member = member < GROUP
    dim = tl.arange(0, DIM)
    acc = tl.zeros([MEMBERS, DIM], dtype=tl.float32)
    peak = tl.full([MEMBERS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([MEMBERS], dtype=tl.float32)
    for begin in range(0, num_runs, RUNS):
        run = begin + tl.arange(0, RUNS)
        slot = (first + run).to(tl.int64)[:, None] * GROUP + member[None, :]
        is_there = (run < num_runs)[:, None] & is_member[None, :]
        peaks = tl.load(run_peak + slot, mask=is_there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(run_total + slot, mask=is_there, other=0.0, cache_modifier=".cg")
        at = run_acc + slot[:, :, None] * DIM + dim[None, None, :]
        accs = tl.load(at, mask=is_there[:, :, None], other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        shift = tl.where(is_member, new_peak, 0.0)
        fade = tl.exp2(peak - shift)
        weight = tl.exp2(peaks - shift[None, :])
        acc = acc * fade[:, None] + tl.sum(accs * weight[:, :, None], 0)
        total = total * fade + tl.sum(totals * weight, 0)
        peak = new_peak
    result = acc / tl.where(is_member, total, 1.0)[:, None]
    to = out + member.to(tl.int64)[:, None] * out_stride_head + dim[None, :]
    tl.store(to, round_to(result, out.dtype.element_ty), mask=is_member[:, None] & (dim < HEAD_DIM)[None, :])
    if HAS_LSE:
        log_total = peak * 0.6931471805599453 + tl.log(tl.where(is_member, total, 1.0))
        tl.store(lse + member, log_total, mask=is_member)


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
    IS_SPLIT: tl.constexpr, SLACK: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    """Programs write summaries, then weigh, each for one pair; then program p attends to run p.

    Runs are ordered by request, then KV head, then position. Without weighers the first run of a pair weighs.
    """
    if HAS_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    num_pairs = num_requests * num_kv_heads
    program = tl.program_id(0) - num_upkeep - num_weighers
    if tl.program_id(0) < num_upkeep:
        # no wait: of this unit, the newest, the scores that are being made do not use the summary
        level, rest = tl.program_id(0) // num_pairs, tl.program_id(0) % num_pairs
        slot = tl.load(slots + rest // num_kv_heads)
        page, offset, kv_head = slot // PAGE_SIZE, slot % PAGE_SIZE, (rest % num_kv_heads).to(tl.int64)
        if slot >= 0:
            if level == 0:
                summarize_unit(
                    k_cache, codes, steps, page, kv_head, offset, num_kv_heads, k_stride_page, k_stride_head,
                    k_stride_token, HEAD_DIM, DIM, PAGE_SIZE, GROUP_KEYS, UNIT_BYTES, RULE,
                )  # fmt: skip
            else:
                summarize_unit(
                    k_cache, coarse_codes, coarse_steps, page, kv_head, offset, num_kv_heads, k_stride_page,
                    k_stride_head, k_stride_token, HEAD_DIM, DIM, PAGE_SIZE, COARSE, UNIT_BYTES, RULE,
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
    k_head, v_head = k_cache + head * k_stride_head, v_cache + head * v_stride_head
    if HAS_PDL:
        tl.extra.cuda.gdc_wait()
    long_pair = pair.to(tl.int64)
    units_row = units + long_pair * max_kept
    num_groups = budget * 0
    mass_row = mass + pair * 4
    is_teller = (run == 0) & (is_weigher | (num_weighers == 0))
    if is_pair_sparse:
        peak_row = peaks + long_pair * part_capacity
        num_listed = tl.load(coarse_kept + pair, cache_modifier=".cg") if PER_COARSE > 0 else 0
        first_group = low // GROUP_KEYS
        row_at = long_pair * capacity
        num_groups, item, key, is_kept, is_opened = select_units(
            keys + row_at, peak_row, parts + long_pair * max_kept, coarse_units + long_pair * max_coarse, units_row,
            num_listed, high, first_group, budget // GROUP_KEYS, num_sinks, num_recent, max_kept,
            BLOCK, PARTS, PART, FORCED, COLUMNS, GROUP_KEYS, PER_COARSE,
        )  # fmt: skip
        if is_teller:
            tl.store(num_kept + pair, num_groups)
            weigh_units(
                mass_row, coarse_mass + pair * 4, scores + row_at, bounds + row_at, peak_row,
                sums + long_pair * part_capacity, bound_sums + long_pair * part_capacity,
                item, key, is_kept, is_opened, high, first_group, num_sinks, num_recent, num_listed,
                PARTS, PART, FORCED, GROUP_KEYS, PER_COARSE, SLACK,
            )  # fmt: skip
    elif is_teller:
        tl.store(num_kept + pair, 0)
        tl.store(mass_row + tl.arange(0, 4), tl.full([4], float("-inf"), tl.float32))
    if is_weigher:
        return
    begin, end = (num_tiles * run) // runs_here, (num_tiles * (run + 1)) // runs_here
    first_tile = tl.where(is_pair_sparse, 0, low // KEYS)
    if SAME_STRIDES:  # then the compiler works out one address for two
        v_stride_page, v_stride_token = k_stride_page, k_stride_token
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

    slot = program.to(tl.int64) * GROUP + row
    tl.store(run_peak + slot, peak, mask=row < GROUP)
    tl.store(run_total + slot, total, mask=row < GROUP)
    tl.store(run_acc + slot[:, None] * DIM + dim[None, :], acc, mask=row[:, None] < GROUP)
    tl.debug_barrier()
    if tl.atomic_add(counters + pair, 1, sem="acq_rel") == runs_here - 1:
        tl.store(counters + pair, 0)
        first_head = head * GROUP
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
) -> None:
    """Launch; kept: the scores of the groups, and what the coarse level kept; `out` and, if given, `lse` are filled
    for every request; summaries are written where `slots` are given.

    The tensors were checked by `sparse_decode`.
    """
    k_cache, v_cache = caches
    fine, coarse = levels[0], levels[-1]
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
    pdl = has_pdl(q.device)
    launch: dict[str, int] = {"launch_pdl": True} if pdl else {}
    if MAX_REGISTERS and not INTERPRETED:
        launch["maxnreg"] = MAX_REGISTERS
    with torch.cuda.device_of(q):
        _attend_kernel[(num_upkeep + num_weighers + num_programs,)](
            q, k_cache, v_cache, page_table, context_lens, budgets,
            groups.scores, groups.keys, groups.bounds, *groups.part_sums,
            groups.parts, groups.units, groups.num_kept, groups.mass, above.units, above.num_kept, above.mass,
            page_table if slots is None else slots, fine.codes, fine.steps, coarse.codes, coarse.steps,
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
            SPARSE_RUNS=max(1, MERGE_ELEMENTS // (next_power_of_two(group) * dim)), MEMBERS=next_power_of_two(group),
            RULE=int(fine.rule), UNIT_BYTES=unit_bytes(fine.rule, head_dim), COARSE=coarse.unit_tokens,
            PER_COARSE=coarse.unit_tokens // fine.unit_tokens if kept[1] else 0, BLOCK=groups.block,
            PARTS=groups.num_parts, PART=groups.part_units, FORCED=groups.max_forced,
            SAME_STRIDES=k_cache.stride() == v_cache.stride(), COLUMNS=min(groups.block, 32 * tile.num_warps),
            HAS_WINDOW=options.window is not None, HAS_SOFTCAP=options.softcap is not None, HAS_LSE=lse is not None,
            IS_SPLIT=q.dtype in dense.SPLIT_DTYPES, SLACK=BOUND_SLACK, HAS_PDL=pdl,
            num_warps=tile.num_warps, num_stages=SHORT_STAGES if is_short else tile.num_stages, **launch,
        )  # fmt: skip
