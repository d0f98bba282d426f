"""What the GPU's attention modules share: the paged store, and a step's spans as tensors for the kernels."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch

from vashista.engine.attention.interface import AttentionShape
from vashista.engine.step import Span

FEW_ROWS = 8
"""Rows of a page table that are sent one by one."""


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


class FixedSpans:
    """Spans of one query each in tensors that stay where they are, for CUDA graphs; rows beyond them are padding."""

    def __init__(self, shape: AttentionShape, num_rows: int, max_context: int) -> None:
        """For `num_rows` spans of contexts up to `max_context`."""
        size = (num_rows, -(-max_context // shape.page_size))
        is_pinned = shape.device.type == "cuda"
        self._page_size = shape.page_size
        self._table = torch.zeros(size, dtype=torch.int32, pin_memory=is_pinned)
        self._lengths = torch.zeros(num_rows, dtype=torch.int32, pin_memory=is_pinned)
        self._slots = torch.full((num_rows,), -1, dtype=torch.int64, pin_memory=is_pinned)
        self._rows: list[list[int]] = [[] for _ in range(num_rows)]
        """What the table has of each row's pages: most steps change none."""
        self._copied = torch.cuda.Event() if is_pinned else None
        self.spans = PagedSpans(
            page_table=torch.zeros(size, dtype=torch.int32, device=shape.device),
            query_starts=torch.arange(num_rows + 1, dtype=torch.int32, device=shape.device),
            context_lens=torch.zeros(num_rows, dtype=torch.int32, device=shape.device),
            slots=torch.full((num_rows,), -1, dtype=torch.int64, device=shape.device),
            max_queries=1,
            max_context=max_context,
        )

    def wait(self) -> None:
        """Until the copies of the last `fill` are made: they come from memory that is used again."""
        if self._copied is not None:
            self._copied.synchronize()

    def fill(self, spans: list[Span]) -> None:
        """Put a step's spans into the first rows, when the copies of the time before are made."""
        size = self._page_size
        changed: dict[int, list[int]] = {}
        table, lengths, slots = self._table.numpy(), self._lengths.numpy(), self._slots.numpy()
        # the same memory: to write a row takes numpy a third of torch's time
        self.wait()
        lengths[:], slots[:] = 0, -1
        for row, span in enumerate(spans):
            pages = span.pages[: -(-span.context_len // size)]
            if pages != self._rows[row]:
                self._rows[row] = []  # until they are on their way
                table[row, : len(pages)] = changed[row] = pages
            lengths[row] = span.context_len
            slots[row] = pages[-1] * size + span.start % size
        fixed = self.spans
        if len(changed) <= FEW_ROWS:
            for row, pages in changed.items():
                fixed.page_table[row, : len(pages)].copy_(self._table[row, : len(pages)], non_blocking=True)
        else:  # a part of several rows is first put together, which takes as long as some copies
            most = max(map(len, changed.values()))
            fixed.page_table[:, :most].copy_(self._table[:, :most], non_blocking=True)
        for row, pages in changed.items():
            self._rows[row] = pages
        fixed.context_lens.copy_(self._lengths, non_blocking=True)
        fixed.slots.copy_(self._slots, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class FixedPrompts:
    """Chunks of prompts in tensors that stay where they are, for CUDA graphs; tokens beyond them are padding."""

    def __init__(self, shape: AttentionShape, num_tokens: int, num_spans: int, max_context: int) -> None:
        """For up to `num_spans` chunks of up to `num_tokens` tokens in all, in contexts of up to `max_context`."""
        num_pages = -(-max_context // shape.page_size)
        is_pinned = shape.device.type == "cuda"

        def both(*size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            host = torch.zeros(size, dtype=dtype, pin_memory=is_pinned)
            return host, torch.zeros(size, dtype=dtype, device=shape.device)

        self._page_size = shape.page_size
        self._table, table = both(num_spans, num_pages, dtype=torch.int32)
        self._starts, starts = both(num_spans + 1, dtype=torch.int32)
        self._lengths, lengths = both(num_spans, dtype=torch.int32)
        self._slots, slots = both(num_tokens, dtype=torch.int64)
        slots.fill_(-1)
        self._copied = torch.cuda.Event() if is_pinned else None
        self.spans = PagedSpans(table, starts, lengths, slots, max_queries=num_tokens, max_context=max_context)

    def fill(self, spans: list[Span]) -> None:
        """Put a step's chunks into the tensors, one behind the other, when the copies of the time before are made."""
        if self._copied is not None:  # a chunk that is not the last is followed by the next without a look at it
            self._copied.synchronize()
        size, fixed, end = self._page_size, self.spans, 0
        self._lengths.zero_()
        self._slots.fill_(-1)
        for row, span in enumerate(spans):
            used = -(-span.context_len // size)
            self._table[row, :used] = torch.frombuffer(array("i", span.pages[:used]), dtype=torch.int32)
            fixed.page_table[row, :used].copy_(self._table[row, :used], non_blocking=True)
            positions = torch.arange(span.start, span.context_len)
            begin, end = end, end + span.num_queries
            self._slots[begin:end] = self._table[row, positions // size].long() * size + positions % size
            self._starts[row + 1] = end
            self._lengths[row] = span.context_len
        self._starts[len(spans) + 1 :] = end
        fixed.query_starts.copy_(self._starts, non_blocking=True)
        fixed.context_lens.copy_(self._lengths, non_blocking=True)
        fixed.slots.copy_(self._slots, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def rows_of(spans: list[Span], device: torch.device) -> torch.Tensor:
    """[num_queries] int64: the step's rows of the spans' queries."""
    rows = [torch.arange(span.query_start, span.query_start + span.num_queries) for span in spans]
    return torch.cat(rows).to(device, non_blocking=True)
