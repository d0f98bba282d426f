"""Vashista attention on a GPU: generated tokens attend to a kept part of their context, prompts to all of it.

The store is that of `dense_triton`, with key summaries of 16 tokens beside it, and of 64 for long contexts (`coarse`),
which every step keeps up to date for all requests, dense ones too: their pages may be shared with sparse ones. Where a
step has sparse requests, all of its requests with one query go through `sparse_decode` in one call, the dense ones with
a budget that covers everything; where it has none they go through `paged_decode`. Prompt chunks go through the
variable-length kernel. The rule by which groups are ranked is given: Vashista's own, a peer's, or none: then sinks and
the newest groups are kept, and there are no summaries.

Steps of single queries, or of chunks of prompts, can be captured (`Capturable`): the dense ones share a graph by
their number of rows, those with sparse requests by what `PlanKey` says. Audits look, after the layers, at the queries
and kept groups that each layer has left.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch

from vashista.engine.attention import coarse
from vashista.engine.attention.audit import audit_head
from vashista.engine.attention.interface import AttentionShape
from vashista.engine.attention.paged_gpu import FixedPrompts, FixedSpans, PagedSpans, PagedStore, rows_of
from vashista.engine.attention.plan_key import PlanKey, most_kept, skips_dense
from vashista.engine.errors import SettingsError
from vashista.engine.step import EVERYTHING, Span, StepInput, stack_budgets
from vashista.engine.support import Audit, SpanSupport
from vashista.kernels import key_summary as summary
from vashista.kernels.paged_decode import paged_decode
from vashista.kernels.paged_prefill import paged_prefill
from vashista.kernels.requirements import KernelInputError
from vashista.kernels.rope_write import rope_and_write
from vashista.kernels.selection import ScoreOptions
from vashista.kernels.sparse_decode import SparsePlan, check_group, make_plan, redirect_plan, resize_plan, sparse_decode
from vashista.kernels.support_sums import NUM_SUMS, report_size, sum_support

GROUP_TOKENS = summary.GROUP_TOKENS
PLAN_CONTEXT = 16384
"""Plans are made for contexts that are multiples of this, so that one lives for many steps."""
MAX_PLANS = 8


@dataclass(slots=True)
class SparseStep:
    """The decoding requests of a step in which some are sparse; what the layers report of them."""

    spans: list[Span]
    chosen: list[int]
    """Which of the spans have a selection."""
    budgets: torch.Tensor
    """[num_layers, num_spans, num_kv_heads], int32."""
    plan: SparsePlan
    lse: torch.Tensor
    """[num_layers, num_rows, num_heads], float32: log of the kept mass."""
    mass: torch.Tensor
    """[num_layers, num_rows * num_kv_heads, 4], float32, as `Selection.mass`."""
    num_kept: torch.Tensor
    """[num_layers, num_rows * num_kv_heads], int32, groups; 0 where all was attended to."""
    queries: torch.Tensor
    """[num_layers, num_rows, num_heads, head_dim], rotated; no rows in a step without audits."""
    units: torch.Tensor
    """[num_layers, num_rows * num_kv_heads, most groups kept], int32; likewise."""
    report: torch.Tensor
    """[num_rows, columns], float64: what `sum_support` makes of all layers, behind the last."""

    @property
    def is_audited(self) -> bool:
        """Whether queries and units are kept."""
        return self.units.shape[1] > 0


@dataclass(slots=True)
class FixedStep:
    """What a captured step works on."""

    spans: FixedSpans
    sparse: SparseStep | None
    host_budgets: torch.Tensor
    """[num_layers, num_rows, num_kv_heads], int32, on the CPU."""
    filled: list[torch.Tensor | None] = field(default_factory=list)
    """The selections' own tensors that it was filled from; None for a dense span."""


class SparseTritonAttention:
    """See the module's text; satisfies `Attention`."""

    _store: PagedStore

    def __init__(self, name: str, rule: summary.Rule | None, shape: AttentionShape) -> None:
        """Raises SettingsError for shapes that the kernels do not serve."""
        self.name = name
        self.shape = shape
        self._rule = rule
        units = [] if rule is None else [GROUP_TOKENS, coarse.coarse_tokens(shape.page_size)]
        self._unit_tokens = [unit for unit in units if unit is not None]
        self._levels: list[tuple[summary.SummaryLevel, ...]] = []
        self._windows = torch.empty(0)
        self._plans: dict[PlanKey, SparsePlan] = {}
        self._decoding: PagedSpans | None = None
        self._prompts: PagedSpans | None = None
        self._decoding_rows = self._prompt_rows = self._slots = torch.empty(0)
        self._cos = self._sin = torch.empty(0)
        self._sparse: SparseStep | None = None
        probe = torch.empty(0, shape.num_kv_heads, shape.page_size, shape.head_dim, dtype=shape.dtype)
        try:
            for unit in self._unit_tokens or [GROUP_TOKENS]:
                summary.make_level(probe, summary.Rule.MEAN if rule is None else rule, unit)
            self._options = ScoreOptions(scale=shape.scale)
            check_group(shape.num_heads // shape.num_kv_heads)
        except KernelInputError as error:
            raise SettingsError(f"attention is {name!r}: {error}; attention = dense takes all shapes.") from None
        longest = coarse.longest_context(shape.page_size)
        if rule is not None and shape.max_context is not None and shape.max_context > longest:
            raise SettingsError(
                f"attention is {name!r} and max_context {shape.max_context}: with pages of {shape.page_size} tokens it"
                f" ranks contexts of at most {longest}. Lower max_context, or take attention = dense, or a page_size"
                f" that is a multiple of 64, with which {coarse.longest_context(64)} are possible."
            )

    def page_bytes(self) -> int:
        """Keys, values and summaries."""
        s = self.shape
        if self._rule is None:
            return s.page_bytes
        num_bytes: int = summary.unit_bytes(self._rule, s.head_dim) + summary.STEP_BYTES
        num_units = sum(s.page_size // unit for unit in self._unit_tokens)
        return s.page_bytes + s.num_layers * s.num_kv_heads * num_units * num_bytes

    def allocate(self, num_pages: int) -> None:
        """Reserve the store."""
        s = self.shape
        self._store = PagedStore(s, num_pages)
        self._windows = torch.tensor([window or 0 for window in s.layer_windows], dtype=torch.int32, device=s.device)
        if self._rule is None:
            self._levels = [()] * s.num_layers
            return
        self._levels = [
            tuple(summary.make_level(keys, self._rule, unit) for unit in self._unit_tokens) for keys in self._store.keys
        ]

    def begin(self, step: StepInput, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Part the step's requests between the kernels, and put what they need on the device."""
        s = self.shape
        decoding = [span for span in step.spans if span.num_queries == 1]
        prompts = [span for span in step.spans if span.num_queries > 1]
        self._decoding = PagedSpans.of(decoding, s) if decoding else None
        self._prompts = PagedSpans.of(prompts, s) if prompts else None
        self._slots = torch.empty(step.token_ids.shape[0], dtype=torch.int64, device=s.device)
        if self._decoding is not None:
            self._decoding_rows = rows_of(decoding, s.device)
            self._slots[self._decoding_rows] = self._decoding.slots
        if self._prompts is not None:
            self._prompt_rows = rows_of(prompts, s.device)
            self._slots[self._prompt_rows] = self._prompts.slots
        self._cos, self._sin = cos, sin
        is_sparse = any(span.selection is not None for span in decoding)
        self._sparse = self._begin_sparse(decoding) if is_sparse else None

    def _begin_sparse(self, spans: list[Span]) -> SparseStep:
        s = self.shape
        key = self._plan_key(spans, len(spans), -(-_longest(spans) // PLAN_CONTEXT) * PLAN_CONTEXT)
        if key not in self._plans:
            while len(self._plans) >= MAX_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = self._make_plan(key)
        budgets = self._stack_budgets(spans).to(s.device, non_blocking=True)
        is_audited = any(span.selection is not None and span.selection.audits for span in spans)
        return self._make_step(spans, self._plans[key], budgets, is_audited=is_audited)

    def _plan_key(self, spans: list[Span], num_rows: int, max_context: int) -> PlanKey:
        """max_context: at least that of all spans."""
        has_two_levels = len(self._unit_tokens) == 2 and max_context > coarse.COARSE_CONTEXT
        is_mixed = has_two_levels and any(spans[i].context_len <= coarse.COARSE_CONTEXT for i in _chosen(spans))
        most, has_dense = most_kept(spans)
        is_told = self._rule is not None and skips_dense(num_rows * self.shape.num_kv_heads, self.shape.device)
        return PlanKey(num_rows, max_context, most, is_mixed, has_dense or not is_told)

    def _make_plan(self, key: PlanKey) -> SparsePlan:
        s = self.shape
        q = torch.empty(key.num_rows, s.num_heads, s.head_dim, dtype=s.dtype, device=s.device)
        candidates = None
        if self._rule is not None:
            candidates = coarse.candidate_tokens(s.page_size, key.max_context, key.max_budget)
        return make_plan(
            q, self._store.keys[0], self._levels[0] if candidates else self._levels[0][:1], self._options,
            max_context=key.max_context, max_budget=key.max_budget, max_candidate_tokens=candidates,
            candidates_per_kept=coarse.CANDIDATES_PER_KEPT if candidates else 0,
            full_context=coarse.COARSE_CONTEXT if candidates and key.is_mixed else 0,
            has_dense=key.has_dense,
        )  # fmt: skip

    def _stack_budgets(self, spans: list[Span]) -> torch.Tensor:
        """As `step.stack_budgets`; heads that keep more than can be ranked attend to everything, and count as such."""
        budgets = stack_budgets(spans, self.shape.num_layers, self.shape.num_kv_heads)
        return budgets.masked_fill(budgets > coarse.MAX_CANDIDATES, EVERYTHING)  # a copy: they may be the request's own

    def _make_step(self, spans: list[Span], plan: SparsePlan, budgets: torch.Tensor, *, is_audited: bool) -> SparseStep:
        """Room for what the layers report. budgets: [num_layers, num_rows, num_kv_heads]."""
        s = self.shape
        num_layers, num_rows, num_kv_heads = budgets.shape
        num_pairs, audited = num_rows * num_kv_heads, num_rows if is_audited else 0

        def room(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(num_layers, *size, dtype=dtype, device=s.device)

        return SparseStep(
            spans=spans,
            chosen=_chosen(spans),
            budgets=budgets,
            plan=plan,
            lse=room(num_rows, s.num_heads),
            mass=room(num_pairs, 4),
            num_kept=room(num_pairs, dtype=torch.int32),
            queries=room(audited, s.num_heads, s.head_dim, dtype=s.dtype),
            units=room(audited * num_kv_heads, plan.fine.units.shape[1], dtype=torch.int32),
            report=torch.empty(num_rows, report_size(num_layers, num_kv_heads), dtype=torch.float64, device=s.device),
        )

    def graph_key(self, spans: list[Span], num_rows: int) -> Hashable:
        """See `Capturable`."""
        if not _chosen(spans):
            return PlanKey(num_rows, 0, 0, is_mixed=False, has_dense=True)
        return self._plan_key(spans, num_rows, max(PLAN_CONTEXT, 1 << (_longest(spans) - 1).bit_length()))

    def fix(self, key: Hashable, num_rows: int) -> object:
        """See `Capturable`."""
        s = self.shape
        assert isinstance(key, PlanKey)
        budgets = torch.full((s.num_layers, num_rows, s.num_kv_heads), EVERYTHING, dtype=torch.int32)
        if not key.max_context:
            return FixedStep(FixedSpans(s, num_rows, self._store.keys[0].shape[0] * s.page_size), None, budgets)
        sparse = self._make_step([], self._make_plan(key), budgets.to(s.device), is_audited=True)
        if s.device.type == "cuda":
            budgets = budgets.pin_memory()
        return FixedStep(FixedSpans(s, num_rows, key.max_context), sparse, budgets)

    def fix_prompts(self, num_tokens: int, num_spans: int) -> object:
        """See `Capturable`."""
        max_context = self._store.keys[0].shape[0] * self.shape.page_size
        return FixedPrompts(self.shape, num_tokens, num_spans, max_context)

    def use(self, fixed: object, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """See `Capturable`."""
        if isinstance(fixed, FixedPrompts):
            self._decoding, self._prompts, self._sparse = None, fixed.spans, None
            self._slots = fixed.spans.slots
        else:
            assert isinstance(fixed, FixedStep)
            self._decoding, self._prompts, self._sparse = fixed.spans.spans, None, fixed.sparse
            self._slots = fixed.spans.spans.slots
        self._cos, self._sin = cos, sin

    def fill(self, fixed: object, spans: list[Span]) -> None:
        """See `Capturable`."""
        if isinstance(fixed, FixedPrompts):
            fixed.fill(spans)
            self._sparse = None
            return
        assert isinstance(fixed, FixedStep)
        self._sparse = fixed.sparse
        if fixed.sparse is not None:
            fixed.sparse.spans, fixed.sparse.chosen = spans, _chosen(spans)
            self._fill_budgets(fixed, fixed.sparse)
        fixed.spans.fill(spans)

    def _fill_budgets(self, fixed: FixedStep, step: SparseStep) -> None:
        """Where they are others than in the step before."""
        wanted = [None if span.selection is None else span.selection.budgets for span in step.spans]
        before = fixed.filled
        if len(wanted) == len(before) and all(one is other for one, other in zip(wanted, before, strict=True)):
            return
        fixed.filled = []
        fixed.spans.wait()
        fixed.host_budgets.fill_(EVERYTHING)
        fixed.host_budgets[:, : len(wanted)] = self._stack_budgets(step.spans)
        step.budgets.copy_(fixed.host_budgets, non_blocking=True)
        fixed.filled = wanted

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `Attention.forward`."""
        s = self.shape
        q, k, v = qkv.split((s.num_heads, s.num_kv_heads, s.num_kv_heads), dim=1)
        keys, values, levels = self._store.keys[layer], self._store.values[layer], self._levels[layer]
        step = self._sparse
        rotated = None if step is None or not step.is_audited or self._prompts is not None else step.queries[layer]
        q = rope_and_write(q, k, v, self._cos, self._sin, keys, values, self._slots, rotated)
        window = s.layer_windows[layer]
        if self._prompts is None:
            out = self._decode(layer, q)
        else:
            spans = self._prompts
            own = paged_prefill(
                q if self._decoding is None else q[self._prompt_rows], keys, values, spans.page_table,
                spans.query_starts, spans.context_lens, scale=s.scale, window=window, max_query_len=spans.max_queries,
            )  # fmt: skip
            if levels:
                summary.summarize(keys, spans.slots, *levels)
            out = own
            if self._decoding is not None:
                out = torch.empty_like(q)
                out[self._prompt_rows] = own
                out[self._decoding_rows] = self._decode(layer, q[self._decoding_rows])
        return out.reshape(qkv.shape[0], s.num_heads * s.head_dim)

    def _decode(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Requests with one query. q: [num_spans, num_heads, head_dim], rotated -> the same."""
        s, spans, step = self.shape, self._decoding, self._sparse
        assert spans is not None
        keys, values, levels = self._store.keys[layer], self._store.values[layer], self._levels[layer]
        window = s.layer_windows[layer]
        if step is None:
            if levels:
                summary.summarize(keys, spans.slots, *levels)
            return paged_decode(
                q, keys, values, spans.page_table, spans.context_lens,
                scale=s.scale, window=window, max_context=spans.max_context,
            )  # fmt: skip
        plan = step.plan if window is None else resize_plan(step.plan, ScoreOptions(scale=s.scale, window=window))
        units = step.units[layer] if step.is_audited else None
        out = sparse_decode(
            q, (keys, values), levels, spans.page_table, spans.context_lens, step.budgets[layer],
            redirect_plan(plan, step.num_kept[layer], step.mass[layer], units),
            lse=step.lse[layer], slots=spans.slots if levels else None,
        )  # fmt: skip
        if step.is_audited and self._prompts is not None:
            step.queries[layer].copy_(q)
        if layer == s.num_layers - 1:
            sum_support(
                step.lse, step.mass, step.num_kept, spans.context_lens, self._windows, step.report,
                has_estimate=self._rule not in {None, summary.Rule.BOX},
            )  # fmt: skip
        return out

    def take_support(self) -> list[SpanSupport]:
        """See `Attention.take_support`; waits for the device."""
        step = self._sparse
        if step is None:
            return []
        s = self.shape
        report = step.report.cpu()  # waits
        estimates = report[:, NUM_SUMS:].view(-1, s.num_layers, s.num_kv_heads).numpy()
        sums = report[:, :NUM_SUMS].tolist()
        found = []
        for index in step.chosen:
            num_dense, attended, visible, bound, estimate, gap = sums[index]
            numbers = int(num_dense), int(attended), int(visible), bound, estimate, gap
            found.append(SpanSupport(*numbers, self._audit(step, index), estimates[index]))
        return found

    def read_cache(self, layer: int, pages: list[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Attention.read_cache`."""
        return self._store.read(layer, pages, num_tokens)

    def _audit(self, step: SparseStep, index: int) -> list[Audit]:
        """What the audits of one request find; waits for the device."""
        s, span = self.shape, step.spans[index]
        assert span.selection is not None
        audits = []
        for layer in sorted({layer for layer, _ in span.selection.audits}):
            first = span.context_len - s.visible(layer, span.context_len)
            keys, _ = self.read_cache(layer, span.pages, span.context_len)
            grouped = step.queries[layer, index].view(s.num_kv_heads, -1, s.head_dim).float()
            for head in span.selection.audited_heads(layer):
                pair = index * s.num_kv_heads + head
                kept = step.units[layer, pair, : int(step.num_kept[layer, pair])].long()
                if not len(kept):  # of a budget that is too large to be ranked: all was attended to
                    kept = torch.arange(-(-span.context_len // GROUP_TOKENS), device=kept.device)
                logits = grouped[head] @ keys[head, first:].float().T * s.scale
                audits.append(audit_head(layer, head, logits, first, kept, GROUP_TOKENS))
        return audits


def _chosen(spans: list[Span]) -> list[int]:
    """Which spans have a selection."""
    return [index for index, span in enumerate(spans) if span.selection is not None]


def _longest(spans: list[Span]) -> int:
    return max(span.context_len for span in spans)
