"""Qwen3 (`Qwen3ForCausalLM`): Llama with a norm on each query and key head."""

from __future__ import annotations

import torch

from vashista.engine.model_config import ModelConfig
from vashista.engine.models.decoder import Decoder, DecoderLayer, WeightReader


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


class Qwen3(Decoder):
    """The decoder with Qwen3's layers."""

    layer_class = Qwen3Layer
