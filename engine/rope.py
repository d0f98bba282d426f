"""Rotary positions: from a model's RopeConfig to the cos and sin that its layers multiply with.

The model builders call `rotary_table` once at load. Formulas and float32 order of operations follow transformers 5.23
(`modeling_rope_utils.py`), so that logits agree to rounding:

- default: inv_freq_i = theta^(-2i/d)  (RoFormer, arXiv 2104.09864)
- linear: inv_freq / factor (position interpolation, arXiv 2306.15595)
- llama3: long waves / factor, short waves untouched, between them a linear blend (Llama 3.1's reference code)
- yarn: a ramp over the dimensions from inv_freq to inv_freq / factor, and a factor on cos and sin (arXiv 2309.00071)
"""

from __future__ import annotations

import math

import torch

from vashista.engine.model_config import ModelConfig
from vashista.engine.rope_config import RopeConfig


def rotary_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """(inv_freq [rotary_dim / 2] float32 on the CPU, in radians a token; factor on cos and sin)."""
    rope = config.rope
    dim = config.rotary_dim
    wave = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.type == "default":
        return 1.0 / wave, 1.0
    if rope.type == "linear":
        return (1.0 / wave) / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(rope, 1.0 / wave), 1.0
    assert rope.type == "yarn", f"engine/rope_config.py let rope type {rope.type} through"
    return _yarn(rope, wave, dim), _yarn_attention_factor(rope)


def rotary_table(
    config: ModelConfig, num_positions: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [num_positions, rotary_dim / 2] float32 on the device, already times the attention factor.

    Row p belongs to position p. Angles are float32 products, as in transformers, and are made on the CPU, so that
    every device gets the same table.
    """
    inv_freq, attention_factor = rotary_frequencies(config)
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * inv_freq[None, :]
    cos, sin = angles.cos(), angles.sin()
    if attention_factor != 1.0:
        cos, sin = cos * attention_factor, sin * attention_factor
    return cos.to(device), sin.to(device)


def _llama3(rope: RopeConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    """[rotary_dim / 2] float32."""
    context = rope.original_max_position_embeddings
    low_freq_wavelen, high_freq_wavelen = context / rope.low_freq_factor, context / rope.high_freq_factor
    wavelen = 2 * math.pi / inv_freq
    scaled = torch.where(wavelen > low_freq_wavelen, inv_freq / rope.factor, inv_freq)
    smooth = (context / wavelen - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    is_medium = (wavelen >= high_freq_wavelen) & (wavelen <= low_freq_wavelen)
    return torch.where(is_medium, blended, scaled)


def _yarn(rope: RopeConfig, wave: torch.Tensor, dim: int) -> torch.Tensor:
    """[rotary_dim / 2] float32."""

    def dimension_of(num_rotations: float) -> float:
        """The dimension that turns so many times within the original context."""
        turns = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return (dim * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp needs a width; the value is transformers'
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    extrapolated, interpolated = 1.0 / wave, 1.0 / (rope.factor * wave)
    keep = 1 - ramp
    return interpolated * (1 - keep) + extrapolated * keep


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
