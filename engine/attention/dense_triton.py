"""Exact attention over a paged KV store on a GPU, with the Triton kernels of `vashista.kernels`.

Keys and values of a layer lie as [num_pages, num_kv_heads, page_size, head_dim]. A step whose requests all decode
takes the split-K decode kernel; any other step takes the variable-length kernel, which handles one query as well.
"""

from __future__ import annotations

import torch

from vashista.engine.attention.interface import AttentionShape
from vashista.engine.step import StepInput
from vashista.kernels.paged_decode import paged_decode
from vashista.kernels.paged_prefill import paged_prefill
from vashista.kernels.rope_write import rope_and_write


class DenseTritonAttention:
    """See the module's text; satisfies `Attention`."""

    name = "dense"

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._max_queries = self._max_context = 0
        nothing = torch.empty(0, dtype=torch.int32, device=shape.device)
        self._page_table = self._query_starts = self._context_lens = self._slots = nothing
        self._cos = self._sin = nothing

    def page_bytes(self) -> int:
        """Keys and values, nothing else."""
        return self.shape.page_bytes

    def allocate(self, num_pages: int) -> None:
        """Reserve the store."""
        s = self.shape
        size = (num_pages, s.num_kv_heads, s.page_size, s.head_dim)
        self._keys = [torch.empty(size, dtype=s.dtype, device=s.device) for _ in range(s.num_layers)]
        self._values = [torch.empty(size, dtype=s.dtype, device=s.device) for _ in range(s.num_layers)]

    def begin(self, step: StepInput, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Put page table, lengths and slots of the step on the device."""
        s, spans = self.shape, step.spans
        num_pages = [-(-span.context_len // s.page_size) for span in spans]
        table = torch.zeros(len(spans), max(num_pages), dtype=torch.int32)
        for row, (span, used) in enumerate(zip(spans, num_pages, strict=True)):
            table[row, :used] = torch.tensor(span.pages[:used], dtype=torch.int32)
        starts = [span.query_start for span in spans] + [step.token_ids.shape[0]]
        self._page_table = table.to(s.device, non_blocking=True)
        self._query_starts = torch.tensor(starts, dtype=torch.int32).to(s.device, non_blocking=True)
        lengths = torch.tensor([span.context_len for span in spans], dtype=torch.int32)
        self._context_lens = lengths.to(s.device, non_blocking=True)
        rows = torch.repeat_interleave(
            torch.arange(len(spans), device=s.device),
            torch.tensor([span.num_queries for span in spans], device=s.device),
            output_size=step.token_ids.shape[0],
        )
        pages = self._page_table[rows, step.positions // s.page_size].long()
        self._slots = pages * s.page_size + step.positions % s.page_size
        self._max_queries = max(span.num_queries for span in spans)
        self._max_context = max(span.context_len for span in spans)
        self._cos, self._sin = cos, sin

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `Attention.forward`."""
        s = self.shape
        q, k, v = qkv.split((s.num_heads, s.num_kv_heads, s.num_kv_heads), dim=1)
        keys, values = self._keys[layer], self._values[layer]
        q = rope_and_write(q, k, v, self._cos, self._sin, keys, values, self._slots)
        window = s.layer_windows[layer]
        if self._max_queries == 1:
            out = paged_decode(
                q,
                keys,
                values,
                self._page_table,
                self._context_lens,
                scale=s.scale,
                window=window,
                max_context=self._max_context,
            )
        else:
            out = paged_prefill(
                q,
                keys,
                values,
                self._page_table,
                self._query_starts,
                self._context_lens,
                scale=s.scale,
                window=window,
                max_query_len=self._max_queries,
            )
        return out.reshape(qkv.shape[0], s.num_heads * s.head_dim)
