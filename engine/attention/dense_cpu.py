"""Exact attention over a paged KV store on the CPU.

Keys and values of a layer lie as [2, num_kv_heads, num_slots, head_dim], slot = page * page_size + offset, so that
neighbouring pages form one run of tokens. Requests with one query go through the compiled kernel, all of a step in one
call. Prompt chunks, and everything where there is no such kernel, go through `prompt_cpu`.
"""

from __future__ import annotations

import torch

from vashista.engine.attention.interface import AttentionShape
from vashista.engine.attention.prompt_cpu import PromptAttention, page_runs
from vashista.engine.step import StepInput
from vashista.engine.support import SpanSupport
from vashista.kernels.cpu import attend as kernel
from vashista.kernels.cpu import library as cpu_library
from vashista.kernels.cpu.large_pages import large_empty
from vashista.kernels.cpu.program import Program


class DenseCpuAttention:
    """See the module's text; satisfies `Attention`."""

    name = "dense"

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape
        self._library = cpu_library.load() if kernel.supports(shape.head_dim, shape.dtype) else None
        if self._library is not None:
            self._kernel_shape = kernel.DecodeShape(
                shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.page_size, shape.scale, shape.dtype
            )
            self._record = kernel.make_record(self._kernel_shape)
        self._prompts = PromptAttention(shape)
        self._store: list[torch.Tensor] = []
        self._plan: kernel.DecodePlan | None = None

    def page_bytes(self) -> int:
        """Keys and values, nothing else."""
        return self.shape.page_bytes

    def allocate(self, num_pages: int) -> None:
        """Reserve the store; what was never written takes no memory from the operating system."""
        self._store = allocate_store(self.shape, num_pages)

    def stretches(self) -> list[torch.Tensor]:
        """See `Reserving`."""
        return [part for store in self._store for part in stretches_of(store.flatten(0, 1), self.shape.page_size)]

    def begin(self, step: StepInput, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Part the step's requests between the kernel and torch."""
        decoding = [span for span in step.spans if self._library is not None and span.num_queries == 1]
        self._plan = None
        if decoding:
            requests = [(span.query_start, span.context_len, span.pages) for span in decoding]
            self._plan = kernel.plan(self._kernel_shape, requests, cos, sin, self._record)
        others = [span for span in step.spans if self._library is None or span.num_queries > 1]
        self._prompts.begin(others, cos, sin, is_all=not decoding)

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `Attention.forward`."""
        s = self.shape
        num_tokens = qkv.shape[0]
        out = torch.empty(num_tokens, s.num_heads, s.head_dim, dtype=s.dtype)
        if self._plan is not None:
            assert self._library is not None
            window = s.layer_windows[layer]
            kernel.decode(self._library, self._plan, qkv.contiguous(), self._store[layer], out, window=window)
        self._prompts.forward(layer, qkv, self._store[layer], out)
        return out.view(num_tokens, s.num_heads * s.head_dim)

    @property
    def can_replay(self) -> bool:
        """See `Replayable`: a step of single queries."""
        return self._plan is not None and not self._prompts.written

    def record(self, program: Program, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> bool:
        """See `Replayable`."""
        if self._library is None:
            return False
        shape, window = self._kernel_shape, self.shape.layer_windows[layer]
        kernel.record_decode(program, shape, self._record, qkv, self._store[layer], out, window=window)
        return True

    def take_support(self) -> list[SpanSupport]:
        """Nothing is ever left out."""
        return []

    def read_cache(self, layer: int, pages: list[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of a request's rotated keys and values: [num_kv_heads, num_tokens, head_dim] each."""
        return read_store(self._store[layer], page_runs(pages, num_tokens, self.shape.page_size))


def allocate_store(shape: AttentionShape, num_pages: int) -> list[torch.Tensor]:
    """Keys and values of each layer: [2, num_kv_heads, num_slots, head_dim]."""
    size = (2, shape.num_kv_heads, num_pages * shape.page_size, shape.head_dim)
    return [large_empty(size, shape.dtype) for _ in range(shape.num_layers)]


def stretches_of(parts: torch.Tensor, page_slots: int) -> list[torch.Tensor]:
    """Each part as bytes by page, see `Reserving`. parts: [num_parts, num_pages * page_slots, size of a slot]."""
    num_parts, num_slots, _ = parts.shape
    return list(parts.view(torch.uint8).view(num_parts, num_slots // page_slots, -1)) if num_slots else []


def read_store(store: torch.Tensor, runs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of runs of slots, behind each other: [num_kv_heads, num_tokens, head_dim] each."""
    keys, values = (torch.cat([store[i, :, start:end] for start, end in runs], dim=1) for i in (0, 1))
    return keys, values
