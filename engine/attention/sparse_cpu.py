"""Vashista attention on the CPU: generated tokens attend to a kept part of their context, prompts to all of it.

The store is that of `dense_cpu`, with key summaries of 16 tokens beside it, which every step keeps up to date for all
requests, dense ones too: their pages may be shared with sparse ones. Requests with one query go through the compiled
sparse kernel, dense ones with a budget that covers everything, for which it gives the dense kernel's bits. Prompt
chunks go through `prompt_cpu`. The rule by which groups are ranked is given: Vashista's own, or a peer's.
"""

from __future__ import annotations

import torch

from vashista.engine.attention.audit import audit_head
from vashista.engine.attention.dense_cpu import allocate_store, read_store, stretches_of
from vashista.engine.attention.interface import AttentionShape
from vashista.engine.attention.prompt_cpu import PromptAttention, clip_runs, page_runs, rotate
from vashista.engine.errors import SettingsError
from vashista.engine.step import Span, StepInput, stack_budgets
from vashista.engine.support import Audit, SpanSupport
from vashista.kernels.cpu import library as cpu_library
from vashista.kernels.cpu import sparse as kernel
from vashista.kernels.cpu.program import Program
from vashista.kernels.cpu.support import sum_support


class SparseCpuAttention:
    """See the module's text; satisfies `Attention`."""

    def __init__(self, name: str, rule: kernel.Rule, shape: AttentionShape) -> None:
        """Raises SettingsError for shapes, and machines, that the compiled kernel does not serve."""
        self.name = name
        self.shape = shape
        library = cpu_library.load()
        try:
            self._kernel_shape = kernel.SparseShape(
                shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.page_size, shape.scale, shape.dtype, rule
            )
        except ValueError as error:
            raise SettingsError(f"attention is {name!r}: {error} attention = dense takes all.") from None
        if library is None:
            raise SettingsError(
                f"attention is {name!r}, which needs the compiled kernels; {cpu_library.status()}. Without them only "
                "attention = dense runs."
            )
        self._library = library
        self._record = kernel.make_record(self._kernel_shape)
        self._prompts = PromptAttention(shape)
        self._store: list[torch.Tensor] = []
        self._summaries: list[kernel.Summaries] = []
        self._plan: kernel.SparsePlan | None = None
        self._decoding: list[Span] = []
        self._cos = self._sin = torch.empty(0)
        self._audits: dict[int, list[Audit]] = {}

    def page_bytes(self) -> int:
        """Keys, values and summaries."""
        s = self.shape
        units = s.page_size // kernel.UNIT_TOKENS
        unit_bytes = kernel.summary_bytes(s.head_dim, self._kernel_shape.rule)
        return s.page_bytes + s.num_layers * s.num_kv_heads * units * unit_bytes

    def allocate(self, num_pages: int) -> None:
        """Reserve the store; what was never written takes no memory from the operating system."""
        s = self.shape
        self._store = allocate_store(s, num_pages)
        num_slots = num_pages * s.page_size
        self._summaries = [
            kernel.make_summaries(self._kernel_shape.rule, s.num_kv_heads, num_slots, s.head_dim)
            for _ in range(s.num_layers)
        ]

    def stretches(self) -> list[torch.Tensor]:
        """See `Reserving`."""
        size = self.shape.page_size
        found = [part for store in self._store for part in stretches_of(store.flatten(0, 1), size)]
        for summaries in self._summaries:
            for parts in (summaries.codes, summaries.steps):
                found += stretches_of(parts, size // kernel.UNIT_TOKENS)
        return found

    def begin(self, step: StepInput, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Part the step's requests between the kernel and torch."""
        s = self.shape
        self._decoding = [span for span in step.spans if span.num_queries == 1]
        self._cos, self._sin = cos, sin
        self._audits = {index: [] for index, span in enumerate(self._decoding) if span.selection is not None}
        self._plan = None
        if self._decoding:
            requests = [(span.query_start, span.context_len, span.pages) for span in self._decoding]
            budgets = stack_budgets(self._decoding, s.num_layers, s.num_kv_heads)
            self._plan = kernel.plan(self._kernel_shape, requests, budgets, cos, sin, self._record)
        others = [span for span in step.spans if span.num_queries > 1]
        self._prompts.begin(others, cos, sin, is_all=not self._decoding)

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `Attention.forward`."""
        s = self.shape
        num_tokens = qkv.shape[0]
        out = torch.empty(num_tokens, s.num_heads, s.head_dim, dtype=s.dtype)
        store, summaries = self._store[layer], self._summaries[layer]
        if self._plan is not None:
            qkv = qkv.contiguous()
            window = s.layer_windows[layer]
            kernel.decode(self._library, self._plan, layer, qkv, store, summaries, out, window=window)
            for index, audits in self._audits.items():
                audits += self._audit(layer, index, qkv)
        if self._prompts.written:
            self._prompts.forward(layer, qkv, store, out)
            kernel.summarize(self._library, store, summaries, self._prompts.written)
        return out.view(num_tokens, s.num_heads * s.head_dim)

    @property
    def can_replay(self) -> bool:
        """See `Replayable`: a step of single queries, none of which is audited."""
        audited = any(span.selection is not None and span.selection.audits for span in self._decoding)
        return self._plan is not None and not self._prompts.written and not audited

    def record(self, program: Program, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> bool:
        """See `Replayable`."""
        kernel.record_decode(
            program, self._kernel_shape, self._record, layer, qkv, self._store[layer], self._summaries[layer], out,
            window=self.shape.layer_windows[layer],
        )  # fmt: skip
        return True

    def take_support(self) -> list[SpanSupport]:
        """See `Attention.take_support`."""
        if self._plan is None or not self._audits:
            return []
        sums = sum_support(self._library, self._plan, self.shape.layer_windows, list(self._audits))
        return [
            SpanSupport(
                num_dense=one.num_dense,
                tokens_attended=one.num_kept,
                tokens_visible=one.num_visible,
                dropped_mass_bound=one.bound,
                dropped_mass_estimate=one.estimate,
                support_gap=one.gap,
                audits=audits,
                estimates=one.estimates.numpy(),
            )
            for one, audits in zip(sums, self._audits.values(), strict=True)
        ]

    def read_cache(self, layer: int, pages: list[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Attention.read_cache`."""
        return read_store(self._store[layer], page_runs(pages, num_tokens, self.shape.page_size))

    def copy_cache(self, other: SparseCpuAttention, runs: list[tuple[int, int]]) -> None:
        """Keys and values of these slots as another module has them, with summaries of our own.

        For comparing modules on one reading of a text. runs: slots [start, end), each from the begin of a page.
        """
        for ours, theirs, summaries in zip(self._store, other._store, self._summaries, strict=True):
            for start, end in runs:
                ours[:, :, start:end] = theirs[:, :, start:end]
            kernel.summarize(self._library, ours, summaries, runs)

    def _audit(self, layer: int, index: int, qkv: torch.Tensor) -> list[Audit]:
        """What this layer's audits of one request find, after its `decode`."""
        s, span = self.shape, self._decoding[index]
        assert span.selection is not None
        assert self._plan is not None
        heads = span.selection.audited_heads(layer)
        if not heads:
            return []
        row = span.query_start
        cos, sin = (x[row : row + 1].unsqueeze(1) for x in (self._cos, self._sin))
        q = rotate(qkv[row : row + 1, : s.num_heads].float(), cos, sin)[0].view(s.num_kv_heads, -1, s.head_dim)
        first = span.context_len - s.visible(layer, span.context_len)
        runs = clip_runs(page_runs(span.pages, span.context_len, s.page_size), first, span.context_len)
        audits = []
        for head in heads:
            parts = [q[head] @ self._store[layer][0, head, start:end].float().T for start, end in runs]
            kept = self._plan.kept[index, head, : int(self._plan.num_kept[index, head])].long()
            logits = torch.cat(parts, 1) * s.scale
            audits.append(audit_head(layer, head, logits, first, kept, kernel.UNIT_TOKENS))
        return audits
