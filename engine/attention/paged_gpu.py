"""What the GPU's attention modules share: the paged store, and a step's spans as tensors for the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vashista.engine.attention.interface import AttentionShape
from vashista.engine.step import Span


class PagedStore:
    """Keys and values of each layer: [num_pages, num_kv_heads, page_size, head_dim]."""

    def __init__(self, shape: AttentionShape, num_pages: int) -> None:
        size = (num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim)
        self.keys = [torch.empty(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.num_layers)]
        self.values = [torch.empty(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.num_layers)]

    def read(self, layer: int, pages: list[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of a request's rotated keys and values: [num_kv_heads, num_tokens, head_dim] each."""
        keys, values = self.keys[layer], self.values[layer]
        used = torch.tensor(pages[: -(-num_tokens // keys.shape[2])], device=keys.device)
        first, second = (cache[used].transpose(0, 1).flatten(1, 2)[:, :num_tokens] for cache in (keys, values))
        return first, second


@dataclass(frozen=True, slots=True)
class PagedSpans:
    """Some spans of a step, in the order given, on the device."""

    page_table: torch.Tensor
    """[num_spans, max_pages], int32."""
    query_starts: torch.Tensor
    """[num_spans + 1], int32: where each one's queries begin among those of these spans."""
    context_lens: torch.Tensor
    """[num_spans], int32."""
    slots: torch.Tensor
    """[num_queries], int64: where their keys and values go, page * page_size + offset."""
    max_queries: int
    max_context: int

    @classmethod
    def of(cls, spans: list[Span], shape: AttentionShape) -> PagedSpans:
        """Copies page table, lengths and slots to the device; does not wait for it."""
        device, size = shape.device, shape.page_size
        num_pages = [-(-span.context_len // size) for span in spans]
        table = torch.zeros(len(spans), max(num_pages), dtype=torch.int32)
        starts, slots = [0], []
        for row, (span, used) in enumerate(zip(spans, num_pages, strict=True)):
            table[row, :used] = torch.tensor(span.pages[:used], dtype=torch.int32)
            starts.append(starts[-1] + span.num_queries)
            positions = torch.arange(span.start, span.context_len)
            slots.append(table[row, positions // size].long() * size + positions % size)
        lengths = torch.tensor([span.context_len for span in spans], dtype=torch.int32)
        return cls(
            page_table=table.to(device, non_blocking=True),
            query_starts=torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True),
            context_lens=lengths.to(device, non_blocking=True),
            slots=torch.cat(slots).to(device, non_blocking=True),
            max_queries=max(span.num_queries for span in spans),
            max_context=max(span.context_len for span in spans),
        )


def rows_of(spans: list[Span], device: torch.device) -> torch.Tensor:
    """[num_queries] int64: the step's rows of the spans' queries."""
    rows = [torch.arange(span.query_start, span.query_start + span.num_queries) for span in spans]
    return torch.cat(rows).to(device, non_blocking=True)
