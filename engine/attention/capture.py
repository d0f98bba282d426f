"""Looks at a running model's attention: queries at chosen positions, with all keys and values they see.

`CapturingAttention` stands in the runner in place of the attention that it wraps, changes nothing of what that
computes, and calls an observer in each layer of a step that holds a watched position. The observer works at once and
keeps what it needs, so memory does not grow with layers or positions. `engine/calibrate.py` and `engine/diagnose.py`
use it; for one request at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from vashista.engine.attention.interface import Attention, AttentionShape
from vashista.engine.step import StepInput
from vashista.engine.support import SpanSupport


@dataclass(frozen=True)
class Captured:
    """One watched position in one layer."""

    layer: int
    position: int
    first: int
    """The oldest position that the query sees: 0, or later with a sliding window."""
    query: torch.Tensor
    """[num_heads, head_dim], rotated, in the store's dtype."""
    keys: torch.Tensor
    """[num_kv_heads, position + 1 - first, head_dim], rotated, in the store's dtype."""
    values: torch.Tensor
    """As the keys."""


Observer = Callable[[Captured], None]


class CapturingAttention:
    """See the module's text; satisfies `Attention`."""

    def __init__(self, inner: Attention, shape: AttentionShape, observer: Observer) -> None:
        self.inner = inner
        self.shape = shape
        self.name = inner.name
        self.observer = observer
        self._watched: frozenset[int] = frozenset()
        self._positions: list[int] = []
        self._rows: list[int] = []
        self._pages: list[int] = []
        self._context_len = 0
        self._cos = self._sin = torch.empty(0)

    def watch(self, positions: Collection[int]) -> None:
        """Report these positions from now on, and no others."""
        self._watched = frozenset(positions)

    def page_bytes(self) -> int:
        """Of the wrapped module."""
        return self.inner.page_bytes()

    def allocate(self, num_pages: int) -> None:
        """Of the wrapped module."""
        self.inner.allocate(num_pages)

    def begin(self, step: StepInput, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """See `Attention.begin`; finds the rows of watched positions."""
        self.inner.begin(step, cos, sin)
        assert len(step.spans) == 1, "capturing is for one request at a time"
        span = step.spans[0]
        self._positions = [p for p in range(span.start, span.context_len) if p in self._watched]
        self._rows = [span.query_start + p - span.start for p in self._positions]
        self._cos, self._sin = cos[self._rows], sin[self._rows]
        self._pages, self._context_len = span.pages, span.context_len

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `Attention.forward`; the observer is called once the layer's keys are in the store."""
        if not self._positions:
            return self.inner.forward(layer, qkv)
        shape = self.shape
        queries = rotated(qkv[self._rows, : shape.num_heads], self._cos, self._sin)  # a copy: qkv may be overwritten
        out = self.inner.forward(layer, qkv)
        keys, values = self.inner.read_cache(layer, self._pages, self._context_len)
        window = shape.layer_windows[layer]
        for query, position in zip(queries, self._positions, strict=True):
            first = 0 if window is None else max(0, position + 1 - window)
            seen = slice(first, position + 1)
            self.observer(Captured(layer, position, first, query, keys[:, seen], values[:, seen]))
        return out

    def take_support(self) -> list[SpanSupport]:
        """Of the wrapped module."""
        return self.inner.take_support()

    def read_cache(self, layer: int, pages: list[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the wrapped module."""
        return self.inner.read_cache(layer, pages, num_tokens)


def rotated(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in float32, halves paired as in Llama, rounded to q's dtype as the kernels do.

    q: [rows, num_heads, head_dim]; cos, sin: [rows, rotary_dim / 2] float32.
    """
    half = cos.shape[-1]
    x, cos, sin = q.float(), cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]]
    return torch.cat(parts, dim=-1).to(q.dtype)
