"""A decode step of a model as one call: every layer recorded once over fixed buffers, then run by one team of threads.

`Decoder` makes one where the compiled CPU kernels serve all of the model, and runs steps by it in which every request
has a single query. What comes out has the bits of the layers' `forward`, which other steps take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vashista.engine.attention.interface import Attention, Replayable
from vashista.engine.step import StepInput
from vashista.kernels.cpu import library as cpu_library
from vashista.kernels.cpu.linear import MAX_ROWS
from vashista.kernels.cpu.norm import record_rms_norm
from vashista.kernels.cpu.program import Program

if TYPE_CHECKING:
    from vashista.engine.models.decoder import Decoder

MAX_CALLS_PER_LAYER = 8


@dataclass(frozen=True, slots=True)
class DecodeBuffers:
    """What a program works on: [MAX_ROWS, ...] each, in the model's dtype, shared by all layers."""

    x: torch.Tensor
    """[..., hidden_size]: the residual stream."""
    qkv: torch.Tensor
    attended: torch.Tensor
    gated: torch.Tensor
    hidden: torch.Tensor
    """[..., hidden_size]: the final, normed states."""


class DecodeProgram:
    """The recorded decode step of one model with one attention module."""

    def __init__(
        self, program: Program, buffers: DecodeBuffers, attention: Replayable, embedding: torch.Tensor
    ) -> None:
        self._program = program
        self._buffers = buffers
        self._attention = attention
        self._embedding = embedding

    @classmethod
    def record(cls, model: Decoder, attention: Attention) -> DecodeProgram | None:
        """Record all layers; None where the model, its device or its dtype is not the kernels' to serve."""
        library, c = cpu_library.load(), model.config
        products = [linear for layer in model.layers for linear in layer.products]
        if library is None or not isinstance(attention, Replayable) or not all(p.can_record for p in products):
            return None
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        widths = (c.hidden_size, q_size + 2 * kv_size, q_size, c.intermediate_size, c.hidden_size)
        buffers = DecodeBuffers(*(torch.zeros(MAX_ROWS, width, dtype=model.embedding.dtype) for width in widths))
        num_calls = MAX_CALLS_PER_LAYER * c.num_layers + 1
        program = Program(library, num_calls, MAX_ROWS, max(c.hidden_size, q_size, c.intermediate_size))
        if not all(layer.record(program, buffers, attention) for layer in model.layers):
            return None
        record_rms_norm(program, buffers.x, model.final_norm, c.rms_norm_eps, buffers.hidden)
        return cls(program, buffers, attention, model.embedding)

    def can_run(self, step: StepInput, attention: Attention) -> bool:
        """Whether the step, for which the attention has begun, can run as this program."""
        return attention is self._attention and self._attention.can_replay and step.token_ids.shape[0] <= MAX_ROWS

    def run(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [num_tokens], int64 -> final, normed hidden states: [num_tokens, hidden_size]."""
        num_tokens = token_ids.shape[0]
        torch.index_select(self._embedding, 0, token_ids, out=self._buffers.x[:num_tokens])
        self._program.run(num_tokens)
        return self._buffers.hidden[:num_tokens].clone()
