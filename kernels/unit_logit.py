"""Logits of units for the queries of one group: integer products of 8-bit codes, made scores and bounds.

Formulas stand in `unit_score`, whose kernel calls `load_queries` and `split_queries` once a program, and `load_steps`
and `score_tile` for every tile of units; how codes are stored, in `key_summary`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from vashista.kernels.key_summary import locate_summary
from vashista.kernels.triton_guard import IS_INTERPRETED, jit, tl
from vashista.kernels.unit_select import clean_scores


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
def most_sum(most, total, other_most, other_total):
    """Combines (maximum, sum): two reductions for the time of one."""
    return tl.maximum(most, other_most), total + other_total


@jit()
def most_most(first, second, other_first, other_second):
    """Combines (maximum, maximum)."""
    return tl.maximum(first, other_first), tl.maximum(second, other_second)


@jit()
def split_rows(values, most, is_low):
    """(codes int8, weight of each row): rows `is_low` hold what the codes of the row before leave, 254 times finer.

    values: [ROWS, n] float32; most: [ROWS], their greatest magnitude. Together 16 bits: products with 8-bit codes are
    exact integers, on tensor cores, and their sum is off by at most 2^-16 of most times the sum of the codes.
    """
    step = tl.maximum(most, 1e-30) / 127.0
    scaled = values * (1.0 / step)[:, None]
    high = tl.floor(scaled + 0.5)
    low = tl.floor((scaled - high) * 254.0 + 0.5)
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
def load_steps(
    steps, page, unit, head, num_kv_heads,
    HEAD_DIM: tl.constexpr, PER_PAGE: tl.constexpr, UNIT_BYTES: tl.constexpr,
):  # fmt: skip
    """(step of the first plane, of the second, radius) of units, [TILE] float32 each; 0 where there is none."""
    _, _, place = locate_summary(page, head, unit % PER_PAGE, num_kv_heads, HEAD_DIM, PER_PAGE, UNIT_BYTES)
    at, is_there = steps + place, page >= 0
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
    unit, page, step, step_second, radius, codes, head, num_kv_heads, low, high, scale, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
    UNIT: tl.constexpr, PER_PAGE: tl.constexpr, UNIT_BYTES: tl.constexpr, RULE: tl.constexpr, IS_SUM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(scores, bounds) [TILE] of units, from what `split_queries` and `load_steps` returned; codes: the level's.

    page: [TILE], -1 where there is no unit.
    """
    HALF: tl.constexpr = DIM // 2
    is_there = page >= 0
    place, place_second, _ = locate_summary(
        page, head, unit % PER_PAGE, num_kv_heads, HEAD_DIM, PER_PAGE, UNIT_BYTES
    )  # fmt: skip
    at, at_second = codes + place, codes + place_second
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
        second = tl.load(at_second[:, None] + dim[None, :], mask=is_read, other=0).to(tl.int8, bitcast=True)
        under = join_columns(tl.dot(second, tl.trans(second_rows), out_dtype=tl.int32), second_weight, HEADS, TILE)
        logit += under * (step_second * scale)[:, None]
        above += under * (step_second * scale)[:, None]
    slope = 1.0
    if HAS_SOFTCAP:
        logit, slope = bend(logit, softcap)
        above, _ = bend(above, softcap)
    if RULE == 1:
        second, third = load_variances(at_second, is_there, HALF, TILE, HEAD_DIM)
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
def load_queries(q_row, is_row, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """(queries [ROWS, DIM], their first and second half [ROWS, DIM / 2]), float32; q_row: [ROWS] pointers."""
    dim, half = tl.arange(0, DIM), tl.arange(0, DIM // 2)
    query = tl.load(q_row[:, None] + dim[None, :], mask=is_row[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    is_half = is_row[:, None] & (half < HEAD_DIM // 2)[None, :]
    one = tl.load(q_row[:, None] + half[None, :], mask=is_half, other=0.0)
    two = tl.load(q_row[:, None] + half[None, :] + HEAD_DIM // 2, mask=is_half, other=0.0)
    return query.to(tl.float32), one.to(tl.float32), two.to(tl.float32)


@jit()
def split_queries(
    query, one, two, is_low, scale, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """What `score_tile` multiplies with: (first, weight, second, third, weight, norm, doubt), of `load_queries`.

    Rows are split: of queries; second and third, of scale^2 q_d^2 / 2 of both halves of the dimensions, or, for the
    box, of the negative part of the queries. norm [HEADS]: scale |q|, rounded up. doubt [HEADS]: times the sum of a
    unit's steps, more than all roundings of a logit: those of the codes of q (HEAD_DIM / 4) and of float32.
    """
    most, squares = tl.reduce((tl.abs(query), query * query), 1, most_sum)
    if RULE == 2:
        above, below = tl.maximum(query, 0.0), tl.minimum(query, 0.0)
        first, first_weight = split_rows(above, tl.max(above, 1), is_low)
        second, second_weight = split_rows(below, tl.max(-below, 1), is_low)
        third = second
    else:
        first, first_weight = split_rows(query, most, is_low)
        second, third, second_weight = first, first, first_weight
    if RULE == 1:
        one, two, largest = one * scale, two * scale, most * scale
        one, two, largest = 0.5 * one * one, 0.5 * two * two, 0.5 * largest * largest
        second, second_weight = split_rows(one, largest, is_low)
        third, second_weight = split_rows(two, largest, is_low)
    norm = tl.sqrt(squares) * (1.00003 * scale) + 2e-18 * scale
    norm, doubt = tl.reduce((tl.reshape(norm, [HEADS, 2]), tl.reshape(most, [HEADS, 2])), 1, most_most)
    doubt *= 0.0025 * HEAD_DIM * scale
    return first, first_weight, second, third, second_weight, norm, doubt
