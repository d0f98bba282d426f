"""What every attention module offers. The models call `forward` once a layer and know nothing else of it.

A module owns the KV store: its layout, what is written beside keys and values, and how queries read it. It is made
for one model on one device; the runner calls `allocate` once and `begin` once a step. To add a module, write one file
with a class that satisfies `Attention` and enter it in `engine/attention/registry.py`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from vashista.engine.step import Span, StepInput
from vashista.engine.support import SpanSupport
from vashista.kernels.cpu.program import Program


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What the attention of one model looks like, and where it runs."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    page_size: int
    layer_windows: tuple[int | None, ...]
    """Sliding window of each layer: a query at position p sees keys from p - window + 1 to p. None: all before it."""
    dtype: torch.dtype
    device: torch.device
    max_context: int | None = None
    """Tokens of the longest context that will come; None: nobody has said."""

    def visible(self, layer: int, context_len: int) -> int:
        """Tokens that the last query of a context sees in a layer."""
        window = self.layer_windows[layer]
        return context_len if window is None else min(window, context_len)

    def num_visible(self, context_len: int) -> int:
        """The same, summed over layers and KV heads."""
        return self.num_kv_heads * sum(self.visible(layer, context_len) for layer in range(self.num_layers))

    @property
    def page_bytes(self) -> int:
        """Bytes of keys and values that one page takes in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.page_size * self.head_dim * self.dtype.itemsize


class Attention(Protocol):
    """An attention module."""

    name: str

    def page_bytes(self) -> int:
        """Bytes that one page takes in all layers, with everything the module keeps for it."""

    def allocate(self, num_pages: int) -> None:
        """Reserve the KV store. Raises torch.OutOfMemoryError or RuntimeError if the device cannot hold it."""

    def begin(self, step: StepInput, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Prepare a step. cos, sin: [num_tokens, rotary_dim / 2], float32, of the step's positions."""

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Rotate queries and keys, write keys and values to their pages, attend.

        qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], not yet rotated: queries, keys, values; it may be
        overwritten. Returns [num_tokens, num_heads * head_dim] of the same dtype.
        """

    def take_support(self) -> list[SpanSupport]:
        """After the last layer: what was left out for each span with a selection, in the order of the spans."""

    def read_cache(self, layer: int, pages: list[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of a request's rotated keys and values: [num_kv_heads, num_tokens, head_dim] each."""


@runtime_checkable
class Reserving(Attention, Protocol):
    """An attention module whose store takes memory only as it is written."""

    def stretches(self) -> list[torch.Tensor]:
        """The store's parts as bytes, [num_pages, bytes of a page in this part] each, contiguous, after `allocate`."""


@runtime_checkable
class Replayable(Attention, Protocol):
    """An attention module of the CPU, whose decode steps can be part of a recorded program."""

    @property
    def can_replay(self) -> bool:
        """Whether the step that `begin` prepared may run as a program: `record`ed calls do all that `forward` would."""

    def record(self, program: Program, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> bool:
        """Add a layer's attention to a program; False where there are no kernels for it.

        qkv: [max_rows, num_heads + 2 * num_kv_heads, head_dim], out: [max_rows, num_heads, head_dim]: its buffers.
        """


@runtime_checkable
class Capturable(Attention, Protocol):
    """An attention module of the GPU, whose steps can be replayed as CUDA graphs.

    Steps of one key differ only in the contents of tensors. `fix` and `fix_prompts` make these tensors, and `forward`
    works on them until the next `begin`; `fill` puts a step into them.
    """

    def graph_key(self, spans: list[Span], num_rows: int) -> Hashable:
        """What has to be equal for steps of single queries to share a graph with so many rows."""

    def fix(self, key: Hashable, num_rows: int) -> object:
        """Tensors for steps of a key; all rows are padding, whose results nobody reads and which write nothing."""

    def fix_prompts(self, num_tokens: int, num_spans: int) -> object:
        """The same for steps of chunks of prompts, up to so many, of up to so many tokens in all."""

    def use(self, fixed: object, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Let `forward` work on the tensors. cos, sin: [num_rows, rotary_dim / 2]."""

    def fill(self, fixed: object, spans: list[Span]) -> None:
        """Put a step into the first rows, the rest being padding; `take_support` then speaks of these spans."""
