"""Exact attention over a paged KV store on a GPU, with the Triton kernels of `vashista.kernels`.

A step whose requests all decode takes the split-K decode kernel; any other step takes the variable-length kernel, which
handles one query as well.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from vashista.engine.attention.interface import AttentionShape
from vashista.engine.attention.paged_gpu import FixedPrompts, FixedSpans, PagedSpans, PagedStore
from vashista.engine.step import Span, StepInput
from vashista.engine.support import SpanSupport
from vashista.kernels.paged_decode import paged_decode
from vashista.kernels.paged_prefill import paged_prefill
from vashista.kernels.rope_write import rope_and_write


class DenseTritonAttention:
    """See the module's text; satisfies `Attention`."""

    name = "dense"
    _store: PagedStore
    _spans: PagedSpans

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape
        self._cos = self._sin = torch.empty(0, device=shape.device)
        self._max_context = 0

    def page_bytes(self) -> int:
        """Keys and values, nothing else."""
        return self.shape.page_bytes

    def allocate(self, num_pages: int) -> None:
        """Reserve the store."""
        self._store = PagedStore(self.shape, num_pages)
        self._max_context = num_pages * self.shape.page_size

    def begin(self, step: StepInput, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Put page table, lengths and slots of the step on the device."""
        self._spans = PagedSpans.of(step.spans, self.shape)
        self._cos, self._sin = cos, sin

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `Attention.forward`."""
        s, spans = self.shape, self._spans
        q, k, v = qkv.split((s.num_heads, s.num_kv_heads, s.num_kv_heads), dim=1)
        keys, values = self._store.keys[layer], self._store.values[layer]
        q = rope_and_write(q, k, v, self._cos, self._sin, keys, values, spans.slots)
        window = s.layer_windows[layer]
        if spans.max_queries == 1:
            out = paged_decode(
                q, keys, values, spans.page_table, spans.context_lens,
                scale=s.scale, window=window, max_context=spans.max_context,
            )  # fmt: skip
        else:
            out = paged_prefill(
                q, keys, values, spans.page_table, spans.query_starts, spans.context_lens,
                scale=s.scale, window=window, max_query_len=spans.max_queries,
            )  # fmt: skip
        return out.reshape(qkv.shape[0], s.num_heads * s.head_dim)

    def graph_key(self, spans: list[Span], num_rows: int) -> Hashable:
        """See `Capturable`."""
        return num_rows

    def fix(self, key: Hashable, num_rows: int) -> object:
        """See `Capturable`."""
        return FixedSpans(self.shape, num_rows, self._max_context)

    def fix_prompts(self, num_tokens: int, num_spans: int) -> object:
        """See `Capturable`."""
        return FixedPrompts(self.shape, num_tokens, num_spans, self._max_context)

    def use(self, fixed: object, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """See `Capturable`."""
        assert isinstance(fixed, FixedSpans | FixedPrompts)
        self._spans, self._cos, self._sin = fixed.spans, cos, sin

    def fill(self, fixed: object, spans: list[Span]) -> None:
        """See `Capturable`."""
        assert isinstance(fixed, FixedSpans | FixedPrompts)
        fixed.fill(spans)

    def take_support(self) -> list[SpanSupport]:
        """Nothing is ever left out."""
        return []

    def read_cache(self, layer: int, pages: list[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Attention.read_cache`."""
        return self._store.read(layer, pages, num_tokens)
