"""Scores all units of every (request, KV head) and keeps the best: one launch a level of units.

The score of unit u for query head h estimates log sum over its n visible keys of exp(f(scale * q_h . k)), in nats:
    mean           log n + f(scale q.m)
    mean_variance  log n + f(scale q.m) + f'(scale q.m)^2 scale^2 / 2 sum_d q_d^2 v_d
    box            log n + f(scale sum_d max(q_d h_d, q_d l_d))         (a bound, not an estimate)
with f(s) = s or c tanh(s / c). A KV head's score is the maximum over its query group, or the log of the sum of
exponentials; never the score of a mean query, which is not a bound. m, v, h, l: see `key_summary`.

Beside the score stands a bound of the same, certain, see `unit_mass`. A program scores a run of tiles of one pair; of
parts of neighbouring units it leaves the best free score and the sums that `unit_select` and `unit_mass` want.
Candidates are all visible units, or, on a finer level, those inside the best units of the coarser level, which every
program of the finer one selects for itself. A pair whose budget covers its visible context is not scored at all. The
unit of the newest token is always kept and enters no mass: its score is 0 and its summary is not used, so that this
may be written after the step. While the kernel before this one ends, programs fetch the summaries of their first tile
into L2; a kernel that does not let its successors start early leaves no time for that. Called by `sparse_decode`.

Layout: q [num_requests, num_heads, head_dim]; budgets [num_requests, num_kv_heads] int32, tokens; see `Selection`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import math

import torch

from vashista.kernels.key_summary import Rule, SummaryLevel, decode_summaries, summarize_newest, unit_bytes
from vashista.kernels.l2_fetch import fetch_bytes, is_aligned
from vashista.kernels.paged_tile import device_limits
from vashista.kernels.pair_deal import has_pdl
from vashista.kernels.selection import ScoreOptions, Selection
from vashista.kernels.triton_guard import jit, next_power_of_two, tl
from vashista.kernels.unit_logit import load_queries, load_steps, most_most, score_tile, split_queries
from vashista.kernels.unit_mass import BOUND_SLACK, log_of, shift_of, weigh_units
from vashista.kernels.unit_search import add_add
from vashista.kernels.unit_select import count_kept, select_units

PROGRAMS_PER_MULTIPROCESSOR = 4
"""So many are at work at once (registers, H100)."""
WAVES = 1
"""A launch has at most so many waves of programs, each of one pair; those a short pair does not need end at once."""
MAX_GROUP = 16
"""Heads that a query group may have here."""
TILE = 128
USE_FETCH = True
"""Whether programs fetch the summaries of their first tile while the kernel before this one ends."""
NUM_STAGES = 2
SHORT_STAGES = 1
"""Of few pairs whose programs have one tile each: what is loaded ahead of a loop of one costs time."""
NUM_WARPS = 4
FINE_WARPS = 8
"""Of a level below a coarse one where pairs are few: most of its work is to select the coarse units."""


def score_reference(
    q: torch.Tensor, level: SummaryLevel, page_row: torch.Tensor, kv_head: int, length: int, options: ScoreOptions
) -> torch.Tensor:
    """Scores of all units of one pair from the stored codes, float64, [num_units]; q: [group, head_dim]."""
    query, size = q.double() * options.scale, level.unit_tokens
    low = 0 if options.window is None else max(length - options.window, 0)
    index = torch.arange(-(-length // size), device=q.device)
    num_visible = ((index + 1) * size).clamp(max=length) - (index * size).clamp(min=low)
    first, second = decode_summaries(level, page_row, kv_head, len(index))
    logit = query.clamp(min=0) @ first.T
    logit += query.clamp(max=0) @ (second if level.rule == Rule.BOX else first).T
    slope = torch.ones_like(logit)
    if options.softcap is not None:
        tanh = torch.tanh(logit / options.softcap)
        logit, slope = options.softcap * tanh, 1 - tanh.square()
    if level.rule == Rule.MEAN_VARIANCE:
        logit = logit + 0.5 * slope.square() * (query.square() @ second.T)
    logit = torch.logsumexp(logit, 0) if options.is_sum else logit.amax(0)
    score = logit + num_visible.clamp(min=1).log()
    score = torch.where((index + 1) * size < length, score, 0.0)
    return score.masked_fill(num_visible <= 0, -math.inf)


@jit()
def count_wanted(high, budget, max_coarse, num_candidates, per_kept, full_context, LARGE: tl.constexpr):
    """Coarse units of LARGE tokens that a pair wants kept, as `sparse_decode.count_candidates`."""
    wanted = tl.where(per_kept > 0, tl.cdiv(budget * per_kept, LARGE), num_candidates)
    return tl.where(high <= full_context, max_coarse, tl.minimum(wanted, num_candidates))


@jit()
def deal_tiles(
    high, budget, window, num_wanted, max_coarse, num_sinks, num_recent, splits,
    TILE: tl.constexpr, UNIT: tl.constexpr, PER_COARSE: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """A pair's (first visible token, first unit, candidates, tiles, programs that have work).

    With PER_COARSE > 0 candidates are those inside coarse units, of which as many will be kept as `num_wanted` says.
    """
    low = tl.maximum(high - window, 0) if HAS_WINDOW else high * 0
    first_unit = low // UNIT
    num_items = tl.cdiv(high, UNIT) - first_unit
    if PER_COARSE > 0:
        LARGE: tl.constexpr = UNIT * PER_COARSE
        num_coarse = count_kept(high, low // LARGE, num_wanted, num_sinks, num_recent, LARGE)
        num_items = tl.minimum(num_coarse, max_coarse) * PER_COARSE
    num_tiles = tl.where(budget < high - low, tl.cdiv(num_items, TILE), 0)
    return low, first_unit, num_items, num_tiles, tl.minimum(num_tiles, splits)


@jit()
def locate_units(
    tile, num_items, first_unit, low, high, list_row, page_row,
    TILE: tl.constexpr, UNIT: tl.constexpr, PER_PAGE: tl.constexpr, PER_COARSE: tl.constexpr,
):  # fmt: skip
    """(unit, page) of a tile's candidates, [TILE] int32; the page is -1 without visible keys."""
    item = tile * TILE + tl.arange(0, TILE)
    is_item = item < num_items
    if PER_COARSE > 0:
        coarse = tl.load(list_row + item // PER_COARSE, mask=is_item, other=0)
        unit = coarse * PER_COARSE + item % PER_COARSE
    else:
        unit = first_unit + item
    is_visible = is_item & (unit * UNIT < high) & ((unit + 1) * UNIT > low)
    return unit, tl.load(page_row + unit // PER_PAGE, mask=is_visible, other=-1, cache_modifier=".cg")


@jit(
    "num_requests",
    "splits",
    "window",
    "table_stride",
    "num_candidates",
    "per_kept",
    "full_context",
    "num_sinks",
    "num_recent",
    "apart",
    "most_tokens",
    "num_pages",
    "num_upkeep",
)
def _score_kernel(  # noqa: PLR0912, PLR0915 - address by address, as Triton wants it
    q, codes, steps, page_table, context_lens, budgets, scores, keys, bounds, peaks, sums, bound_sums,
    coarse_scores, coarse_keys, coarse_bounds, coarse_peaks, coarse_sums, coarse_bound_sums,
    coarse_parts, coarse_units, coarse_kept, coarse_mass,
    q_stride_row, q_stride_head, table_stride, capacity, part_capacity, coarse_capacity, coarse_part_capacity,
    max_parts, max_coarse, most_tokens, num_pages,
    num_requests, num_kv_heads, splits, scale, window, softcap, num_candidates, per_kept, full_context,
    num_sinks, num_recent, apart,
    num_upkeep, slots, k_cache, newest_codes, newest_steps, coarse_codes, coarse_steps,
    k_stride_page, k_stride_head, k_stride_token,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UNIT: tl.constexpr, PER_PAGE: tl.constexpr, PER_COARSE: tl.constexpr, UNIT_BYTES: tl.constexpr,
    RULE: tl.constexpr, IS_SUM: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, COARSE_PARTS: tl.constexpr,
    COARSE_PART: tl.constexpr, FORCED: tl.constexpr, COLUMNS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SLACK: tl.constexpr, HAS_PDL: tl.constexpr, HAS_FETCH: tl.constexpr,
    PAGE_SIZE: tl.constexpr, NEWEST: tl.constexpr, NEWEST_COARSE: tl.constexpr,
):  # fmt: skip
    """Program (pair, split) scores its share of the pair's tiles.

    PER_COARSE: units of this level in one of the coarser level, whose best units hold the candidates: `num_candidates`,
    or with per_kept > 0 no more than hold `per_kept` times the budget; all in contexts up to `full_context`. 0: all
    units are candidates. With apart = 1, one program more a pair weighs what the coarse level drops, else split 0 does.
    With NEWEST > 0, programs before those write the summaries of the step's tokens, of units of NEWEST and
    NEWEST_COARSE tokens.
    """
    LARGE: tl.constexpr = UNIT * PER_COARSE
    program = tl.program_id(0) - num_upkeep
    if NEWEST > 0:  # noqa: SIM102 - the outer is decided when the kernel is compiled
        if program < 0:
            if HAS_FETCH:  # what is written before this step, while the kernel before ends
                slot = tl.load(slots + tl.program_id(0) % (num_requests * num_kv_heads) // num_kv_heads)
                token = tl.arange(0, NEWEST_COARSE)
                is_there = (slot >= 0) & (slot < num_pages * PAGE_SIZE)
                place = slot % PAGE_SIZE // NEWEST_COARSE * NEWEST_COARSE + token
                row_at = (slot // PAGE_SIZE) * k_stride_page + (tl.program_id(0) % num_kv_heads) * k_stride_head
                fetch_bytes(
                    k_cache + row_at + place * k_stride_token, is_there & (token >= 0),
                    HEAD_DIM * k_cache.dtype.element_ty.primitive_bitwidth // 8,
                )  # fmt: skip
            if HAS_PDL:
                tl.extra.cuda.gdc_wait()
                tl.extra.cuda.gdc_launch_dependents()
            summarize_newest(
                tl.program_id(0), num_requests * num_kv_heads, slots, k_cache, newest_codes, newest_steps,
                coarse_codes, coarse_steps, num_kv_heads, k_stride_page, k_stride_head, k_stride_token,
                HEAD_DIM, DIM, PAGE_SIZE, NEWEST, NEWEST_COARSE, UNIT_BYTES, RULE,
            )  # fmt: skip
            return
    pair, run = program // (splits + apart), program % (splits + apart)
    request, head = (pair // num_kv_heads).to(tl.int64), (pair % num_kv_heads).to(tl.int64)
    long_pair = pair.to(tl.int64)
    list_row = coarse_units + long_pair * max_coarse
    page_row = page_table + request * table_stride
    is_weigher = run == splits * apart
    row = tl.arange(0, ROWS)
    member, is_low_row = row // 2, row % 2 == 1
    q_row = q + request * q_stride_row + (head * GROUP + member) * q_stride_head
    early_high, early_budget = run * 0, run * 0
    if HAS_PDL and PER_COARSE == 0:
        # what the kernels before may still write is read here to fetch by, not to use
        early_high = tl.load(context_lens + request, cache_modifier=".cg")
        early_high = tl.minimum(tl.maximum(early_high, 0), most_tokens)
        early_budget = tl.load(budgets + pair, cache_modifier=".cg")
        if HAS_FETCH:
            low, first_unit, num_items, num_tiles, runs_here = deal_tiles(
                early_high, early_budget, window, 0, max_coarse, num_sinks, num_recent, splits,
                TILE, UNIT, PER_COARSE, HAS_WINDOW,
            )  # fmt: skip
            fetch_bytes(
                q_row, (member < GROUP) & (is_low_row == 0), HEAD_DIM * q.dtype.element_ty.primitive_bitwidth // 8
            )
            # whole pages, with the summaries of all KV heads, dealt out over the programs of those
            turn = tl.arange(0, TILE // PER_PAGE)
            first_at = (first_unit + (num_tiles * run) // tl.maximum(runs_here, 1) * TILE) // PER_PAGE + turn
            is_mine = (run < runs_here) & (turn % num_kv_heads == pair % num_kv_heads)
            is_mine = is_mine & (first_at * PER_PAGE < first_unit + num_items)
            page = tl.load(page_row + first_at, mask=is_mine, other=-1, cache_modifier=".cg")
            is_mine = is_mine & (page >= 0) & (page < num_pages)
            page_bytes = num_kv_heads * (PER_PAGE * (UNIT_BYTES + 16))
            fetch_bytes(codes + page.to(tl.int64) * page_bytes, is_mine, page_bytes)
        # then, and only then, may the next kernel read before its own wait what the kernels before this one wrote
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    high = tl.load(context_lens + request, cache_modifier=".cg")
    budget = tl.load(budgets + pair, cache_modifier=".cg")
    query, one, two = load_queries(q_row, member < GROUP, HEAD_DIM, DIM)
    # the pages of the first tile, if what was read early holds: all these loads start together
    low, first_unit, num_items, num_tiles, runs_here = deal_tiles(
        early_high, early_budget, window, 0, max_coarse, num_sinks, num_recent, splits,
        TILE, UNIT, PER_COARSE, HAS_WINDOW,
    )  # fmt: skip
    unit, unit_page = locate_units(
        (num_tiles * run) // tl.maximum(runs_here, 1), tl.where(PER_COARSE == 0, num_items, 0), first_unit, low,
        early_high, list_row, page_row, TILE, UNIT, PER_PAGE, PER_COARSE,
    )  # fmt: skip
    num_wanted = budget * 0
    if PER_COARSE > 0:
        num_wanted = count_wanted(high, budget, max_coarse, num_candidates, per_kept, full_context, LARGE)
    low, first_unit, num_items, num_tiles, runs_here = deal_tiles(
        high, budget, window, num_wanted, max_coarse, num_sinks, num_recent, splits,
        TILE, UNIT, PER_COARSE, HAS_WINDOW,
    )  # fmt: skip
    if PER_COARSE > 0:  # noqa: SIM102 - the outer is decided when the kernel is compiled
        if (run >= runs_here) & (is_weigher == 0):
            return
    first_rows, first_weight, second_rows, third_rows, second_weight, norm, doubt = split_queries(
        query, one, two, is_low_row, scale, ROWS // 2, HEAD_DIM, RULE
    )
    if HAS_PDL and PER_COARSE > 0:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if PER_COARSE > 0:
        if num_tiles == 0:
            return
        peak_row = coarse_peaks + long_pair * coarse_part_capacity
        row_at = long_pair * coarse_capacity
        first_large = low // LARGE
        count, item, item_key, is_kept, is_opened = select_units(
            coarse_keys + row_at, peak_row, coarse_parts + long_pair * max_parts, list_row,
            high, first_large, num_wanted, num_sinks, num_recent, max_coarse,
            BLOCK, COARSE_PARTS, COARSE_PART, FORCED, COLUMNS, LARGE,
        )  # fmt: skip
        num_items = count * PER_COARSE
        if is_weigher:
            tl.store(coarse_kept + pair, count)
            mass_row = coarse_mass + pair * 4
            weigh_units(
                mass_row, mass_row, coarse_scores + row_at, coarse_bounds + row_at, peak_row,
                coarse_sums + long_pair * coarse_part_capacity, coarse_bound_sums + long_pair * coarse_part_capacity,
                item, item_key, is_kept, is_opened, high, first_large, num_sinks, num_recent, 0,
                COARSE_PARTS, COARSE_PART, FORCED, LARGE, 0, SLACK,
            )  # fmt: skip
    if run >= runs_here:
        return
    begin, end = (num_tiles * run) // runs_here, (num_tiles * (run + 1)) // runs_here
    row_begin = long_pair * capacity
    score_row, key_row, bound_row = scores + row_begin, keys + row_begin, bounds + row_begin
    if (PER_COARSE > 0) | (high != early_high) | (budget != early_budget):
        unit, unit_page = locate_units(
            begin, num_items, first_unit, low, high, list_row, page_row, TILE, UNIT, PER_PAGE, PER_COARSE
        )
    kv_head = pair % num_kv_heads
    step, step_second, radius = load_steps(
        steps, unit_page, unit, kv_head, num_kv_heads, HEAD_DIM, PER_PAGE, UNIT_BYTES
    )
    for tile in range(begin, end):
        next_unit, next_page = locate_units(
            tile + 1, num_items, first_unit, low, high, list_row, page_row, TILE, UNIT, PER_PAGE, PER_COARSE
        )
        score, bound = score_tile(
            first_rows, first_weight, second_rows, third_rows, second_weight, norm, doubt,
            unit, unit_page, step, step_second, radius, codes, kv_head, num_kv_heads, low, high, scale, softcap,
            GROUP, ROWS // 2, HEAD_DIM, DIM, TILE, UNIT, PER_PAGE, UNIT_BYTES, RULE, IS_SUM, HAS_SOFTCAP,
        )  # fmt: skip
        next_step, next_second, next_radius = load_steps(
            steps, next_page, next_unit, kv_head, num_kv_heads, HEAD_DIM, PER_PAGE, UNIT_BYTES
        )
        place = tile * TILE + tl.arange(0, TILE)
        tl.store(score_row + place, score, mask=place < num_items)
        tl.store(bound_row + place, bound, mask=place < num_items)
        is_forced = (unit * UNIT < num_sinks) | ((unit + 1) * UNIT > high - num_recent)
        key = tl.where(is_forced, float("-inf"), score)
        tl.store(key_row + place, key, mask=place < num_items)
        if PART > 0:
            free = tl.reshape(key, [TILE // PART, PART])
            free_bound = tl.reshape(tl.where(is_forced, float("-inf"), bound), [TILE // PART, PART])
            part = tile * (TILE // PART) + tl.arange(0, TILE // PART)
            at = long_pair * part_capacity + part
            is_part = part * PART < num_items
            most, most_bound = tl.reduce((free, free_bound), 1, most_most)
            shift, shift_bound = shift_of(most), shift_of(most_bound)
            mass, mass_bound = tl.reduce(
                (tl.exp(free - shift[:, None]), tl.exp(free_bound - shift_bound[:, None])), 1, add_add
            )
            tl.store(peaks + at, most, mask=is_part)
            tl.store(sums + at, log_of(mass, shift), mask=is_part)
            tl.store(bound_sums + at, log_of(mass_bound, shift_bound), mask=is_part)
        unit, unit_page, step, step_second, radius = next_unit, next_page, next_step, next_second, next_radius


def count_splits(q: torch.Tensor, num_pairs: int, capacity: int, tile: int) -> int:
    """Programs a pair: WAVES over the device and no program more, no more than a pair has tiles."""
    one_wave = device_limits(q.device).num_multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    return min(max(one_wave * WAVES // num_pairs, 1), -(-capacity // tile))


def score_units(
    q: torch.Tensor,
    level: SummaryLevel,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    budgets: torch.Tensor,
    options: ScoreOptions,
    result: Selection,
    *,
    coarse: tuple[SummaryLevel, Selection, tuple[int, int, int]] | None = None,
    upkeep: tuple[torch.Tensor, tuple[SummaryLevel, ...], torch.Tensor] | None = None,
    has_parts: bool = True,
) -> None:
    """Launch one level. coarse: the coarser level, its scores, and how many of its units to keep, selected here: at
    most, as many as hold so many times the budget (0: the most), and all in contexts up to so many tokens. upkeep:
    keys, levels and slots of the step's tokens, whose summaries are written by programs of this launch. has_parts:
    False where nobody asks for what parts of units have in common.

    Shapes stand in the module's header; the tensors were checked by `sparse_decode`.
    """
    num_requests, num_heads, head_dim = q.shape
    num_kv_heads = budgets.shape[1]
    num_pairs, capacity = num_requests * num_kv_heads, result.scores.shape[1]
    group, dim = num_heads // num_kv_heads, next_power_of_two(head_dim)
    is_few = 4 * num_pairs <= device_limits(q.device).num_multiprocessors
    splits = count_splits(q, num_pairs, capacity, TILE)
    num_warps = FINE_WARPS if coarse and is_few else NUM_WARPS
    num_stages = SHORT_STAGES if splits * TILE >= capacity and is_few else NUM_STAGES
    apart = 1 if coarse and is_few else 0
    above = coarse[1] if coarse else result
    pdl = has_pdl(q.device)
    launch = {"launch_pdl": True} if pdl else {}
    k_cache, written, slots = upkeep or (q[None], (level,), page_table)
    num_upkeep = num_pairs * len(written) if upkeep else 0
    with torch.cuda.device_of(q):
        _score_kernel[(num_upkeep + num_pairs * (splits + apart),)](
            q, level.first, level.steps, page_table, context_lens, budgets,
            result.scores, result.keys, result.bounds, *result.part_sums,
            above.scores, above.keys, above.bounds, *above.part_sums,
            above.parts, above.units, above.num_kept, above.mass,
            *q.stride()[:2], page_table.stride(0), capacity, result.part_sums.shape[2],
            above.scores.shape[1], above.part_sums.shape[2], above.parts.shape[1], above.units.shape[1],
            page_table.shape[1] * level.steps.shape[2] * level.unit_tokens, level.steps.shape[0],
            num_requests, num_kv_heads, splits, options.scale, options.window or 0, options.softcap or 0.0,
            *(coarse[2] if coarse else (0, 0, 0)), options.num_sinks, options.num_recent, apart,
            num_upkeep, slots, k_cache, written[0].first, written[0].steps, written[-1].first, written[-1].steps,
            *k_cache.stride()[:3],
            GROUP=group, HEAD_DIM=head_dim, DIM=dim, ROWS=2 * max(4, next_power_of_two(group)), TILE=TILE,
            UNIT=level.unit_tokens, PER_PAGE=level.steps.shape[2],
            PER_COARSE=coarse[0].unit_tokens // level.unit_tokens if coarse else 0,
            UNIT_BYTES=unit_bytes(level.rule, head_dim), RULE=int(level.rule), IS_SUM=options.is_sum,
            PART=result.part_units if has_parts else 0, BLOCK=above.block, COARSE_PARTS=above.num_parts,
            COARSE_PART=above.part_units, FORCED=above.max_forced, COLUMNS=min(above.block, 32 * num_warps),
            HAS_WINDOW=options.window is not None,
            HAS_SOFTCAP=options.softcap is not None, SLACK=BOUND_SLACK, HAS_PDL=pdl,
            HAS_FETCH=USE_FETCH and pdl and is_aligned(q) and is_aligned(k_cache) and level.first.data_ptr() % 16 == 0,
            PAGE_SIZE=k_cache.shape[2], NEWEST=written[0].unit_tokens if upkeep else 0,
            NEWEST_COARSE=written[-1].unit_tokens if upkeep else 0,
            num_warps=num_warps, num_stages=num_stages, **launch,
        )  # fmt: skip
