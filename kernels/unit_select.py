"""Exact selection of the best units of one (request, KV head), inside a program.

The kept set is the one that sorting the scores gives: all sinks and recent units, then the highest scores, ties by the
lowest index, until `need` units are kept or none is left. `select_units` finds it in one step or, of many units, in
two: `unit_score` leaves the best free score of each part of PART neighbouring units; the best `need` parts (or a few
more) are opened, and of their units the best `need` are kept. That is exact: a unit of an unopened part has `need`
parts before it, each with a unit that scores higher, or as high with a lower index. Each step reads a few thousand
numbers at most, so that every program that attends selects for itself, which costs less than handing one program's
choice to the others; a launch of its own, with 1024 threads a pair and all in one step, took twice as long (H100).

What is searched (see `unit_search`) are keys: scores, but -inf for sinks and recent units, which are kept anyway.
Called by `unit_score` (coarse level) and `sparse_attend`; `select_reference` is what it is judged by.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch

from vashista.kernels.triton_guard import jit, tl
from vashista.kernels.unit_search import choose_units, count_before

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
    peak_row, part_row, num_items, need, room, PARTS: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write the parts that may hold kept free units to `part_row`, ascending; (is_opened [PARTS], how many).

    The `need` best, or a few more, up to `room`, if that is found earlier.
    """
    part = tl.arange(0, PARTS)
    # past the first cache, which other programs' writes do not reach
    peak = tl.load(peak_row + part, mask=part * PART < num_items, other=float("-inf"), cache_modifier=".cg")
    is_opened, num_parts = choose_units(peak, need, tl.maximum(need, room), PARTS, min(PARTS, COLUMNS))
    tl.store(part_row + count_before(is_opened, PARTS, min(PARTS, COLUMNS)), part, mask=is_opened)
    tl.debug_barrier()
    return is_opened, num_parts


@jit()
def locate_candidates(
    index, part_row, list_row, count, first_unit,
    PARTS: tl.constexpr, PART: tl.constexpr, PER_COARSE: tl.constexpr,
):  # fmt: skip
    """(item, unit) of candidates by their place `index` [n] among those to look at one by one; count: see `list_units`.

    Places past the last have items that no row of keys holds.
    """
    if PER_COARSE > 0:
        item = index
        coarse = tl.load(list_row + index // PER_COARSE, mask=index < count, other=0, cache_modifier=".cg")
        unit = coarse * PER_COARSE + index % PER_COARSE
    elif PARTS > 0:
        part = tl.load(part_row + index // PART, mask=index < count, other=0x3FFFFFF)
        item = part * PART + index % PART
        unit = first_unit + item
    else:
        item = index
        unit = first_unit + index
    return item, unit


@jit()
def load_keys(key_row, item, num_items):
    """Keys [n] of items, -inf past the last; whole fours are read, which a row has room for (see `make_selection`)."""
    key = tl.load(key_row + item, mask=item < (num_items + 3) // 4 * 4, other=float("-inf"), cache_modifier=".cg")
    return tl.where(item < num_items, key + 0.0, float("-inf"))  # no negative zero, whose sign would mislead


@jit()
def list_units(
    peak_row, part_row, num_listed, high, first_unit, num_units, num_sinks, num_recent, max_kept,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    PER_COARSE: tl.constexpr,
):  # fmt: skip
    """Of one pair: (candidates, those to look at one by one, free units to keep, parts opened [PARTS]).

    Candidates are `num_listed` coarse units of PER_COARSE units each, or all visible units when that is 0. Sinks come
    before all others and recent units after them, so only those between, with finite keys, are searched.
    """
    sinks, recent, num_items = count_forced(high, first_unit, num_sinks, num_recent, UNIT)
    recent = tl.maximum(recent, sinks)
    need = tl.maximum(num_units - (num_items - (recent - sinks)), 0)
    is_opened = tl.arange(0, BLOCK) >= 0
    if PER_COARSE > 0:
        num_items = num_listed * PER_COARSE
    count = num_items
    if PARTS > 0:
        is_opened, num_parts = open_parts(peak_row, part_row, num_items, need, max_kept, PARTS, PART, COLUMNS)
        count = num_parts * PART
    return num_items, count, need, is_opened


@jit()
def keep_units(
    units_row, unit, is_kept, num_free, high, first_unit, num_sinks, num_recent, max_kept,
    BLOCK: tl.constexpr, FORCED: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Write the `num_free` free units kept, and sinks and recent ones, to `units_row`, ascending; how many.

    Every program of a pair writes the same numbers to the same rows, and reads only what it wrote itself.
    """
    sinks, recent, num_items = count_forced(high, first_unit, num_sinks, num_recent, UNIT)
    recent = tl.maximum(recent, sinks)
    last = num_items - recent
    rank = sinks + count_before(is_kept, BLOCK, COLUMNS)
    tl.store(units_row + rank, unit, mask=is_kept & (rank < max_kept))
    count = tl.minimum(sinks + num_free + last, max_kept)
    forced = tl.arange(0, FORCED)
    place = tl.where(forced < sinks, forced, forced + num_free)
    forced_unit = tl.where(forced < sinks, first_unit + forced, first_unit + recent + forced - sinks)
    tl.store(units_row + place, forced_unit, mask=(forced < sinks + last) & (place < max_kept))
    tl.debug_barrier()
    return count


@jit()
def keep_newest(
    units_row, high, first_unit, num_units, num_sinks, num_recent, max_kept, COLUMNS: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Write sinks and the newest units, `num_units` in all or more if so many are forced, to `units_row`; how many.

    Written and read as in `keep_units`.
    """
    sinks, _, num_items = count_forced(high, first_unit, num_sinks, num_recent, UNIT)
    count = tl.minimum(count_kept(high, first_unit, num_units, num_sinks, num_recent, UNIT), max_kept)
    for begin in range(0, count, COLUMNS):
        rank = begin + tl.arange(0, COLUMNS)
        unit = first_unit + tl.where(rank < sinks, rank, num_items - count + rank)
        tl.store(units_row + rank, unit, mask=rank < count)
    tl.debug_barrier()
    return count


@jit()
def select_units(
    key_row, peak_row, part_row, units_row, high, first_unit, num_units, num_sinks, num_recent, max_kept,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, FORCED: tl.constexpr, COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Keep `num_units` of all visible units of one pair and write them to `units_row`, ascending.

    Returns (how many, and of the candidates looked at, [BLOCK]: item, key, is_kept; of parts, is_opened).
    """
    num_items, count, need, is_opened = list_units(
        peak_row, part_row, 0, high, first_unit, num_units, num_sinks, num_recent, max_kept,
        BLOCK, PARTS, PART, COLUMNS, UNIT, 0,
    )  # fmt: skip
    item, unit = locate_candidates(tl.arange(0, BLOCK), part_row, units_row, count, first_unit, PARTS, PART, 0)
    key = load_keys(key_row, item, num_items)
    is_kept, num_free = choose_units(key, need, need, BLOCK, COLUMNS)
    count = keep_units(
        units_row, unit, is_kept, num_free, high, first_unit, num_sinks, num_recent, max_kept,
        BLOCK, FORCED, COLUMNS, UNIT,
    )  # fmt: skip
    return count, item, key, is_kept, is_opened
