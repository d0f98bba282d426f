"""Keys, values and summaries of many contexts as plain tensors, so that all of them take a step together.

`tail.py` copies what a `SuitePlayer` has read into one `LayerStore` a layer and lets `tail_attention.py` decode on
them. A unit is 16 or 64 neighbouring tokens. Summaries of keys are coded as the product's kernels of the device code
them; mean values, which the product has not, are kept exact and in 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from candidates import coded, coded_variance
from suite_player import SuitePlayer

UNITS = (16, 64)
CHUNK_BYTES = 2**30
"""Of float32 copies made at a time."""


class Planes:
    """What is kept of every unit of one size; float32, [num_contexts, num_kv_heads, num_units, head_dim] each."""

    def __init__(self, size: int, like: torch.Tensor) -> None:
        """like: the keys, [num_contexts, num_kv_heads, num_tokens, head_dim]."""
        self.size = size
        shape = (*like.shape[:2], like.shape[2] // size, like.shape[3])
        self.mean, self.variance, self.value, self.value_coded = (
            torch.zeros(shape, dtype=torch.float32, device=like.device) for _ in range(4)
        )

    def put(self, where: tuple[object, ...], keys: torch.Tensor, values: torch.Tensor, count: torch.Tensor) -> None:
        """keys, values: [..., size, head_dim], float32, zero past the count; count: tokens there, broadcastable."""
        mean = keys.sum(-2) / count
        rest = torch.arange(self.size, device=keys.device) < count
        variance = ((keys - mean.unsqueeze(-2)).square() * rest.unsqueeze(-1)).sum(-2) / count
        value = values.sum(-2) / count
        self.mean[where] = coded(mean)
        self.variance[where] = code_variance(variance)
        self.value[where] = value
        self.value_coded[where] = coded(value)


def code_variance(variance: torch.Tensor) -> torch.Tensor:
    """As the device's kernels keep it: 3-bit codes on a GPU, 8-bit ones on the CPU."""
    if variance.is_cuda:
        return coded_variance(variance)
    step = variance.amax(-1, keepdim=True) / 255
    return (variance / step.clamp(min=1e-30)).round() * step


class LayerStore:
    """One layer."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values: [num_contexts, num_kv_heads, num_tokens, head_dim], a multiple of 64 tokens, finite."""
        self.keys, self.values = keys, values
        self.rows = torch.arange(keys.shape[0], device=keys.device)
        self.planes = {size: Planes(size, keys) for size in UNITS}
        each = 4 * keys[0].numel()
        chunk = max(1, CHUNK_BYTES // each)
        for first in range(0, keys.shape[0], chunk):
            part = slice(first, first + chunk)
            for size, planes in self.planes.items():
                count = torch.full((1,), float(size), device=keys.device)
                k, v = (x[part].float().unflatten(2, (-1, size)) for x in (keys, values))
                planes.put((part,), k, v, count)

    def write(self, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """One token of each context, and the summaries of its units, of what is there up to this token.

        positions: [num_contexts], int64; k, v: [num_contexts, num_kv_heads, head_dim].
        """
        self.keys[self.rows, :, positions] = k
        self.values[self.rows, :, positions] = v
        for size, planes in self.planes.items():
            unit = positions // size
            places = unit[:, None] * size + torch.arange(size, device=k.device)
            is_there = (places <= positions[:, None])[:, :, None, None]
            parts = []
            for cache in (self.keys, self.values):
                part = cache[self.rows[:, None], :, places].float()  # [num_contexts, size, num_kv_heads, head_dim]
                parts.append(torch.where(is_there, part, 0.0).transpose(1, 2))
            count = (positions - unit * size + 1).float()[:, None, None]
            planes.put((self.rows, slice(None), unit), *parts, count)


def copy_of(player: SuitePlayer) -> list[LayerStore]:
    """What a player has read, of all its scripts."""
    s = player.runner.attention_shape
    scripts, pages = player._scripts, player._pages
    longest = max(len(script.token_ids) + script.max_tokens for script in scripts)
    size = (len(scripts), s.num_kv_heads, -(-longest // max(UNITS)) * max(UNITS), s.head_dim)
    layers = []
    for layer in range(s.num_layers):
        keys, values = (torch.zeros(size, dtype=s.dtype, device=s.device) for _ in range(2))
        for row, (script, own) in enumerate(zip(scripts, pages, strict=True)):
            read = player.runner.attention.read_cache(layer, own, script.start)
            keys[row, :, : script.start], values[row, :, : script.start] = read
        layers.append(LayerStore(keys, values))
    return layers


def num_bytes(layers: Sequence[LayerStore]) -> int:
    """Of all tensors."""
    per_layer = [[s.keys, s.values, *(x for p in s.planes.values() for x in vars(p).values() if torch.is_tensor(x))]
                 for s in layers]  # fmt: skip
    return sum(x.numel() * x.element_size() for tensors in per_layer for x in tensors)
