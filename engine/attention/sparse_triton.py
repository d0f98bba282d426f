"""Vashista attention on a GPU: generated tokens attend to a kept part of their context, prompts to all of it.

The store is that of `dense_triton`, with key summaries of 16 tokens beside it, which every step keeps up to date for
all requests, dense ones too: their pages may be shared with sparse ones. Where a step has sparse requests, all of its
requests with one query go through `sparse_decode` in one call, the dense ones with a budget that covers everything;
where it has none they go through `paged_decode`. Prompt chunks go through the variable-length kernel. The rule by which
groups are ranked is given: Vashista's own, or a peer's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from vashista.engine.attention.audit import audit_head
from vashista.engine.attention.interface import AttentionShape
from vashista.engine.attention.paged_gpu import PagedSpans, PagedStore, rows_of
from vashista.engine.attention.tally import sum_head_steps
from vashista.engine.errors import SettingsError
from vashista.engine.step import Span, StepInput, stack_budgets
from vashista.engine.support import Audit, SpanSupport
from vashista.kernels import key_summary as summary
from vashista.kernels.paged_decode import paged_decode
from vashista.kernels.paged_prefill import paged_prefill
from vashista.kernels.requirements import KernelInputError
from vashista.kernels.rope_write import rope_and_write
from vashista.kernels.selection import ScoreOptions
from vashista.kernels.sparse_decode import SparsePlan, make_plan, resize_plan, sparse_decode

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
    """[num_layers, num_spans, num_heads], float32: log of the kept mass."""
    mass: torch.Tensor
    """[num_layers, num_spans * num_kv_heads, 4], float32, as `Selection.mass`."""
    num_kept: torch.Tensor
    """[num_layers, num_spans * num_kv_heads], int32, groups; 0 where all was attended to."""
    audits: dict[int, list[Audit]]


class SparseTritonAttention:
    """See the module's text; satisfies `Attention`."""

    _store: PagedStore

    def __init__(self, name: str, rule: summary.Rule, shape: AttentionShape) -> None:
        """Raises SettingsError for shapes that the kernels do not serve."""
        self.name = name
        self.shape = shape
        self._rule = rule
        self._levels: list[summary.SummaryLevel] = []
        self._plans: dict[tuple[int, int, int], SparsePlan] = {}
        self._decoding: PagedSpans | None = None
        self._prompts: PagedSpans | None = None
        self._decoding_rows = self._prompt_rows = self._slots = torch.empty(0)
        self._cos = self._sin = torch.empty(0)
        self._sparse: SparseStep | None = None
        probe = torch.empty(0, shape.num_kv_heads, shape.page_size, shape.head_dim, dtype=shape.dtype)
        try:
            summary.make_level(probe, rule, GROUP_TOKENS)
            self._options = ScoreOptions(scale=shape.scale)
        except KernelInputError as error:
            raise SettingsError(f"attention is {name!r}: {error}; attention = dense takes all shapes.") from None

    def page_bytes(self) -> int:
        """Keys, values and summaries."""
        s = self.shape
        num_bytes: int = summary.unit_bytes(self._rule, s.head_dim) + summary.STEP_BYTES
        return s.page_bytes + s.num_layers * s.num_kv_heads * s.page_size // GROUP_TOKENS * num_bytes

    def allocate(self, num_pages: int) -> None:
        """Reserve the store."""
        self._store = PagedStore(self.shape, num_pages)
        self._levels = [summary.make_level(keys, self._rule, GROUP_TOKENS) for keys in self._store.keys]

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
        budgets = stack_budgets(spans, s.num_layers, s.num_kv_heads)
        chosen, most = [], GROUP_TOKENS
        for index, span in enumerate(spans):
            if span.selection is not None:
                chosen.append(index)
                limited = span.selection.budgets[span.selection.budgets < span.context_len]
                most = max(most, int(limited.max()) if limited.numel() else 0)
        size = (s.num_layers, len(spans))
        return SparseStep(
            spans=spans,
            chosen=chosen,
            budgets=budgets.to(s.device, non_blocking=True),
            plan=self._plan(len(spans), max(span.context_len for span in spans), most),
            lse=torch.empty(*size, s.num_heads, dtype=torch.float32, device=s.device),
            mass=torch.empty(s.num_layers, len(spans) * s.num_kv_heads, 4, dtype=torch.float32, device=s.device),
            num_kept=torch.empty(s.num_layers, len(spans) * s.num_kv_heads, dtype=torch.int32, device=s.device),
            audits={index: [] for index in chosen},
        )

    def _plan(self, num_spans: int, max_context: int, max_budget: int) -> SparsePlan:
        """A plan large enough, from those made before or new."""
        s = self.shape
        key = (num_spans, -(-max_context // PLAN_CONTEXT) * PLAN_CONTEXT, 1 << (max_budget - 1).bit_length())
        if key not in self._plans:
            while len(self._plans) >= MAX_PLANS:
                del self._plans[next(iter(self._plans))]
            q = torch.empty(num_spans, s.num_heads, s.head_dim, dtype=s.dtype, device=s.device)
            levels = (self._levels[0],)
            self._plans[key] = make_plan(
                q, self._store.keys[0], levels, self._options, max_context=key[1], max_budget=key[2]
            )
        return self._plans[key]

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `Attention.forward`."""
        s = self.shape
        q, k, v = qkv.split((s.num_heads, s.num_kv_heads, s.num_kv_heads), dim=1)
        keys, values, level = self._store.keys[layer], self._store.values[layer], self._levels[layer]
        q = rope_and_write(q, k, v, self._cos, self._sin, keys, values, self._slots)
        window = s.layer_windows[layer]
        if self._prompts is None:
            out = self._decode(layer, q)
        else:
            spans = self._prompts
            own = paged_prefill(
                q if self._decoding is None else q[self._prompt_rows], keys, values, spans.page_table,
                spans.query_starts, spans.context_lens, scale=s.scale, window=window, max_query_len=spans.max_queries,
            )  # fmt: skip
            summary.summarize(keys, spans.slots, level)
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
        keys, values, level = self._store.keys[layer], self._store.values[layer], self._levels[layer]
        window = s.layer_windows[layer]
        if step is None:
            summary.summarize(keys, spans.slots, level)
            return paged_decode(
                q, keys, values, spans.page_table, spans.context_lens,
                scale=s.scale, window=window, max_context=spans.max_context,
            )  # fmt: skip
        plan = step.plan if window is None else resize_plan(step.plan, ScoreOptions(scale=s.scale, window=window))
        out = sparse_decode(
            q, (keys, values), (level,), spans.page_table, spans.context_lens, step.budgets[layer], plan,
            lse=step.lse[layer], slots=spans.slots,
        )  # fmt: skip
        step.mass[layer].copy_(plan.fine.mass)
        step.num_kept[layer].copy_(plan.fine.num_kept)
        for index in step.chosen:
            step.audits[index] += self._audit(layer, index, q)
        return out

    def take_support(self) -> list[SpanSupport]:
        """See `Attention.take_support`; waits for the device."""
        step = self._sparse
        if step is None:
            return []
        s = self.shape
        size = (s.num_layers, len(step.spans), s.num_kv_heads, -1)
        lse, mass, num_kept = (
            x.cpu().numpy().reshape(size)[:, step.chosen] for x in (step.lse, step.mass, step.num_kept)
        )
        visible = s.visible_of([step.spans[index].context_len for index in step.chosen])
        tokens = np.where(num_kept[..., 0] == 0, visible[..., None], num_kept[..., 0] * GROUP_TOKENS)
        most = lse.max(-1, keepdims=True)  # scores are those of the group's best head
        estimate, top = mass[..., 1:2] - most + lse, mass[..., 2:3] - math.log(GROUP_TOKENS)
        return sum_head_steps(
            log_kept=lse,
            log_estimate=estimate,
            top_dropped=np.broadcast_to(top, lse.shape),
            log_bound=np.broadcast_to(mass[..., 3:4], lse.shape),
            num_kept=np.minimum(tokens, visible[..., None]),
            visible=visible,
            audits=list(step.audits.values()),
            has_estimate=self._rule is not summary.Rule.BOX,
        )

    def read_cache(self, layer: int, pages: list[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Attention.read_cache`."""
        return self._store.read(layer, pages, num_tokens)

    def _audit(self, layer: int, index: int, q: torch.Tensor) -> list[Audit]:
        """What this layer's audits of one request find, after its `sparse_decode`; waits for the device."""
        s, step = self.shape, self._sparse
        assert step is not None
        span = step.spans[index]
        assert span.selection is not None
        heads = span.selection.audited_heads(layer)
        if not heads:
            return []
        first = span.context_len - s.visible(layer, span.context_len)
        keys, _ = self.read_cache(layer, span.pages, span.context_len)
        grouped = q[index].view(s.num_kv_heads, -1, s.head_dim).float()
        audits = []
        for head in heads:
            pair = index * s.num_kv_heads + head
            kept = step.plan.fine.units[pair, : int(step.num_kept[layer, pair])].long()
            logits = grouped[head] @ keys[head, first:].float().T * s.scale
            audits.append(audit_head(layer, head, logits, first, kept, GROUP_TOKENS))
        return audits
