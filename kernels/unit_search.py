"""The best of many numbers in a program's registers: a threshold, then ties by the lowest index.

The threshold is found by four guesses a round, until exactly as many as wanted lie above it or the ends of its range
are neighbouring numbers: the first where a normal distribution has it, the next where an even one between the ends has
it, later ones that cut the floats between the ends into fifths; 3 to 5 rounds on scores that differ, 18 at most. Called
by `unit_select` and, in two parts, by `sparse_attend`.

Values are finite, or -inf for one that may not be chosen; magnitudes lie between 1e-30 and 1e38, or are 0, so that no
half of a sum overflows and no difference is lost to flushed denormals; `unit_select.clean_scores` sees to it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from vashista.kernels.triton_guard import IS_INTERPRETED, jit, tl


@jit()
def add_add(first, second, other_first, other_second):
    """Combines (sum, sum): two reductions for the time of one."""
    return first + other_first, second + other_second


@jit()
def join_spans(top, least, count, total, squares, top_2, least_2, count_2, total_2, squares_2):
    """Combines (maximum, maximum, sum, sum, sum)."""
    return tl.maximum(top, top_2), tl.maximum(least, least_2), count + count_2, total + total_2, squares + squares_2


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
def count_below(value, one, other):
    """For each value, whether it is less than `one`, plus 2^16 times whether it is less than `other`; int32.

    On a GPU by the signs of differences, for the time of a third of two comparisons.
    """
    if IS_INTERPRETED:
        return (value < one).to(tl.int32) + ((value < other).to(tl.int32) << 16)
    else:  # noqa: RET505 - Triton compiles one branch alone only when both are written
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 a, b;
            .reg .b32 c, d;
            sub.f32 a, $1, $2;
            sub.f32 b, $1, $3;
            mov.b32 c, a;
            mov.b32 d, b;
            prmt.b32 c, c, d, 0x7632;
            and.b32 c, c, 0x80008000;
            shr.u32 $0, c, 15;
            }""",
            "=r,r,r,r",
            [value, one, other],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@jit()
def is_open(low, high, num_low, need):
    """Whether a search must go on: the ends leave a number between them, and not `need` values are >= low."""
    middle = 0.5 * low + 0.5 * high
    return (middle > low) & (middle < high) & (num_low != need)


@jit()
def try_four(value, low, high, num_low, num_high, need, first, second, third, fourth, BLOCK: tl.constexpr):
    """(low, high, values >= low, values >= high) after four ascending guesses, of which those outside do no harm."""
    second = tl.where((second > low) & (second < high), second, 0.5 * low + 0.5 * high)
    first = tl.maximum(tl.minimum(first, second), low)
    third = tl.minimum(tl.maximum(third, second), high)
    fourth = tl.minimum(tl.maximum(fourth, third), high)
    below, below_2 = tl.reduce((count_below(value, first, second), count_below(value, third, fourth)), 0, add_add)
    at_1, at_2 = BLOCK - (below & 0xFFFF), BLOCK - ((below >> 16) & 0xFFFF)
    at_3, at_4 = BLOCK - (below_2 & 0xFFFF), BLOCK - ((below_2 >> 16) & 0xFFFF)
    is_1, is_2, is_3, is_4 = at_1 >= need, at_2 >= need, at_3 >= need, at_4 >= need
    new_low = tl.where(is_4, fourth, tl.where(is_3, third, tl.where(is_2, second, tl.where(is_1, first, low))))
    num_low = tl.where(is_4, at_4, tl.where(is_3, at_3, tl.where(is_2, at_2, tl.where(is_1, at_1, num_low))))
    new_high = tl.where(is_4, high, tl.where(is_3, fourth, tl.where(is_2, third, tl.where(is_1, second, first))))
    num_high = tl.where(is_4, num_high, tl.where(is_3, at_4, tl.where(is_2, at_3, tl.where(is_1, at_2, at_1))))
    return new_low, new_high, num_low, num_high


@jit()
def number_of(value):
    """A float's place in the order of all, int64."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@jit()
def value_of(number):
    """The inverse of `number_of`."""
    bits = number.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit()
def narrow_search(value, low, high, num_low, num_high, need, turn, guess, deviation, BLOCK: tl.constexpr):
    """One round: first guesses around `guess`, then around where the threshold lies if values are evenly spread; after
    some rounds, those that cut the floats between the ends into fifths, so that 18 rounds end every search.
    """
    root = tl.rsqrt(tl.maximum(num_low - num_high, 1).to(tl.float32))
    share = (need - num_high).to(tl.float32) * root * root
    reach = tl.minimum(0.9 * root, 0.5)
    width = high - low
    first = high - width * tl.minimum(share + reach, 0.98)
    second = high - width * tl.minimum(tl.maximum(share + 0.33333334 * reach, 0.02), 0.98)
    third = high - width * tl.minimum(tl.maximum(share - 0.33333334 * reach, 0.02), 0.98)
    fourth = high - width * tl.maximum(share - reach, 0.02)
    if turn == 0:
        first, second = guess - 0.3 * deviation, guess - 0.1 * deviation
        third, fourth = guess + 0.1 * deviation, guess + 0.3 * deviation
    if turn >= 4:
        start = number_of(low)
        fifth = (number_of(high) - start) // 5
        first, second = value_of(start + fifth), value_of(start + 2 * fifth)
        third, fourth = value_of(start + 3 * fifth), value_of(start + 4 * fifth)
    return try_four(value, low, high, num_low, num_high, need, first, second, third, fourth, BLOCK)


@jit()
def begin_search(value, need):
    """(low, high, finite values, guess, deviation): where the `need` best [n] are searched, and what to try first.

    That is the quantile of a normal distribution of this mean and deviation (Abramowitz and Stegun 26.2.22).
    """
    is_free = value > float("-inf")
    shown = tl.where(is_free, tl.minimum(tl.maximum(value, -1e15), 1e15), 0.0)
    # A product that is rounded once: fused with the reduction's first addition, threads would get different sums,
    # and so different guesses.
    square = tl.fma(shown, shown, 0.0)
    top, least, num_free, total, squares = tl.reduce(
        (value, tl.where(is_free, -value, float("-inf")), is_free.to(tl.int32), shown, square), 0, join_spans
    )
    count = tl.maximum(num_free, 1).to(tl.float32)
    top = tl.where(num_free > 0, top, 0.0)
    share = tl.minimum(tl.maximum(need.to(tl.float32) / count, 1e-6), 1.0 - 1e-6)
    mean = total / count
    deviation = tl.sqrt(tl.maximum(squares / count - mean * mean, 0.0))
    tail = tl.sqrt(-2.0 * tl.log(tl.minimum(share, 1.0 - share)))
    quantile = tail - (2.30753 + 0.27061 * tail) / (1.0 + tail * (0.99229 + tail * 0.04481))
    guess = mean + tl.where(share < 0.5, quantile, -quantile) * deviation
    return -least, top + tl.maximum(tl.abs(top) * 1e-6, 1e-30), num_free, guess, deviation


@jit()
def search_on(
    value, low, high, num_low, num_high, need, room, begin, end, guess, deviation, BLOCK: tl.constexpr,
):  # fmt: skip
    """The ends and counts after rounds begin .. end, or fewer if no more than `room` (>= need) values are >= low."""
    turn = begin
    while (turn < end) & (num_low > room) & is_open(low, high, num_low, need):
        low, high, num_low, num_high = narrow_search(
            value, low, high, num_low, num_high, need, turn, guess, deviation, BLOCK
        )
        turn += 1
    return low, high, num_low, num_high


@jit()
def pick_found(
    value, low, high, num_low, num_high, num_free, need, room, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Which values [BLOCK] a search that ended found, ties by the lowest index; all finite ones if they are fewer."""
    is_best = (value > float("-inf")) & (need > 0)
    if (need > 0) & (need < num_free):
        is_best = value >= low
        if num_low > room:
            is_above = value >= high
            is_tied = is_best & (value < high)
            num_tied = need - num_high
            is_best = is_above | (is_tied & (count_before(is_tied, BLOCK, COLUMNS) < num_tied))
            num_low = need
    else:
        num_low = tl.minimum(need, num_free)
    return is_best, num_low


@jit()
def choose_units(value, need, room, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """(the `need` best [BLOCK] of the finite values, how many they are): ties by the lowest index.

    Up to `room` (>= need) may be chosen where that ends the search earlier: then no value outside is as high as any.
    """
    value = value + 0.0  # no negative zero, whose sign would mislead
    low, high, num_free, guess, deviation = begin_search(value, need)
    last = tl.where((need > 0) & (need < num_free), 99, 0)
    low, high, num_low, num_high = search_on(
        value, low, high, num_free, num_free * 0, need, room, 0, last, guess, deviation, BLOCK
    )
    return pick_found(value, low, high, num_low, num_high, num_free, need, room, BLOCK, COLUMNS)
