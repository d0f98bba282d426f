"""What a selection leaves out, from what `unit_score` left of every unit: estimates and a bound that holds for certain.

For one (request, KV head), in nats: log of the mass estimated in kept units (but the newest token's) and in dropped
ones, the largest score dropped, and a bound: no query head of the group leaves more than exp(bound) of mass out. The
score of a unit stands for the whole query group (see `unit_score`), and so does its bound, log n + max over heads of
f(scale (q.m^ + |q| radius)) (m^, radius: see `key_summary`), with every rounding counted in. The bound is the log of
the sum of the dropped units' bounds; where it is far above the estimate it certifies nothing, which is usual.

Called by one program a pair, in `unit_score` for the coarse level and in `sparse_attend` for the fine one, whose
numbers contain the coarse level's.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from vashista.kernels.triton_guard import jit, tl
from vashista.kernels.unit_select import count_forced

MASSES = 4
BOUND_SLACK = 2e-3
"""Nats: more than float32 sums of exponentials of some thousand numbers can be off."""


@jit()
def log_of(total, shift):
    """shift + log(total), -inf for nothing."""
    return tl.where(total > 0.0, shift + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))


@jit()
def shift_of(peak):
    """What to subtract before an exponential: the peak, 0 for nothing."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@jit()
def log_sum(values, AXIS: tl.constexpr):
    """log of the sum of exp(values) over an axis, -inf for nothing."""
    shift = shift_of(tl.max(values, AXIS))
    return log_of(tl.sum(tl.exp(values - tl.expand_dims(shift, AXIS)), AXIS), shift)


@jit()
def log_total(values):
    """The same over all of [n]."""
    shift = shift_of(tl.max(values, 0))
    return log_of(tl.sum(tl.exp(values - shift), 0), shift)


@jit()
def most_three(one, two, three, other_one, other_two, other_three):
    """Combines three maxima: three reductions for the time of one."""
    return tl.maximum(one, other_one), tl.maximum(two, other_two), tl.maximum(three, other_three)


@jit()
def add_three(one, two, three, other_one, other_two, other_three):
    """Combines three sums."""
    return one + other_one, two + other_two, three + other_three


@jit()
def log_totals(one, two, three):
    """(log of the sum of exp(one), the same of two, the greatest of two, the log-sum of three), all of [n]."""
    most_one, most_two, most_of_three = tl.reduce((one, two, three), 0, most_three)
    shift_one, shift_two, shift_three = shift_of(most_one), shift_of(most_two), shift_of(most_of_three)
    sum_one, sum_two, sum_three = tl.reduce(
        (tl.exp(one - shift_one), tl.exp(two - shift_two), tl.exp(three - shift_three)), 0, add_three
    )
    return log_of(sum_one, shift_one), log_of(sum_two, shift_two), most_two, log_of(sum_three, shift_three)


@jit()
def log_add(one, other):
    """log(exp(one) + exp(other)), of scalars."""
    shift = shift_of(tl.maximum(one, other))
    return log_of(tl.exp(one - shift) + tl.exp(other - shift), shift)


@jit()
def weigh_units(
    mass_row, coarse_mass_row, score_row, bound_row, peak_row, sum_row, bound_sum_row,
    item, key, is_kept, is_opened, high, first_unit, num_sinks, num_recent, num_listed,
    PARTS: tl.constexpr, PART: tl.constexpr, FORCED: tl.constexpr, UNIT: tl.constexpr, PER_COARSE: tl.constexpr,
    SLACK: tl.constexpr,
):  # fmt: skip
    """Write the four numbers of a pair; arguments from `item` to `is_opened`: what `select_units` returned."""
    closed = float("-inf")
    is_dropped = (key > closed) & (is_kept == 0)
    bound = tl.load(bound_row + item, mask=is_dropped, other=closed, cache_modifier=".cg")
    key_dropped = tl.where(is_dropped, key, closed)
    # sinks are the first candidates, recent units the last; the newest one's score is not known
    sinks, recent, num_units = count_forced(high, first_unit, num_sinks, num_recent, UNIT)
    recent = tl.maximum(recent, sinks)
    forced = tl.arange(0, FORCED)
    place = tl.where(forced < sinks, forced, recent + forced - sinks)
    is_known = (forced < sinks + num_units - recent) & ((first_unit + place + 1) * UNIT < high)
    if PER_COARSE > 0:
        first_listed = first_unit // PER_COARSE * PER_COARSE - first_unit
        last_listed = tl.cdiv(first_unit + num_units, PER_COARSE) * PER_COARSE - first_unit
        place = tl.where(forced < sinks, place - first_listed, place - last_listed + num_listed * PER_COARSE)
    forced_score = tl.load(score_row + place, mask=is_known, other=closed, cache_modifier=".cg")
    sums, bound_sums, left_peaks = key, key, key
    if PARTS > 0:
        part = tl.arange(0, PARTS)
        is_left = (part * PART < num_units) & (is_opened == 0)
        sums = tl.load(sum_row + part, mask=is_left, other=closed, cache_modifier=".cg")
        bound_sums = tl.load(bound_sum_row + part, mask=is_left, other=closed, cache_modifier=".cg")
        left_peaks = tl.load(peak_row + part, mask=is_left, other=closed, cache_modifier=".cg")
    kept, dropped, most, bound = log_totals(tl.where(is_kept, key, closed), key_dropped, bound)
    kept = log_add(kept, log_total(forced_score))
    if PARTS > 0:
        sums, _, left, bound_sums = log_totals(sums, left_peaks, bound_sums)
        dropped, bound = log_add(dropped, sums), log_add(bound, bound_sums)
        most = tl.maximum(most, left)
    bound = bound + SLACK + 1e-6 * tl.abs(shift_of(bound))
    if PER_COARSE > 0:
        dropped = log_add(dropped, tl.load(coarse_mass_row + 1, cache_modifier=".cg"))
        most = tl.maximum(most, tl.load(coarse_mass_row + 2, cache_modifier=".cg"))
        bound = log_add(bound, tl.load(coarse_mass_row + 3, cache_modifier=".cg"))
    tl.store(mass_row, kept)
    tl.store(mass_row + 1, dropped)
    tl.store(mass_row + 2, most)
    tl.store(mass_row + 3, tl.where(dropped == float("-inf"), float("-inf"), bound))
