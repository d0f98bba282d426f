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
may be written after the step. Called by `sparse_decode`.

Layout: q [num_requests, num_heads, head_dim]; budgets [num_requests, num_kv_heads] int32, tokens; see `Selection`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import math

import torch

from vashista.kernels.key_summary import Rule, SummaryLevel, decode_summaries, unit_bytes
from vashista.kernels.paged_tile import device_limits
from vashista.kernels.pair_deal import has_pdl
from vashista.kernels.selection import ScoreOptions, Selection
from vashista.kernels.triton_guard import IS_INTERPRETED, jit, next_power_of_two, tl
from vashista.kernels.unit_mass import BOUND_SLACK, log_sum, weigh_units
from vashista.kernels.unit_select import clean_scores, select_units

PROGRAMS_PER_MULTIPROCESSOR = 4
"""So many are at work at once (registers, H100)."""
WAVES = 1
"""A launch has so many waves of programs, each of one pair; those that a short pair does not need end at once."""
MAX_GROUP = 16
"""Heads that a query group may have here."""
TILE = 128
NUM_STAGES = 2
NUM_WARPS = 4


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
def locate_units(
    tile, num_items, first_unit, low, high, head, num_kv_heads, list_row, page_row,
    TILE: tl.constexpr, UNIT: tl.constexpr, PER_PAGE: tl.constexpr, PER_COARSE: tl.constexpr,
):  # fmt: skip
    """(unit, summary) of a tile's candidates, [TILE] int32; summary: its number, -1 without visible keys."""
    item = tile * TILE + tl.arange(0, TILE)
    is_item = item < num_items
    if PER_COARSE > 0:
        coarse = tl.load(list_row + item // PER_COARSE, mask=is_item, other=0)
        unit = coarse * PER_COARSE + item % PER_COARSE
    else:
        unit = first_unit + item
    is_visible = is_item & (unit * UNIT < high) & ((unit + 1) * UNIT > low)
    page = tl.load(page_row + unit // PER_PAGE, mask=is_visible, other=0)
    return unit, tl.where(is_visible, (page * num_kv_heads + head) * PER_PAGE + unit % PER_PAGE, -1)


@jit()
def log_count(count):
    """Natural log of small positive integers; on a GPU its own instruction, right to 1e-6."""
    value = count.to(tl.float32)
    if IS_INTERPRETED:
        return tl.log(value)
    else:  # noqa: RET505 - Triton compiles one branch alone only when both are written
        base_2 = tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1
        )
        return base_2 * 0.6931471805599453


@jit()
def split_rows(values, most, is_low):
    """(codes int8, weight of each row): rows `is_low` hold what the codes of the row before leave, 254 times finer.

    values: [ROWS, n] float32; most: [ROWS], their greatest magnitude. Together 16 bits: products with 8-bit codes are
    exact integers, on tensor cores, and their sum is off by at most 2^-16 of most times the sum of the codes.
    """
    step = tl.maximum(most, 1e-30) / 127.0
    high = tl.floor(values / step[:, None] + 0.5)
    low = tl.floor((values / step[:, None] - high) * 254.0 + 0.5)
    codes = tl.where(is_low[:, None], low, high)
    codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
    return codes.to(tl.int8), tl.where(is_low, step / 254.0, step)


@jit()
def join_columns(product, weight, HEADS: tl.constexpr, TILE: tl.constexpr):
    """Products [TILE, 2 * HEADS] int32 with split rows as [TILE, HEADS] float32."""
    return tl.sum(tl.reshape(product.to(tl.float32) * weight[None, :], [TILE, HEADS, 2]), 2)


@jit()
def load_variances(at, is_there, HALF: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Codes of variances of both halves of the dimensions, [TILE, HALF] int8, by the table of `key_summary`."""
    half = tl.arange(0, HALF)
    is_read = is_there[:, None] & (half < HEAD_DIM // 2)[None, :]
    if IS_INTERPRETED:
        byte = at[:, None] + (half // 4 * 4 + half % 4 // 2)[None, :]
        shift = (half % 2 * 4)[None, :]
        first = (tl.load(byte, mask=is_read, other=0).to(tl.int32) >> shift) & 7
        second = (tl.load(byte + 2, mask=is_read, other=0).to(tl.int32) >> shift) & 7
        return ((first * first * 127 + 24) // 49).to(tl.int8), ((second * second * 127 + 24) // 49).to(tl.int8)
    else:  # noqa: RET505 - Triton compiles one branch alone only when both are written
        packed = tl.load(at[:, None] + half[None, :], mask=is_read, other=0)
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, rest;
            mov.b32 low, 0x170A0300;
            mov.b32 high, 0x7F5D4129;
            shr.u32 rest, $2, 16;
            prmt.b32 $0, low, high, $2;
            prmt.b32 $1, low, high, rest;
            }""",
            "=&r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )


@jit()
def load_steps(steps, summary, RECORD: tl.constexpr):
    """(step of the first plane, of the second, radius) of units, [TILE] float32 each; 0 where there is none."""
    at = steps + summary.to(tl.int64) * (RECORD // 4)
    is_there = summary >= 0
    first = tl.load(at, mask=is_there, other=0.0)
    second = tl.load(at + 1, mask=is_there, other=0.0)
    return first, second, tl.load(at + 2, mask=is_there, other=0.0)


@jit()
def bend(logit, softcap):
    """(softcap tanh(logit / softcap), the square of its slope)."""
    tanh = 1.0 - 2.0 / (tl.exp(tl.minimum(2.0 * (logit / softcap), 80.0)) + 1.0)
    return softcap * tanh, (1.0 - tanh * tanh) * (1.0 - tanh * tanh)


@jit()
def score_tile(
    first_rows, first_weight, second_rows, third_rows, second_weight, norm, doubt,
    unit, summary, step, step_second, radius, codes, low, high, scale, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
    UNIT: tl.constexpr, UNIT_BYTES: tl.constexpr, RULE: tl.constexpr, IS_SUM: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(scores, bounds) [TILE] of units, from what `split_queries` and `load_steps` returned; codes: the level's."""
    HALF: tl.constexpr = DIM // 2
    is_there = summary >= 0
    at = codes + summary.to(tl.int64) * (UNIT_BYTES + 16)
    dim = tl.arange(0, DIM)
    is_read = is_there[:, None] & (dim < HEAD_DIM)[None, :]
    first = tl.load(at[:, None] + dim[None, :], mask=is_read, other=0).to(tl.int8, bitcast=True)
    logit = (
        join_columns(tl.dot(first, tl.trans(first_rows), out_dtype=tl.int32), first_weight, HEADS, TILE)
        * (step * scale)[:, None]
    )
    width = step
    if RULE == 2:
        width = step + step_second
    above = logit + norm[None, :] * radius[:, None] + doubt[None, :] * width[:, None]
    if RULE == 2:
        second = tl.load(at[:, None] + HEAD_DIM + dim[None, :], mask=is_read, other=0).to(tl.int8, bitcast=True)
        under = join_columns(tl.dot(second, tl.trans(second_rows), out_dtype=tl.int32), second_weight, HEADS, TILE)
        logit += under * (step_second * scale)[:, None]
        above += under * (step_second * scale)[:, None]
    slope = 1.0
    if HAS_SOFTCAP:
        logit, slope = bend(logit, softcap)
        above, _ = bend(above, softcap)
    if RULE == 1:
        second, third = load_variances(at + HEAD_DIM, is_there, HALF, TILE, HEAD_DIM)
        spread = tl.dot(second, tl.trans(second_rows), out_dtype=tl.int32)
        spread = tl.dot(third, tl.trans(third_rows), spread, out_dtype=tl.int32)
        logit += slope * join_columns(spread, second_weight, HEADS, TILE) * step_second[:, None]
    if GROUP < HEADS:
        is_head = (tl.arange(0, HEADS) < GROUP)[None, :]
        logit, above = tl.where(is_head, logit, float("-inf")), tl.where(is_head, above, float("-inf"))
    score, bound = tl.max(logit, 1), tl.max(above, 1)
    if IS_SUM:
        score = score + tl.log(tl.sum(tl.exp(logit - score[:, None]), 1))
    num_visible = tl.minimum((unit + 1) * UNIT, high) - tl.maximum(unit * UNIT, low)
    size = log_count(tl.maximum(num_visible, 1))
    # the newest token's unit: always kept, its summary may be a step behind
    is_known = (unit + 1) * UNIT < high
    score = tl.where(is_known, clean_scores(score + size), 0.0)
    bound = tl.where(is_known, clean_scores(bound + size), 0.0)
    return tl.where(is_there, score, float("-inf")), tl.where(is_there, bound, float("-inf"))


@jit()
def split_queries(
    q_row, is_low, is_row, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """What `score_tile` multiplies with: (first, weight, second, third, weight, norm, doubt); q_row: [ROWS] pointers.

    Rows are split: of queries; second and third, of scale^2 q_d^2 / 2 of both halves of the dimensions, or, for the
    box, of the negative part of the queries. norm [HEADS]: scale |q|, rounded up. doubt [HEADS]: times the sum of a
    unit's steps, more than all roundings of a logit: those of the codes of q (HEAD_DIM / 4) and of float32.
    """
    dim, half = tl.arange(0, DIM), tl.arange(0, DIM // 2)
    query = tl.load(q_row[:, None] + dim[None, :], mask=is_row[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    query = query.to(tl.float32)
    most = tl.max(tl.abs(query), 1)
    if RULE == 2:
        above, below = tl.maximum(query, 0.0), tl.minimum(query, 0.0)
        first, first_weight = split_rows(above, tl.max(above, 1), is_low)
        second, second_weight = split_rows(below, tl.max(-below, 1), is_low)
        third = second
    else:
        first, first_weight = split_rows(query, most, is_low)
        second, third, second_weight = first, first, first_weight
    if RULE == 1:
        is_half = is_row[:, None] & (half < HEAD_DIM // 2)[None, :]
        one = tl.load(q_row[:, None] + half[None, :], mask=is_half, other=0.0).to(tl.float32) * scale
        two = tl.load(q_row[:, None] + half[None, :] + HEAD_DIM // 2, mask=is_half, other=0.0).to(tl.float32) * scale
        one, two = 0.5 * one * one, 0.5 * two * two
        largest = tl.max(tl.maximum(one, two), 1)
        second, second_weight = split_rows(one, largest, is_low)
        third, second_weight = split_rows(two, largest, is_low)
    norm = tl.sqrt(tl.sum(query * query, 1)) * (1.00003 * scale) + 2e-18 * scale
    norm = tl.max(tl.reshape(norm, [HEADS, 2]), 1)
    doubt = tl.max(tl.reshape(most, [HEADS, 2]), 1) * (0.0025 * HEAD_DIM * scale)
    return first, first_weight, second, third, second_weight, norm, doubt


@jit("num_requests", "splits", "window", "table_stride", "num_candidates", "num_sinks", "num_recent", "apart")
def _score_kernel(  # noqa: PLR0915 - address by address, as Triton wants it
    q, codes, steps, page_table, context_lens, budgets, scores, keys, bounds, peaks, sums, bound_sums,
    coarse_scores, coarse_keys, coarse_bounds, coarse_peaks, coarse_sums, coarse_bound_sums,
    coarse_parts, coarse_units, coarse_kept, coarse_mass,
    q_stride_row, q_stride_head, table_stride, capacity, part_capacity, coarse_capacity, coarse_part_capacity,
    max_parts, max_coarse,
    num_requests, num_kv_heads, splits, scale, window, softcap, num_candidates, num_sinks, num_recent, apart,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UNIT: tl.constexpr, PER_PAGE: tl.constexpr, PER_COARSE: tl.constexpr, UNIT_BYTES: tl.constexpr,
    RULE: tl.constexpr, IS_SUM: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, COARSE_PARTS: tl.constexpr,
    COARSE_PART: tl.constexpr, FORCED: tl.constexpr, COLUMNS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SLACK: tl.constexpr, HAS_PDL: tl.constexpr,
):  # fmt: skip
    """Program (pair, split) scores its share of the pair's tiles.

    PER_COARSE: units of this level in one of the coarser level, whose best `num_candidates` units hold the candidates;
    0: all units are. With apart = 1, one program more a pair weighs what the coarse level drops, else split 0 does.
    """
    if HAS_PDL and PER_COARSE == 0:
        # then, and only then, may the next kernel read before its own wait what the kernels before this one wrote
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    LARGE: tl.constexpr = UNIT * PER_COARSE
    pair, run = tl.program_id(0) // (splits + apart), tl.program_id(0) % (splits + apart)
    request, head = (pair // num_kv_heads).to(tl.int64), (pair % num_kv_heads).to(tl.int64)
    high = tl.load(context_lens + request)
    low = tl.maximum(high - window, 0) if HAS_WINDOW else high * 0
    is_sparse = tl.load(budgets + pair) < high - low
    first_unit = low // UNIT
    num_items = tl.cdiv(high, UNIT) - first_unit
    if PER_COARSE > 0:
        # those that are kept may be fewer, never more
        num_items = tl.minimum(tl.cdiv(high, LARGE) - low // LARGE, max_coarse) * PER_COARSE
    num_tiles = tl.where(is_sparse, tl.cdiv(num_items, TILE), 0)
    runs_here = tl.minimum(num_tiles, splits)
    is_weigher = run == splits * apart
    if (run >= runs_here) & (is_weigher == 0):
        return
    row = tl.arange(0, ROWS)
    member, is_low_row = row // 2, row % 2 == 1
    q_row = q + request * q_stride_row + (head * GROUP + member) * q_stride_head
    first_rows, first_weight, second_rows, third_rows, second_weight, norm, doubt = split_queries(
        q_row, is_low_row, member < GROUP, scale, ROWS // 2, HEAD_DIM, DIM, RULE
    )
    if HAS_PDL and PER_COARSE > 0:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    long_pair = pair.to(tl.int64)
    list_row = coarse_units + long_pair * max_coarse
    if PER_COARSE > 0:
        if num_tiles == 0:
            return
        peak_row = coarse_peaks + long_pair * coarse_part_capacity
        row_at = long_pair * coarse_capacity
        first_large = low // LARGE
        count, item, item_key, is_kept, is_opened = select_units(
            coarse_keys + row_at, peak_row, coarse_parts + long_pair * max_parts, list_row,
            list_row, 0, high, first_large, num_candidates, num_sinks, num_recent, max_coarse,
            BLOCK, COARSE_PARTS, COARSE_PART, FORCED, COLUMNS, LARGE, 0,
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
    page_row = page_table + request * table_stride
    row_begin = long_pair * capacity
    score_row, key_row, bound_row = scores + row_begin, keys + row_begin, bounds + row_begin
    unit, summary = locate_units(
        begin, num_items, first_unit, low, high, pair % num_kv_heads, num_kv_heads, list_row, page_row,
        TILE, UNIT, PER_PAGE, PER_COARSE,
    )  # fmt: skip
    step, step_second, radius = load_steps(steps, summary, UNIT_BYTES + 16)
    for tile in range(begin, end):
        next_unit, next_summary = locate_units(
            tile + 1, num_items, first_unit, low, high, pair % num_kv_heads, num_kv_heads, list_row, page_row,
            TILE, UNIT, PER_PAGE, PER_COARSE,
        )  # fmt: skip
        score, bound = score_tile(
            first_rows, first_weight, second_rows, third_rows, second_weight, norm, doubt,
            unit, summary, step, step_second, radius, codes, low, high, scale, softcap,
            GROUP, ROWS // 2, HEAD_DIM, DIM, TILE, UNIT, UNIT_BYTES, RULE, IS_SUM, HAS_SOFTCAP,
        )  # fmt: skip
        next_step, next_second, next_radius = load_steps(steps, next_summary, UNIT_BYTES + 16)
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
            tl.store(peaks + at, tl.max(free, 1), mask=is_part)
            tl.store(sums + at, log_sum(free, 1), mask=is_part)
            tl.store(bound_sums + at, log_sum(free_bound, 1), mask=is_part)
        unit, summary, step, step_second, radius = next_unit, next_summary, next_step, next_second, next_radius


def count_splits(q: torch.Tensor, num_pairs: int, capacity: int, tile: int) -> int:
    """Programs a pair: enough for WAVES over the device, no more than a pair has tiles."""
    one_wave = device_limits(q.device).num_multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    return min(-(-one_wave * WAVES // num_pairs), -(-capacity // tile))


def score_units(
    q: torch.Tensor,
    level: SummaryLevel,
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    budgets: torch.Tensor,
    options: ScoreOptions,
    result: Selection,
    *,
    coarse: tuple[SummaryLevel, Selection, int] | None = None,
) -> None:
    """Launch one level. coarse: the coarser level, its scores and how many of its units to keep, selected here.

    Shapes stand in the module's header; the tensors were checked by `sparse_decode`.
    """
    num_requests, num_heads, head_dim = q.shape
    num_kv_heads = budgets.shape[1]
    num_pairs, capacity = num_requests * num_kv_heads, result.scores.shape[1]
    group, dim = num_heads // num_kv_heads, next_power_of_two(head_dim)
    splits = count_splits(q, num_pairs, capacity, TILE)
    apart = 1 if coarse and 4 * num_pairs <= device_limits(q.device).num_multiprocessors else 0
    above = coarse[1] if coarse else result
    pdl = has_pdl(q.device)
    launch = {"launch_pdl": True} if pdl else {}
    with torch.cuda.device_of(q):
        _score_kernel[(num_pairs * (splits + apart),)](
            q, level.codes, level.steps, page_table, context_lens, budgets,
            result.scores, result.keys, result.bounds, *result.part_sums,
            above.scores, above.keys, above.bounds, *above.part_sums,
            above.parts, above.units, above.num_kept, above.mass,
            *q.stride()[:2], page_table.stride(0), capacity, result.part_sums.shape[2],
            above.scores.shape[1], above.part_sums.shape[2], above.parts.shape[1], above.units.shape[1],
            num_requests, num_kv_heads, splits, options.scale, options.window or 0, options.softcap or 0.0,
            coarse[2] if coarse else 0, options.num_sinks, options.num_recent, apart,
            GROUP=group, HEAD_DIM=head_dim, DIM=dim, ROWS=2 * max(4, next_power_of_two(group)), TILE=TILE,
            UNIT=level.unit_tokens, PER_PAGE=level.codes.shape[2],
            PER_COARSE=coarse[0].unit_tokens // level.unit_tokens if coarse else 0,
            UNIT_BYTES=unit_bytes(level.rule, head_dim), RULE=int(level.rule), IS_SUM=options.is_sum,
            PART=result.part_units, BLOCK=above.block, COARSE_PARTS=above.num_parts, COARSE_PART=above.part_units,
            FORCED=above.max_forced, COLUMNS=min(above.block, 32 * NUM_WARPS), HAS_WINDOW=options.window is not None,
            HAS_SOFTCAP=options.softcap is not None, SLACK=BOUND_SLACK, HAS_PDL=pdl,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES, **launch,
        )  # fmt: skip
