"""Sparse paged decode: rank the groups of each (request, KV head) by their summaries, keep a budget, attend to those.

The door to `unit_score` (scores, one launch a level) and `sparse_attend` (select, gather, attend, merge, one launch),
and to `cuda.cluster`, which does the same for few pairs, in one launch or behind that of the scores.
Called by the engine's attention module once a layer, after `rope_and_write`; prompts' summaries are written by
`summarize`, a decode step's by the call itself where it is given the slots. Formulas stand in those
files; what is guaranteed:
- sinks and the recent window are always kept; then the best groups by score, exactly, ties by the lowest index, until
  the pair holds budget // 16 groups;
- with a coarse level, groups compete only inside the best coarse units (and those of sinks and recent tokens), as many
  as `num_candidates` or the pair's own budget says; a context of no more units than that, or of at most `full_context`
  tokens, is ranked in full;
- without levels sinks and the newest groups are kept, for comparison; nothing is then known of what is dropped;
- a pair whose budget covers its visible context is attended to whole; if all pairs are so, the output is bit-identical
  to `paged_decode`;
- nothing waits for the device: budgets, lengths and pages are read there, so one CUDA graph serves all their values.

Layout: that of `paged_decode`, and budgets [num_requests, num_kv_heads] int32, tokens. A `SparsePlan` holds scratch and
results, for a fixed number of requests and greatest context; it may be shared by all layers of one stream. The caller
vouches that budgets below the visible context are at most the plan's max_budget, contexts at most its max_context, and
that lengths, budgets and the page table are not written by the kernel just before, whose end the first launch overlaps.

Measured by `python bench/attention/run.py --levels 1,2`, H100 80GB, torch 2.11, triton 3.6, 2026-11: 32 heads, 8 KV
heads, head_dim 128, bfloat16, page 64, 2048 tokens kept, mean_variance, CUDA graph over layers, cold L2; microseconds a
layer, everything included; dense is FlashInfer 0.6.13 in the same run.
    batch x context     1 x 32k   1 x 128k  1 x 512k  8 x 32k   8 x 128k  32 x 32k  32 x 128k
    dense               55.0      187.0     710.2     360.7     1404.7    1398.8    5560.6
    one level           17.1      23.6      61.5      53.2      94.4      154.0     295.7
    two levels          21.6      23.4      33.8      55.6      67.1      140.8     184.9
    the same by Triton's kernels alone
    one level           21.1      29.0      54.8
    two levels          25.1      28.3      38.4
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from vashista.kernels import paged_decode as dense
from vashista.kernels.cuda.cluster import ClusterShape, attend_clusters, choose_shape
from vashista.kernels.key_summary import GROUP_TOKENS, SummaryLevel, check_level
from vashista.kernels.paged_reference import gather_tokens
from vashista.kernels.requirements import (
    check_cache,
    check_heads,
    check_integers,
    check_options,
    check_out,
    check_tensor,
    check_whole,
    require,
)
from vashista.kernels.selection import ScoreOptions, Selection, make_selection
from vashista.kernels.sparse_attend import RunScratch, attend_groups, attend_reference, make_run_scratch
from vashista.kernels.triton_guard import require_triton
from vashista.kernels.unit_score import MAX_GROUP, score_reference, score_units
from vashista.kernels.unit_select import select_reference


@dataclass(frozen=True)
class SparsePlan:
    """Sizes, scratch and results of `sparse_decode` for one shape of batch."""

    options: ScoreOptions
    max_context: int
    max_budget: int
    is_ranked: bool
    """Whether there are levels."""
    fine: Selection
    """What was kept, after a call: groups of 16 tokens."""
    coarse: Selection | None
    num_candidates: int
    """Coarse units kept for the fine level, at most; 0 without a coarse level."""
    candidates_per_kept: int
    """Of a pair as many as hold so many times its budget; 0: num_candidates."""
    full_context: int
    """Tokens of contexts whose units are all kept."""
    has_dense: bool
    """Whether a pair's budget may cover its visible context."""
    runs: RunScratch

    @property
    def limits(self) -> tuple[int, int, int]:
        """How many coarse units are kept, as `score_units` takes it."""
        return self.num_candidates, self.candidates_per_kept, self.full_context


def make_plan(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    levels: tuple[SummaryLevel, ...],
    options: ScoreOptions,
    *,
    max_context: int,
    max_budget: int,
    max_candidate_tokens: int | None = None,
    candidates_per_kept: int = 0,
    full_context: int = 0,
    has_dense: bool = True,
) -> SparsePlan:
    """A plan for queries of q's shape and dtype; levels: (fine,), (fine, coarse), or () to rank nothing.

    max_candidate_tokens: with a coarse level, how many tokens the fine one ranks (4 * max_budget when None);
    candidates_per_kept: of each pair no more than so many times its budget, whatever others keep (0: no such limit);
    full_context: the fine level ranks all tokens of contexts no longer than this; has_dense: False where the caller
    vouches that every pair's budget is below its visible context (or that empty), which saves a launch where clusters
    attend; a pair of which that is not true gets NaN there.
    Raises KernelInputError for numbers that do not fit together.
    """
    check_heads("q", q)
    require(len(levels) <= 2, f"{len(levels)} levels were given; possible are 0, 1 (fine) and 2 (fine, coarse)")
    for level in levels[:1]:
        require(level.unit_tokens == GROUP_TOKENS, f"the fine level has units of {level.unit_tokens} tokens, not 16")
    require(max_budget >= GROUP_TOKENS, f"max_budget is {max_budget} tokens; it must be at least {GROUP_TOKENS}")
    require(max_context > 0, f"max_context is {max_context}; it must be positive")
    check_options(options.scale, options.window, options.softcap)
    visible = max_context if options.window is None else min(max_context, options.window)
    num_kv_heads = k_cache.shape[1]
    num_pairs = q.shape[0] * num_kv_heads

    def count(tokens: int, unit: int) -> int:
        """Units that `tokens` neighbouring tokens may touch."""
        return min(-(-tokens // unit) + 1, -(-max_context // unit))

    def forced(unit: int) -> int:
        return -(-options.num_sinks // unit) + -(-options.num_recent // unit) + 1

    coarse, num_candidates, candidates = None, 0, count(visible, GROUP_TOKENS)
    if len(levels) == 2:
        unit = levels[1].unit_tokens
        wanted = 4 * max_budget if max_candidate_tokens is None else max_candidate_tokens
        require(
            unit > GROUP_TOKENS, f"the coarse level has units of {unit} tokens; it must have more than {GROUP_TOKENS}"
        )
        require(wanted >= max_budget, f"{wanted} candidate tokens cannot hold a budget of {max_budget}")
        num_units = count(visible, unit)
        num_candidates = min(-(-wanted // unit), num_units)
        max_kept = min(max(num_candidates, forced(unit), -(-full_context // unit)), num_units)
        coarse = make_selection(num_pairs, num_units, max_kept, q.device, max_forced=forced(unit))
        candidates = max_kept * (unit // GROUP_TOKENS)
    else:
        is_plain = max_candidate_tokens is None and candidates_per_kept == full_context == 0
        require(is_plain, "candidates were limited, but there is no coarse level")
    max_kept = min(max(max_budget // GROUP_TOKENS, forced(GROUP_TOKENS)), candidates)
    tile = dense.choose_decode_tile(q, q.shape[1] // num_kv_heads)
    return SparsePlan(
        options=options,
        max_context=max_context,
        max_budget=max_budget,
        is_ranked=bool(levels),
        fine=make_selection(
            num_pairs,
            candidates if levels else max_kept,
            max_kept,
            q.device,
            max_forced=forced(GROUP_TOKENS),
            is_listed=coarse is not None,
        ),
        coarse=coarse,
        num_candidates=num_candidates,
        candidates_per_kept=candidates_per_kept,
        full_context=full_context,
        has_dense=has_dense,
        runs=make_run_scratch(q, num_kv_heads, max_context, tile),
    )


def sparse_decode_reference(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    levels: tuple[SummaryLevel, ...],
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    budgets: torch.Tensor,
    plan: SparsePlan,
) -> tuple[torch.Tensor, torch.Tensor, list[list[int] | None]]:
    """The same in float64: (out, lse [num_requests, num_heads], kept groups of each pair, None where it is dense)."""
    options = plan.options
    num_heads = q.shape[1]
    group = num_heads // budgets.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64, device=q.device)
    kept: list[list[int] | None] = []
    for request, length in enumerate(context_lens.tolist()):
        row = page_table[request]
        keys, values = (gather_tokens(cache, row, length) for cache in caches)
        low = 0 if options.window is None else max(length - options.window, 0)
        for head in range(budgets.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            budget = int(budgets[request, head])
            if length == 0 or budget >= length - low:
                kept.append(None)
                positions = torch.arange(low, length, device=q.device)
            else:
                groups = keep_reference(q[request, heads], levels, row, head, length, budget, plan)
                kept.append(groups.tolist())
                positions = (groups[:, None] * GROUP_TOKENS + torch.arange(GROUP_TOKENS, device=q.device)).flatten()
                positions = positions[(positions >= low) & (positions < length)]
            if length > 0:
                out[request, heads], lse[request, heads] = attend_reference(
                    q[request, heads], keys[head], values[head], positions, options
                )
    return out, lse, kept


def keep_reference(
    q: torch.Tensor,
    levels: tuple[SummaryLevel, ...],
    page_row: torch.Tensor,
    kv_head: int,
    length: int,
    budget: int,
    plan: SparsePlan,
) -> torch.Tensor:
    """Groups kept of one pair, ascending, int64; q: [group, head_dim]."""
    options = plan.options
    if not levels:
        index = torch.arange(-(-length // GROUP_TOKENS), device=q.device)
        ends = (index + 1) * GROUP_TOKENS
        is_forced = (index * GROUP_TOKENS < options.num_sinks) | (ends > length - options.num_recent)
        scores = index.double().masked_fill(ends <= length - (options.window or length), -math.inf)
        return select_reference(scores, is_forced, budget // GROUP_TOKENS)
    allowed: torch.Tensor | None = None
    for level in reversed(levels):
        unit = level.unit_tokens
        scores = score_reference(q, level, page_row, kv_head, length, options)
        index = torch.arange(len(scores), device=q.device)
        if allowed is not None:
            ratio = levels[1].unit_tokens // unit
            scores = scores.masked_fill(~torch.isin(index // ratio, allowed), -math.inf)
        is_forced = (index * unit < options.num_sinks) | ((index + 1) * unit > length - options.num_recent)
        num_units = count_candidates(plan, unit, length, budget) if unit > GROUP_TOKENS else budget // GROUP_TOKENS
        allowed = select_reference(scores, is_forced, num_units)
    assert allowed is not None
    return allowed


def check_group(group: int) -> None:
    """KernelInputError for a query group of more heads than the scores are made for."""
    require(group <= MAX_GROUP, f"the query group has {group} heads; sparse decode takes at most {MAX_GROUP}")


def count_candidates(plan: SparsePlan, unit: int, length: int, budget: int) -> int:
    """Coarse units kept of a pair with this budget, in a context of `length` tokens."""
    if length <= plan.full_context:
        return -(-length // unit)
    if not plan.candidates_per_kept:
        return plan.num_candidates
    return min(-(-budget * plan.candidates_per_kept // unit), plan.num_candidates)


def _check(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    levels: tuple[SummaryLevel, ...],
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    budgets: torch.Tensor,
    plan: SparsePlan,
) -> None:
    check_heads("q", q)
    check_cache(*caches, q)
    for level in levels:
        check_level(level, caches[0])
    require(
        bool(levels) == plan.is_ranked and (len(levels) == 2 or plan.coarse is None),
        f"{len(levels)} levels were given; the plan was made for {plan.is_ranked + (plan.coarse is not None)}",
    )
    check_tensor("page_table", page_table, (q.shape[0], None), q.device)
    check_integers("page_table", page_table, torch.int32)
    check_tensor("context_lens", context_lens, (q.shape[0],), q.device)
    check_integers("context_lens", context_lens, torch.int32)
    check_tensor("budgets", budgets, (q.shape[0], caches[0].shape[1]), q.device)
    check_integers("budgets", budgets, torch.int32)
    require(budgets.is_contiguous(), "budgets must be contiguous")
    check_group(q.shape[1] // caches[0].shape[1])
    num_pairs = plan.fine.num_kept.shape[0]
    require(
        num_pairs == budgets.numel(),
        f"the plan was made for {num_pairs} pairs of request and KV head, not {budgets.numel()}",
    )


def sparse_decode(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    levels: tuple[SummaryLevel, ...],
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    budgets: torch.Tensor,
    plan: SparsePlan,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query token a request, to at most its budget of tokens; see the module's header.

    q: [num_requests, num_heads, head_dim]; caches: (keys, values); levels: (), (fine,) or (fine, coarse), as the plan
    was made for, or with a coarse level that it does not rank by and that is only written; out: like q, made when None,
    returned; lse: [num_requests, num_heads] float32, filled with the log of the kept set's softmax denominator when
    given. slots: [num_requests] int64, where `rope_and_write` wrote each request's token (-1: nowhere); given, its
    summaries are written too, as `summarize` would, which then need not be called. After the call `plan.fine` holds
    what was kept and the masses estimated.
    Raises KernelUnavailableError without Triton or a GPU of compute capability 8.0, KernelInputError for bad tensors.
    """
    require_triton("sparse_decode", q)
    _check(q, caches, levels, page_table, context_lens, budgets, plan)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check_out(out, q)
    if lse is not None:
        check_tensor("lse", lse, (q.shape[0], q.shape[1]), q.device)
        check_integers("lse", lse, torch.float32)
    if slots is not None:
        check_tensor("slots", slots, (q.shape[0],), q.device)
        check_integers("slots", slots, torch.int64)
        require(bool(levels), "slots were given, but there are no levels whose summaries could be written")
    if q.shape[0] == 0:
        return out
    inputs = (page_table, context_lens, budgets, plan.options)
    clusters = choose_clusters(q, caches, levels, plan)
    upkeep: Upkeep | None = None
    if clusters is not None and not plan.has_dense and slots is not None:
        upkeep = (caches[0], levels, slots)
    score_levels(q, levels, inputs, plan, upkeep, clusters)
    attend_kept(q, caches, levels, inputs, plan, clusters, out, lse, slots)
    return out


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, ScoreOptions]
"""page_table, context_lens, budgets, options."""
Upkeep = tuple[torch.Tensor, tuple[SummaryLevel, ...], torch.Tensor]
"""Keys, levels and slots of the step's tokens."""


def choose_clusters(
    q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], levels: tuple[SummaryLevel, ...], plan: SparsePlan
) -> ClusterShape | None:
    """The clusters that attend to sparse pairs, or None; see `cuda.cluster`."""
    if not levels:
        return None
    return choose_shape(q, caches, plan.options, levels, plan.fine, plan.coarse)


def score_levels(
    q: torch.Tensor,
    levels: tuple[SummaryLevel, ...],
    inputs: Inputs,
    plan: SparsePlan,
    upkeep: Upkeep | None,
    clusters: ClusterShape | None,
) -> None:
    """Launch what scores before `attend_kept`: each level, or of two the coarse one alone where clusters attend, which
    score the groups below it themselves, or nothing where they score all. upkeep: see `score_units`.
    """
    if clusters is not None and clusters.is_scored:
        return
    has_parts = clusters is None
    if plan.coarse is None:
        if levels:
            score_units(q, levels[0], *inputs, plan.fine, upkeep=upkeep, has_parts=has_parts)
        return
    score_units(q, levels[1], *inputs, plan.coarse, upkeep=upkeep, has_parts=has_parts)
    if clusters is None:
        score_units(q, levels[0], *inputs, plan.fine, coarse=(levels[1], plan.coarse, plan.limits))


def attend_kept(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    levels: tuple[SummaryLevel, ...],
    inputs: Inputs,
    plan: SparsePlan,
    clusters: ClusterShape | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> None:
    """Launch what selects, attends and merges: clusters for sparse pairs, the rest by `attend_groups`."""
    if clusters is not None:
        is_alone = not plan.has_dense
        coarse = None if plan.coarse is None else (plan.coarse, plan.limits)
        attend_clusters(
            clusters, q, caches, *inputs, levels, plan.fine, coarse, out, lse,
            slots=slots if is_alone and clusters.is_scored else None, is_alone=is_alone,
        )  # fmt: skip
        if is_alone:
            return
    kept = (plan.fine, plan.coarse)
    attend_groups(
        q, caches, *inputs, kept, plan.runs, out, lse, levels, slots, has_clusters=clusters is not None
    )  # fmt: skip


def resize_plan(plan: SparsePlan, options: ScoreOptions) -> SparsePlan:
    """The same plan for a layer with other options, sharing the scratch.

    Raises KernelInputError for a window longer than the plan's, or more sinks or recent tokens.
    """
    before, after = plan.options.window, options.window
    is_narrower = before is None or (after is not None and after <= before)
    require(is_narrower, f"the plan was made for a window of {before}, which does not hold one of {after}")
    made = (plan.options.num_sinks, plan.options.num_recent)
    require(
        options.num_sinks <= made[0] and options.num_recent <= made[1],
        f"{options.num_sinks} sinks and {options.num_recent} recent tokens were asked for; the plan was made for at"
        f" most {made[0]} and {made[1]}",
    )
    # what is below the whole context may cover a window
    return replace(plan, options=options, has_dense=plan.has_dense or after != before)


def redirect_plan(
    plan: SparsePlan, num_kept: torch.Tensor, mass: torch.Tensor, units: torch.Tensor | None = None
) -> SparsePlan:
    """The same plan, whose results go to these tensors: a layer's part of what all layers leave; shapes: `Selection`.

    units: None for where the plan has them. Raises KernelInputError for tensors of other shapes.
    """
    for name, tensor, own in (
        ("num_kept", num_kept, plan.fine.num_kept),
        ("mass", mass, plan.fine.mass),
        ("units", units, plan.fine.units),
    ):
        if tensor is not None:
            check_whole(name, tensor, tuple(own.shape), own.device, own.dtype)
    fine = replace(plan.fine, num_kept=num_kept, mass=mass, units=plan.fine.units if units is None else units)
    return replace(plan, fine=fine)
