"""Qwen3 (`Qwen3ForCausalLM`): Llama with a norm on each query and key head."""

from __future__ import annotations

import torch

from vashista.engine.model_config import ModelConfig
from vashista.engine.models.decoder import Decoder, DecoderLayer, WeightReader
from vashista.kernels.cpu.norm import record_rms_norm
from vashista.kernels.cpu.program import Program


class Qwen3Layer(DecoderLayer):
    """Adds `q_norm` and `k_norm` over head_dim."""

    def __init__(self, config: ModelConfig, weights: WeightReader, index: int) -> None:
        super().__init__(config, weights, index)
        prefix = f"model.layers.{index}.self_attn"
        self.q_norm = weights.read(f"{prefix}.q_norm.weight", config.head_dim)
        self.k_norm = weights.read(f"{prefix}.k_norm.weight", config.head_dim)

    def prepare_heads(self, qkv: torch.Tensor) -> torch.Tensor:
        """Normalise queries and keys in place."""
        num_heads, num_kv_heads = self.config.num_heads, self.config.num_kv_heads
        q, k = qkv[:, :num_heads], qkv[:, num_heads : num_heads + num_kv_heads]
        q.copy_(self.norm(q, self.q_norm))
        k.copy_(self.norm(k, self.k_norm))
        return qkv

    def record_heads(self, program: Program, qkv: torch.Tensor) -> None:
        """The same in a program."""
        num_heads, num_kv_heads = self.config.num_heads, self.config.num_kv_heads
        q, k = qkv[:, :num_heads], qkv[:, num_heads : num_heads + num_kv_heads]
        record_rms_norm(program, q, self.q_norm, self.config.rms_norm_eps, q)
        record_rms_norm(program, k, self.k_norm, self.config.rms_norm_eps, k)


class Qwen3(Decoder):
    """The decoder with Qwen3's layers."""

    layer_class = Qwen3Layer
