"""Key summaries: what stands for a unit of neighbouring keys (16 tokens, or more) when units are ranked.

For the n keys of a unit, by rule:
    mean           m_d = mean of k_d                                     (Vashista, arXiv 2602.13804)
    mean_variance  m_d, and v_d = mean of (k_d - m_d)^2                  (the second cumulant of the unit's logits)
    box            h_d = max of k_d, l_d = min of k_d                    (Quest, arXiv 2406.10774)
`unit_score` turns them into a logit for a query. A unit of one level lies inside one page, so that a summary lives and
dies with its page: shared with it, copied with it, written anew when its tokens are.

Stored as signed 8-bit codes with one float32 step a unit and plane: m_d ~ code * step, step = max |m_d| / 127, rounded
to the nearest, ties up; the box is rounded outwards, so that it stays a box. Variances take 3 bits of 4, spaced evenly
in their root: v_d ~ VARIANCES[code] * step, step = max v_d / 127, code 0 to 7 the nearest to 7 sqrt(v_d / max v_d).
Four bytes hold 4 dimensions of the first half and the same 4 of the second: nibble i of the low 16 bits is dimension 4
w + i of word w, of the high 16 bits head_dim / 2 + 4 w + i, so that one byte permutation of the GPU turns half a word
into 4 integers.

A third number makes a certain bound of every logit of the unit possible: radius >= max |k - m^|, with m^ the decoded
mean, rounded up, so that q.k <= q.m^ + |q| radius (Cauchy and Schwarz). A box needs none: it holds its keys.

Layout, a level: page by page; of each page the codes of the first plane [num_kv_heads, units_per_page, head_dim], then
of the second, then steps [num_kv_heads, units_per_page, 4] float32: of the first plane, of the second, radius, 0. While
a unit's 208 bytes lay side by side they straddled the caches' sectors, and scoring took an eighth longer (H100).
Bytes beside a unit's keys and values at head_dim 128 and 16 bits a number: 16 tokens 1/57 (mean), 1/39 (mean_variance),
1/30 (box); a level of 64 tokens adds a quarter of that.

`summarize` is called by the engine after `rope_and_write`, with the same slots. Each unit that a step's token falls
into is made anew from the cache, out of the unit's first token to its last one written: nothing is read beyond that,
and nothing of the old summary. Limits: those of `paged_decode`; head_dim a multiple of 16, from 32; units a power of
two from 16 to the page size. The caller vouches that slots lie inside the cache, that a request's tokens come in the
order of their positions, one after the other, and that all earlier tokens of their units are in the cache.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from vashista.kernels.pair_deal import has_pdl
from vashista.kernels.requirements import check_integers, check_tensor, require
from vashista.kernels.triton_guard import jit, next_power_of_two, require_triton, tl

GROUP_TOKENS = 16
"""Tokens of the finest unit: what is selected and attended to."""
MIN_SUMMARY_DIM = 64
MAX_UNIT_TOKENS = 128
STEP_BYTES = 16
VARIANCES = (0, 3, 10, 23, 41, 65, 93, 127)
"""What the codes of a variance mean, in steps: 127 (code / 7)^2."""


class Rule(IntEnum):
    """What a summary holds and how `unit_score` reads it."""

    MEAN = 0
    MEAN_VARIANCE = 1
    BOX = 2


@dataclass(frozen=True)
class SummaryLevel:
    """The summaries of all units of one size."""

    rule: Rule
    unit_tokens: int
    first: torch.Tensor
    """[num_pages, num_kv_heads, units_per_page, head_dim], uint8: codes of means, or of the box's upper edges."""
    second: torch.Tensor
    """[num_pages, num_kv_heads, units_per_page, bytes], uint8: of variances, of lower edges; none for MEAN."""
    steps: torch.Tensor
    """[num_pages, num_kv_heads, units_per_page, 4], float32: of the two planes, the radius, 0."""

    @property
    def planes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both planes' codes."""
        return self.first, self.second


def unit_bytes(rule: Rule, head_dim: int) -> int:
    """Bytes of one unit's codes, its steps (16 bytes) not counted."""
    return head_dim + {Rule.MEAN: 0, Rule.MEAN_VARIANCE: head_dim // 2, Rule.BOX: head_dim}[rule]


def make_level(k_cache: torch.Tensor, rule: Rule, unit_tokens: int) -> SummaryLevel:
    """An unwritten level for a cache of [num_pages, num_kv_heads, page_size, head_dim]."""
    num_pages, num_kv_heads, page_size, head_dim = k_cache.shape
    is_power = unit_tokens & (unit_tokens - 1) == 0
    most = min(page_size, MAX_UNIT_TOKENS)
    require(
        is_power and GROUP_TOKENS <= unit_tokens <= most,
        f"a unit of {unit_tokens} tokens was asked for; possible with pages of {page_size} are powers of two from"
        f" {GROUP_TOKENS} to {most}",
    )
    require(
        head_dim >= MIN_SUMMARY_DIM and head_dim % 16 == 0,
        f"head_dim is {head_dim}; summaries need a multiple of 16, at least {MIN_SUMMARY_DIM}",
    )
    num_units = page_size // unit_tokens
    sizes = (head_dim, unit_bytes(rule, head_dim) - head_dim, STEP_BYTES)
    shape = (num_pages, num_kv_heads * num_units * sum(sizes))
    records = torch.empty(shape, dtype=torch.uint8, device=k_cache.device)
    parts = records.split([num_kv_heads * num_units * size for size in sizes], 1)
    first, second = (
        part.unflatten(1, (num_kv_heads, num_units, size)) for part, size in zip(parts[:2], sizes[:2], strict=True)
    )
    steps = parts[2].view(torch.float32).unflatten(1, (num_kv_heads, num_units, STEP_BYTES // 4))
    return SummaryLevel(rule, unit_tokens, first, second, steps)


def check_level(level: SummaryLevel, k_cache: torch.Tensor) -> None:
    """Check that a level belongs to a cache of this shape."""
    num_pages, num_kv_heads, page_size, head_dim = k_cache.shape
    shape = (num_pages, num_kv_heads, page_size // level.unit_tokens)
    rest = unit_bytes(level.rule, head_dim) - head_dim
    at = level.first.data_ptr()
    record = shape[1] * shape[2] * (head_dim + rest + STEP_BYTES)
    for name, part, width, dtype in (
        ("first plane", level.first, head_dim, torch.uint8),
        ("second plane", level.second, rest, torch.uint8),
        ("steps", level.steps, STEP_BYTES // 4, torch.float32),
    ):
        check_tensor(f"the summary's {name}", part, (*shape, width), k_cache.device)
        check_integers(f"the summary's {name}", part, dtype)
        strides = (record // part.element_size(), shape[2] * width, width, 1)
        require(
            width == 0 or (part.stride() == strides and part.data_ptr() == at),
            f"the summary's {name} must be a part of the same records as the others, as `make_level` lays them out",
        )
        at += shape[1] * shape[2] * width * part.element_size()
    num_units = level.steps.numel() // 4
    require(num_units < 2**31, f"the level has {num_units} summaries; fewer than 2^31 are possible")


def summarize_reference(keys: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """One unit, exact: keys [n, head_dim] to the two planes (mean, variance or zero), or (max, min), float64."""
    keys = keys.double()
    if rule == Rule.BOX:
        return keys.amax(0), keys.amin(0)
    mean = keys.mean(0)
    return mean, (keys - mean).square().mean(0) if rule == Rule.MEAN_VARIANCE else torch.zeros_like(mean)


def decode_summaries(
    level: SummaryLevel, page_row: torch.Tensor, kv_head: int, num_units: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the stored codes of a request's first units say: planes [num_units, head_dim], float64, as the reference's.

    page_row: [max_pages] int32, the request's row of the page table.
    """
    pages = page_row[: -(-num_units // level.steps.shape[2])].long()
    low, high = (part[pages, kv_head].flatten(0, 1)[:num_units] for part in level.planes)
    steps = level.steps[pages, kv_head].flatten(0, 1)[:num_units].double()
    first = low.view(torch.int8).double() * steps[:, :1]
    if level.rule == Rule.MEAN_VARIANCE:
        half = high.shape[1]
        words = high.view(num_units, half // 4, 2, 2)
        nibbles = torch.stack((words & 15, words >> 4), dim=-1)  # [units, words, half, byte, nibble]
        nibbles = nibbles.transpose(1, 2).reshape(num_units, 2 * half)
        variance = torch.tensor(VARIANCES, dtype=torch.float64, device=high.device)[nibbles.long()]
        return first, variance * steps[:, 1:2]
    if level.rule == Rule.BOX:
        return first, high.view(torch.int8).double() * steps[:, 1:2]
    return first, torch.zeros_like(first)


@jit()
def locate_summary(
    page, head, unit, num_kv_heads,
    HEAD_DIM: tl.constexpr, PER_PAGE: tl.constexpr, UNIT_BYTES: tl.constexpr,
):  # fmt: skip
    """Offsets of a page's unit in its level: of the first plane's codes, of the second's, of the steps (in float32)."""
    units = num_kv_heads * PER_PAGE
    record = page.to(tl.int64) * (units * (UNIT_BYTES + 16))
    place = head * PER_PAGE + unit
    return (
        record + place * HEAD_DIM,
        record + units * HEAD_DIM + place * (UNIT_BYTES - HEAD_DIM),
        record // 4 + place * 4,
    )


@jit()
def store_signed(codes, offset, dim, values, is_dim, ROUNDING: tl.constexpr):
    """Store `values` [DIM] as codes of 8 bits; return (step, what they say). ROUNDING: 0 nearest, 1 up, -1 down."""
    step = tl.max(tl.where(is_dim, tl.abs(values), 0.0), 0) / 127.0
    # below the smallest normal numbers the reciprocal overflows: such keys are zero for any query
    inverse = tl.where(step > 1e-36, 1.0 / tl.maximum(step, 1e-36), 0.0)
    scaled = values * inverse
    if ROUNDING == 1:
        scaled = tl.ceil(scaled)
    elif ROUNDING == -1:
        scaled = tl.floor(scaled)
    else:
        scaled = tl.floor(scaled + 0.5)
    code = tl.minimum(tl.maximum(scaled, -127.0), 127.0).to(tl.int8)
    tl.store(codes + offset + dim, code.to(tl.uint8, bitcast=True), mask=is_dim)
    return step, code.to(tl.float32) * step


@jit()
def store_variance(codes, offset, variance, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Store variances [DIM], zero past HEAD_DIM, two a byte, in the order of the module's header; return their step."""
    HALF: tl.constexpr = HEAD_DIM // 2
    most = tl.max(variance, 0)
    inverse = tl.where(most > 1e-34, 49.0 / tl.maximum(most, 1e-34), 0.0)
    code = tl.minimum(tl.floor(tl.sqrt(variance * inverse) + 0.5), 7.0).to(tl.int32)
    nibble = tl.where(tl.arange(0, 2) == 0, 1, 16)
    packed = tl.sum(tl.reshape(code, [DIM // 2, 2]) * nibble[None, :], 1)
    dim = 2 * tl.arange(0, DIM // 2)
    half = dim // HALF
    place = dim % HALF // 4 * 4 + half * 2 + dim % HALF % 4 // 2
    tl.store(codes + offset + place, packed.to(tl.uint8), mask=dim < HEAD_DIM)
    return most / 127.0


@jit()
def summarize_unit(
    k_cache,
    codes,
    steps,
    page,
    head,
    offset,
    num_kv_heads,
    k_stride_page,
    k_stride_head,
    k_stride_token,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    RULE: tl.constexpr,
):
    """Write the summary of the unit that slot `offset` of a page lies in, of its tokens up to that slot."""
    unit = offset // UNIT
    count = offset % UNIT + 1
    token = tl.arange(0, UNIT)
    is_token = (token < count)[:, None]
    rows = k_cache + page * k_stride_page + head * k_stride_head + (unit * UNIT + token)[:, None] * k_stride_token
    dim = tl.arange(0, DIM)
    is_dim = dim < HEAD_DIM
    is_read = is_token & is_dim[None, :]
    key = tl.load(rows + dim[None, :], mask=is_read, other=0.0).to(tl.float32)
    to, to_second, to_steps = locate_summary(page, head, unit, num_kv_heads, HEAD_DIM, PAGE_SIZE // UNIT, UNIT_BYTES)
    steps += to_steps
    if RULE == 2:
        most = tl.max(tl.where(is_read, key, float("-inf")), 0)
        least = tl.min(tl.where(is_read, key, float("inf")), 0)
        first, _ = store_signed(codes, to, dim, tl.where(is_dim, most, 0.0), is_dim, 1)
        second, _ = store_signed(codes, to_second, dim, tl.where(is_dim, least, 0.0), is_dim, -1)
        radius = first * 0.0
    else:
        share = 1.0 / count.to(tl.float32)
        mean = tl.sum(key, 0) * share
        first, told = store_signed(codes, to, dim, mean, is_dim, 0)
        away = tl.where(is_read, key - told[None, :], 0.0)
        # up: 256 squares and their sum are off by less than 2e-5, and squares below 1e-38 are lost
        radius = tl.sqrt(tl.max(tl.sum(away * away, 1), 0)) * 1.00003 + 2e-18
        second = first * 0.0
        if RULE == 1:
            off = tl.where(is_read, key - mean[None, :], 0.0)
            second = store_variance(codes, to_second, tl.sum(off * off, 0) * share, HEAD_DIM, DIM)
    tl.store(steps, first)
    tl.store(steps + 1, second)
    tl.store(steps + 2, radius)
    tl.store(steps + 3, 0.0)


@jit()
def summarize_newest(
    program, num_pairs, slots, k_cache, codes, steps, coarse_codes, coarse_steps, num_kv_heads,
    k_stride_page, k_stride_head, k_stride_token,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, UNIT: tl.constexpr, COARSE: tl.constexpr,
    UNIT_BYTES: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Write what a decode step's token changes: program (level, pair); the second level has units of COARSE tokens.

    Of these units the scores that are made in the same step do not use the summary, so that nobody waits for it.
    """
    level, rest = program // num_pairs, program % num_pairs
    slot = tl.load(slots + rest // num_kv_heads)
    page, offset, kv_head = slot // PAGE_SIZE, slot % PAGE_SIZE, (rest % num_kv_heads).to(tl.int64)
    if slot >= 0:
        if level == 0:
            summarize_unit(
                k_cache, codes, steps, page, kv_head, offset, num_kv_heads, k_stride_page, k_stride_head,
                k_stride_token, HEAD_DIM, DIM, PAGE_SIZE, UNIT, UNIT_BYTES, RULE,
            )  # fmt: skip
        else:
            summarize_unit(
                k_cache, coarse_codes, coarse_steps, page, kv_head, offset, num_kv_heads, k_stride_page,
                k_stride_head, k_stride_token, HEAD_DIM, DIM, PAGE_SIZE, COARSE, UNIT_BYTES, RULE,
            )  # fmt: skip


@jit("num_tokens")
def _summarize_kernel(
    k_cache,
    slots,
    codes,
    steps,
    coarse_codes,
    coarse_steps,
    num_tokens,
    num_kv_heads,
    k_stride_page,
    k_stride_head,
    k_stride_token,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    COARSE: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    RULE: tl.constexpr,
    HAS_PDL: tl.constexpr,
):
    """Program (token, KV head, level): this token's unit, unless the next token falls into the same."""
    if HAS_PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    following = tl.load(slots + token + 1, mask=token + 1 < num_tokens, other=-1)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    if tl.program_id(2) == 0:
        if following // UNIT != slot // UNIT or following < 0:
            summarize_unit(
                k_cache, codes, steps, page, head, offset, num_kv_heads, k_stride_page, k_stride_head, k_stride_token,
                HEAD_DIM, DIM, PAGE_SIZE, UNIT, UNIT_BYTES, RULE,
            )  # fmt: skip
    elif following // COARSE != slot // COARSE or following < 0:
        summarize_unit(
            k_cache, coarse_codes, coarse_steps, page, head, offset, num_kv_heads,
            k_stride_page, k_stride_head, k_stride_token, HEAD_DIM, DIM, PAGE_SIZE, COARSE, UNIT_BYTES, RULE,
        )  # fmt: skip


def summarize_triton(
    k_cache: torch.Tensor, slots: torch.Tensor, fine: SummaryLevel, coarse: SummaryLevel | None = None
) -> None:
    """Check and launch."""
    require(k_cache.dim() == 4, f"k_cache has {k_cache.dim()} dimensions; it needs 4: pages, KV heads, page, head_dim")
    require(k_cache.stride(3) == 1, f"k_cache has stride {k_cache.stride(3)} in its last dimension; it must be 1")
    check_level(fine, k_cache)
    if coarse is not None:
        check_level(coarse, k_cache)
        require(coarse.rule == fine.rule, f"the coarse rule is {coarse.rule.name}, the fine one {fine.rule.name}")
    check_tensor("slots", slots, (None,), k_cache.device)
    check_integers("slots", slots, torch.int64)
    num_tokens = slots.shape[0]
    if num_tokens == 0:
        return
    _, num_kv_heads, page_size, head_dim = k_cache.shape
    second = coarse or fine
    pdl = has_pdl(k_cache.device)
    launch = {"launch_pdl": True} if pdl else {}
    with torch.cuda.device_of(k_cache):
        _summarize_kernel[(num_tokens, num_kv_heads, 2 if coarse else 1)](
            k_cache, slots, fine.first, fine.steps, second.first, second.steps,
            num_tokens, num_kv_heads, *k_cache.stride()[:3],
            HEAD_DIM=head_dim, DIM=next_power_of_two(head_dim), PAGE_SIZE=page_size, UNIT=fine.unit_tokens,
            COARSE=second.unit_tokens, UNIT_BYTES=unit_bytes(fine.rule, head_dim),
            RULE=int(fine.rule), HAS_PDL=pdl, num_warps=4, **launch,
        )  # fmt: skip


def summarize(
    k_cache: torch.Tensor, slots: torch.Tensor, fine: SummaryLevel, coarse: SummaryLevel | None = None
) -> None:
    """Write the summaries of all units that the step's tokens fall into; see the module's header.

    k_cache: [num_pages, num_kv_heads, page_size, head_dim]; slots: [num_tokens] int64, page * page_size + offset, or -1
    for a token that was not written. Never waits for the device.
    Raises KernelUnavailableError without Triton or a GPU of compute capability 8.0, KernelInputError for bad tensors.
    """
    require_triton("summarize", k_cache)
    summarize_triton(k_cache, slots, fine, coarse)
