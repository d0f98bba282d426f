"""The reference model in plain torch, for training and evaluation: a Llama with weights that `export.py` renames.

Hidden states stay flat, [batch * length, hidden_size], and attention is called between the compiled parts: whatever the
length of a stage, the compiled parts see one shape as long as a batch has as many tokens, and are compiled once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from stages import LABELS, Shape
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class Layer(nn.Module):
    """The weights of one layer; the arithmetic is in the functions below."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        hidden, inner = shape.hidden_size, shape.intermediate_size
        out_std = 0.02 / math.sqrt(2 * shape.num_layers)
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.q = _matrix(q_size, hidden)
        self.k = _matrix(kv_size, hidden)
        self.v = _matrix(kv_size, hidden)
        self.o = _matrix(hidden, q_size, out_std)
        self.gate = _matrix(inner, hidden)
        self.up = _matrix(inner, hidden)
        self.down = _matrix(hidden, inner, out_std)


class Model(nn.Module):
    """Weights float32; activations of `dtype`."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.parts = EAGER
        self.embedding = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.final_norm = nn.Parameter(torch.ones(shape.hidden_size))

    def hidden(self, ids: torch.Tensor, attention: Attention) -> torch.Tensor:
        """ids: [batch, length] -> last hidden states before the final norm, [batch * length, hidden_size]."""
        shape = self.shape
        cos, sin = attention.rotation(shape, ids)
        x = functional.embedding(ids.flatten(), self.embedding).to(self.dtype)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            q, k, v = self.parts.attention_inputs(
                x, layer.attention_norm, layer.q, layer.k, layer.v, cos, sin, shape.head_dim, shape.rms_norm_eps
            )
            attended = attention(index, q, k, v, ids.shape[0])
            x = self.parts.layer_output(
                x, attended, layer.o, layer.mlp_norm, layer.gate, layer.up, layer.down, shape.rms_norm_eps
            )
        return x

    def loss(self, ids: torch.Tensor, weights: torch.Tensor, attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
        """(weighted mean loss in nats, [2 * labels] sums: loss and number of the tokens of each of `LABELS`).

        ids, weights: [batch, length + 1]; a token's weight says what it is.
        """
        hidden = self.hidden(ids[:, :-1], attention)
        sums = self.parts.weighted_loss(
            hidden,
            self.final_norm,
            self.embedding,
            ids[:, 1:].flatten(),
            weights[:, 1:].flatten(),
            self.shape.rms_norm_eps,
        )
        return sums[0] / sums[1], sums[2:].detach()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [n, hidden_size] -> float32 [n, vocab_size]."""
        normed = rms_norm(hidden, self.final_norm, self.shape.rms_norm_eps)
        return (normed @ self.embedding.to(hidden.dtype).t()).float()


class Attention:
    """Causal attention within each row of a batch, from position 0 on."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def rotation(self, shape: Shape, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of each token's angles: float32 [batch * length, head_dim / 2]."""
        key = (ids.shape[0], ids.shape[1])
        if key not in self._tables:
            self._tables[key] = rotation(shape, torch.arange(ids.shape[1], device=ids.device).repeat(ids.shape[0]))
        return self._tables[key]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch_size: int) -> torch.Tensor:
        """q: [batch * length, num_heads, head_dim], k and v of num_kv_heads -> [batch * length, hidden size of q]."""
        q, k, v = (part.unflatten(0, (batch_size, -1)).transpose(1, 2) for part in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)


@contextmanager
def fast_attention(name: str) -> Iterator[None]:
    """Only this backend of torch's attention: flash, cudnn, efficient or math."""
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    with sdpa_kernel([backends[name]]):
        yield


def rotation(shape: Shape, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """positions: [n] -> (cos, sin), float32 [n, head_dim / 2] each."""
    half = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float64) / shape.head_dim
    angles = positions[:, None].double() * shape.rope_theta**-half
    return angles.cos().float(), angles.sin().float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [n, heads, head_dim]; the first half of a head pairs with the second."""
    left, right = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def attention_inputs(
    x: torch.Tensor,
    norm: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_dim: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: [n, hidden_size] -> rotated queries and keys, and values: [n, heads, head_dim] each."""
    weight = torch.cat((q, k, v)).to(x.dtype)
    mixed = (rms_norm(x, norm, eps) @ weight.t()).unflatten(-1, (-1, head_dim))
    num_heads, num_kv_heads = q.shape[0] // head_dim, k.shape[0] // head_dim
    queries, keys, values = mixed.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return rotate(queries, cos, sin), rotate(keys, cos, sin), values.contiguous()


def layer_output(
    x: torch.Tensor,
    attended: torch.Tensor,
    o: torch.Tensor,
    norm: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """What follows attention: both residual additions and the MLP between them; [n, hidden_size]."""
    dtype = x.dtype
    x = x + attended @ o.to(dtype).t()
    normed = rms_norm(x, norm, eps)
    inner = functional.silu(normed @ gate.to(dtype).t()) * (normed @ up.to(dtype).t())
    return x + inner @ down.to(dtype).t()


def weighted_loss(
    hidden: torch.Tensor,
    norm: torch.Tensor,
    embedding: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """[2 + 2 * labels]: weighted loss, sum of weights; then loss and number of the tokens of each of `LABELS`."""
    logits = (rms_norm(hidden, norm, eps) @ embedding.to(hidden.dtype).t()).float()
    losses = functional.cross_entropy(logits, targets, reduction="none")
    sums = [(losses * weights).sum(), weights.sum()]
    for weight in LABELS.values():
        is_labelled = weights == weight
        sums += [(losses * is_labelled).sum(), is_labelled.sum()]
    return torch.stack(sums)


class Parts(NamedTuple):
    """The arithmetic around the attentions, as it is or compiled."""

    attention_inputs: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    layer_output: Callable[..., torch.Tensor]
    weighted_loss: Callable[..., torch.Tensor]


EAGER = Parts(attention_inputs, layer_output, weighted_loss)


def compiled_parts() -> Parts:
    return Parts(
        torch.compile(attention_inputs, dynamic=False),
        torch.compile(layer_output, dynamic=False),
        torch.compile(weighted_loss, dynamic=False),
    )


def _matrix(rows: int, columns: int, std: float = 0.02) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * std)
