"""Exact attention of prompt chunks over the CPU's paged KV store, by torch's flash attention, without copying it.

The allocator prefers neighbours, so a request's cache is a few runs of slots; each run is attended to in place and the
partial results are merged by their log-sum-exp. The query group of a KV head is folded into query rows (on two cores
1.5 to 2 times faster than repeating keys, DESIGN section 8). A chunk sees the past (every key before it, no mask) and
itself (causal), again merged. With a sliding window that is shorter than the context it takes the masked path, which
copies the window. The CPU's attention modules give it the spans that their compiled kernels do not take.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vashista.engine.attention.interface import AttentionShape
from vashista.engine.step import Span

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class PromptAttention:
    """The spans of one step that torch attends for. A store is [2, num_kv_heads, num_slots, head_dim]."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape
        self._group = shape.num_heads // shape.num_kv_heads
        self._spans: list[Span] = []
        self._runs: list[list[tuple[int, int]]] = []
        self._rows: torch.Tensor | None = None
        self._slots = torch.empty(0, dtype=torch.int64)
        self._cos = self._sin = torch.empty(0)
        self.written: list[tuple[int, int]] = []
        """Runs of slots [start, end) that the step's spans write."""

    def begin(self, spans: list[Span], cos: torch.Tensor, sin: torch.Tensor, *, is_all: bool) -> None:
        """Take spans of a step; is_all: no other span is in it. cos, sin: of all rows of the step."""
        self._spans = spans
        self.written = []
        if not spans:
            return
        self._runs = [page_runs(span.pages, span.context_len, self.shape.page_size) for span in spans]
        for span, runs in zip(spans, self._runs, strict=True):
            self.written += clip_runs(runs, span.start, span.context_len)
        self._slots = torch.cat([torch.arange(start, end) for start, end in self.written])
        self._rows = None
        if not is_all:
            rows = [torch.arange(span.query_start, span.query_start + span.num_queries) for span in spans]
            self._rows = torch.cat(rows)
            cos, sin = cos[self._rows], sin[self._rows]
        self._cos, self._sin = cos.to(self.shape.dtype).unsqueeze(1), sin.to(self.shape.dtype).unsqueeze(1)

    def forward(self, layer: int, qkv: torch.Tensor, store: torch.Tensor, out: torch.Tensor) -> None:
        """Write keys and values of the spans to the store and attend. qkv and out: all rows of the step."""
        if not self._spans:
            return
        s = self.shape
        if self._rows is not None:
            qkv = qkv[self._rows]
        rotated = rotate(qkv[:, : s.num_heads + s.num_kv_heads], self._cos, self._sin)
        store[0].index_copy_(1, self._slots, rotated[:, s.num_heads :].transpose(0, 1))
        store[1].index_copy_(1, self._slots, qkv[:, s.num_heads + s.num_kv_heads :].transpose(0, 1))
        window = s.layer_windows[layer]
        queries = rotated[:, : s.num_heads].split([span.num_queries for span in self._spans])
        for span, runs, q in zip(self._spans, self._runs, queries, strict=True):
            to = out[span.query_start : span.query_start + span.num_queries]
            if span.num_queries == 1:
                self._decode(q, store, runs, span, window, to)
            elif window is not None and window < span.context_len:
                self._prefill_window(q, store, runs, span, window, to)
            else:
                self._prefill(q, store, runs, span, to)

    def _decode(
        self,
        q: torch.Tensor,
        store: torch.Tensor,
        runs: list[tuple[int, int]],
        span: Span,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        """One query a head. q, out: [1, num_heads, head_dim]."""
        s = self.shape
        if window is not None and window < span.context_len:
            runs = clip_runs(runs, span.context_len - window, span.context_len)
        q = q.view(1, s.num_kv_heads, self._group, s.head_dim)
        parts = [self._attend(q, store, start, end) for start, end in runs]
        out.view(q.shape).copy_(merge(parts))

    def _prefill(
        self, q: torch.Tensor, store: torch.Tensor, runs: list[tuple[int, int]], span: Span, out: torch.Tensor
    ) -> None:
        """A chunk of a prompt. q, out: [num_queries, num_heads, head_dim]."""
        s = self.shape
        num_queries = span.num_queries
        own = clip_runs(runs, span.start, span.context_len)
        k, v = (torch.cat([store[i, :, start:end] for start, end in own], dim=1) for i in (0, 1))
        k, v = (x.repeat_interleave(self._group, 0).unsqueeze(0) for x in (k, v))
        parts = [_flash(q.transpose(0, 1).unsqueeze(0), k, v, 0.0, True, scale=s.scale)]
        if span.start:
            # [num_kv_heads, group * num_queries]: heads h of group g come as rows g * num_queries + query.
            folded = q.transpose(0, 1).reshape(1, s.num_kv_heads, self._group * num_queries, s.head_dim)
            for start, end in clip_runs(runs, 0, span.start):
                part, lse = self._attend(folded, store, start, end)
                unfolded = (1, s.num_heads, num_queries)
                parts.append((part.reshape(*unfolded, s.head_dim), lse.reshape(unfolded)))
        out.copy_(merge(parts)[0].transpose(0, 1))

    def _prefill_window(
        self,
        q: torch.Tensor,
        store: torch.Tensor,
        runs: list[tuple[int, int]],
        span: Span,
        window: int,
        out: torch.Tensor,
    ) -> None:
        """A chunk whose oldest visible key differs from query to query."""
        first = max(0, span.start - window + 1)
        seen = clip_runs(runs, first, span.context_len)
        k, v = (torch.cat([store[i, :, start:end] for start, end in seen], dim=1).unsqueeze(0) for i in (0, 1))
        query_positions = torch.arange(span.start, span.context_len).unsqueeze(1)
        key_positions = torch.arange(first, span.context_len)
        mask = (key_positions <= query_positions) & (key_positions > query_positions - window)
        q = q.transpose(0, 1).unsqueeze(0)
        result = F.scaled_dot_product_attention(q, k, v, mask, scale=self.shape.scale, enable_gqa=True)
        out.copy_(result[0].transpose(0, 1))

    def _attend(self, q: torch.Tensor, store: torch.Tensor, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to slots start to end. q: [1, num_kv_heads, rows, head_dim] -> the same, and lse without head_dim."""
        keys, values = store[0, :, start:end].unsqueeze(0), store[1, :, start:end].unsqueeze(0)
        result: tuple[torch.Tensor, torch.Tensor] = _flash(q, keys, values, 0.0, False, scale=self.shape.scale)
        return result


def page_runs(pages: list[int], num_tokens: int, page_size: int) -> list[tuple[int, int]]:
    """The slots [start, end) of `num_tokens` tokens on `pages`, neighbouring pages joined."""
    runs: list[tuple[int, int]] = []
    left = num_tokens
    for page in pages:
        if left <= 0:
            break
        start = page * page_size
        end = start + min(left, page_size)
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
        left -= page_size
    return runs


def clip_runs(runs: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """The part of `runs` that holds the tokens first to last - 1, counted over all runs."""
    clipped = []
    position = 0
    for start, end in runs:
        low, high = max(first, position), min(last, position + end - start)
        if low < high:
            clipped.append((start + low - position, start + high - position))
        position += end - start
    return clipped


def merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention over the union of disjoint key sets from (output [..., head_dim], log-sum-exp [...]) of each."""
    if len(parts) == 1:
        return parts[0][0]
    lse = torch.stack([part_lse for _, part_lse in parts])
    weights = torch.softmax(lse, 0).unsqueeze(-1)
    merged = parts[0][0].float() * weights[0]
    for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
        merged.addcmul_(part.float(), weight)
    return merged


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first `2 * cos.shape[-1]` dimensions, halves paired as in Llama.

    x: [num_tokens, heads, head_dim]; cos, sin: [num_tokens, 1, rotary_dim / 2].
    """
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
