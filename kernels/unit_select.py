"""Exact selection of the best units of one (request, KV head), inside a program.

The kept set is the one that sorting the scores gives: all sinks and recent units, then the highest scores, ties by the
lowest index, until `need` units are kept or none is left. `select_units` finds it in one step or, of many units, in
two: `unit_score` leaves the best free score of each part of PART neighbouring units; the best `need` parts are opened,
and of their units the best `need` are kept. That is exact: a unit of an unopened part has `need` parts before it, each
with a unit that scores higher, or as high with a lower index. Each step reads a few thousand numbers at most, so that
every program that attends selects for itself, which costs less than handing one program's choice to the others.

A threshold is found by cutting the range of the scores, held in registers, into three until exactly `need` lie above
it or its ends are neighbouring numbers; 6 to 9 rounds on scores that differ. What is searched are keys: scores, but
-inf for sinks and recent units, which are kept anyway. Called by `unit_score` (coarse level) and
`sparse_attend`; `select_reference` is what it is judged by.

Scores are finite, or -inf for a unit that may not be kept; magnitudes lie between 1e-30 and 1e38, or are 0, so that no
half of a sum overflows and no difference is lost to flushed denormals; `clean_scores` sees to it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch

from vashista.kernels.triton_guard import jit, tl

MAX_UNITS = 32768
"""Units of one pair: 512k tokens by 16, 2M by 64; counts have 16 bits."""
ONE_STEP_UNITS = 4096
"""Up to so many are selected from in one step."""


def select_reference(scores: torch.Tensor, is_forced: torch.Tensor, num_units: int) -> torch.Tensor:
    """Indices kept of scores [n], ascending, int64, by a stable sort; is_forced: [n], kept whatever they score."""
    is_open = scores > -torch.inf
    forced = torch.nonzero(is_open & is_forced).flatten()
    free = torch.nonzero(is_open & ~is_forced).flatten()
    order = torch.sort(scores[free], descending=True, stable=True).indices
    best = free[order[: max(num_units - len(forced), 0)]]
    return torch.cat((forced, best)).sort().values


@jit()
def clean_scores(score):
    """NaN and +inf become 1e38 (such a unit is kept), -1e38 is the least, and what is below 1e-30 becomes 0."""
    score = tl.where(score != score, 1e38, score)  # noqa: PLR0124 - true of NaN alone
    score = tl.minimum(tl.maximum(score, -1e38), 1e38)
    return tl.where(tl.abs(score) < 1e-30, 0.0, score)


@jit()
def most_most(first, second, other_first, other_second):
    """Combines (maximum, maximum): two reductions for the time of one."""
    return tl.maximum(first, other_first), tl.maximum(second, other_second)


@jit()
def add_add(first, second, other_first, other_second):
    """Combines (sum, sum)."""
    return first + other_first, second + other_second


@jit()
def count_before(is_in, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """How many of `is_in` [BLOCK] stand before each element, int32.

    In rows of COLUMNS, one element a thread. A scan of the block at once adds the partial sums of all warps and all its
    rows one after the other (256 of them for 8192 scores and 16 warps, Triton 3.6); this way only one row's.
    """
    grid = tl.reshape(is_in.to(tl.int32), [BLOCK // COLUMNS, COLUMNS])
    inside = tl.cumsum(grid, 1) - grid
    rows = tl.sum(grid, 1)
    above = tl.cumsum(rows, 0) - rows
    return tl.reshape(inside + above[:, None], [BLOCK])


@jit()
def is_less(value, threshold):
    """1 where value < threshold, else 0: the sign of their difference, for the time of a third of a comparison."""
    return (value - threshold).to(tl.uint32, bitcast=True) >> 31


@jit()
def find_best(value, num_free, need, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of the `num_free` finite values [BLOCK] are the `need` best; 0 < need < num_free; the others are -inf."""
    value = value + 0.0  # no negative zero, whose sign would mislead
    top, low = tl.reduce((value, tl.where(value > float("-inf"), -value, float("-inf"))), 0, most_most)
    low = -low
    high = top + tl.maximum(tl.abs(top) * 1e-6, 1e-30)
    # at least `need` values are >= low, fewer are >= high; two counts a round, in one sum of 32 bits
    num_above = num_free
    middle = 0.5 * low + 0.5 * high
    while (middle > low) & (middle < high) & (num_above != need):
        third = 0.33333334 * low
        lower, upper = 2.0 * third + 0.33333334 * high, third + 0.6666667 * high
        lower = tl.where((lower > low) & (lower < high), lower, middle)
        upper = tl.maximum(tl.where((upper > low) & (upper < high), upper, middle), lower)
        below = tl.sum((is_less(value, lower) + (is_less(value, upper) << 16)).to(tl.int32), 0)
        above_lower, above_upper = BLOCK - (below & 0xFFFF), BLOCK - ((below >> 16) & 0xFFFF)
        has_lower, has_upper = above_lower >= need, above_upper >= need
        high = tl.where(has_upper, high, tl.where(has_lower, upper, lower))
        low = tl.where(has_upper, upper, tl.where(has_lower, lower, low))
        num_above = tl.where(has_upper, above_upper, tl.where(has_lower, above_lower, num_above))
        middle = 0.5 * low + 0.5 * high
    is_best = value >= low
    if num_above != need:
        is_above = value >= high
        is_tied = is_best & (value < high)
        num_tied = need - tl.sum(is_above.to(tl.int32), 0)
        is_best = is_above | (is_tied & (count_before(is_tied, BLOCK, COLUMNS) < num_tied))
    return is_best


@jit()
def choose_units(value, num_free, need, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """The `need` best [BLOCK] of `num_free` finite values, ties by the lowest index; all of them if that is fewer."""
    is_kept = (value > float("-inf")) & (need > 0)
    if (need > 0) & (need < num_free):
        is_kept = find_best(value, num_free, need, BLOCK, COLUMNS)
    return is_kept


@jit()
def count_forced(high, first_unit, num_sinks, num_recent, UNIT: tl.constexpr):
    """(sink units, first recent unit, units), counted from `first_unit`: visible ones, of contexts of `high` tokens.

    A unit is forced if it holds one of the first `num_sinks` tokens or of the last `num_recent`.
    """
    num_units = tl.cdiv(high, UNIT) - first_unit
    sinks = tl.minimum(tl.maximum(tl.cdiv(num_sinks, UNIT) - first_unit, 0), num_units)
    recent = tl.maximum(tl.maximum(high - num_recent, 0) // UNIT - first_unit, 0)
    return sinks, tl.minimum(recent, num_units), num_units


@jit()
def count_kept(high, first_unit, num_units, num_sinks, num_recent, UNIT: tl.constexpr):
    """How many of a context's units are kept when all are candidates and `num_units` are wanted."""
    sinks, recent, visible = count_forced(high, first_unit, num_sinks, num_recent, UNIT)
    return tl.minimum(tl.maximum(num_units, sinks + visible - tl.maximum(recent, sinks)), visible)


@jit()
def open_parts(
    peak_row, part_row, num_items, need, PARTS: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write the parts that may hold kept free units to `part_row`, ascending; (is_opened [PARTS], how many)."""
    part = tl.arange(0, PARTS)
    # past the first cache, which other programs' writes do not reach
    peak = tl.load(peak_row + part, mask=part * PART < num_items, other=float("-inf"), cache_modifier=".cg")
    num_free = tl.sum((peak > float("-inf")).to(tl.int32), 0)
    is_opened = choose_units(peak, num_free, need, PARTS, min(PARTS, COLUMNS))
    tl.store(part_row + count_before(is_opened, PARTS, min(PARTS, COLUMNS)), part, mask=is_opened)
    tl.debug_barrier()
    return is_opened, tl.minimum(need, num_free)


@jit()
def select_units(
    key_row, peak_row, part_row, list_row, units_row, num_listed, high, first_unit, num_units,
    num_sinks, num_recent, max_kept,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, FORCED: tl.constexpr, COLUMNS: tl.constexpr,
    UNIT: tl.constexpr, PER_COARSE: tl.constexpr,
):  # fmt: skip
    """Keep `num_units` of one pair's candidates and write them to `units_row`, ascending.

    Candidates are the `num_listed` coarse units of `list_row`, PER_COARSE units each, or all visible units when that is
    0. Sinks come before all others and recent units after them, so only those between, with finite keys, are searched.
    Returns (how many, and of the candidates looked at, [BLOCK]: item, key, is_kept; of parts, is_opened).
    Every program of a pair writes the same numbers to the same rows, and reads only what it wrote itself.
    """
    index = tl.arange(0, BLOCK)
    sinks, recent, num_items = count_forced(high, first_unit, num_sinks, num_recent, UNIT)
    recent = tl.maximum(recent, sinks)
    num_free = recent - sinks
    need = tl.maximum(num_units - (num_items - num_free), 0)
    last = num_items - recent
    is_opened = index >= 0
    item = index
    if PER_COARSE > 0:
        num_items = num_listed * PER_COARSE
        coarse = tl.load(list_row + index // PER_COARSE, mask=index < num_items, other=0, cache_modifier=".cg")
        unit = coarse * PER_COARSE + index % PER_COARSE
    elif PARTS > 0:
        is_opened, num_parts = open_parts(peak_row, part_row, num_items, need, PARTS, PART, COLUMNS)
        part = tl.load(part_row + index // PART, mask=index // PART < num_parts, other=0x3FFFFFF)
        item = part * PART + index % PART
        unit = first_unit + item
    else:
        unit = first_unit + index
    key = tl.load(key_row + item, mask=item < num_items, other=float("-inf"), cache_modifier=".cg")
    if (PER_COARSE > 0) | (PARTS > 0):
        num_free = tl.sum((key > float("-inf")).to(tl.int32), 0)
    is_kept = choose_units(key, num_free, need, BLOCK, COLUMNS)
    num_free = tl.minimum(need, num_free)
    rank = sinks + count_before(is_kept, BLOCK, COLUMNS)
    tl.store(units_row + rank, unit, mask=is_kept & (rank < max_kept))
    count = tl.minimum(sinks + num_free + last, max_kept)
    forced = tl.arange(0, FORCED)
    place = tl.where(forced < sinks, forced, forced + num_free)
    forced_unit = tl.where(forced < sinks, first_unit + forced, first_unit + recent + forced - sinks)
    tl.store(units_row + place, forced_unit, mask=(forced < sinks + last) & (place < max_kept))
    tl.debug_barrier()
    return count, item, key, is_kept, is_opened
