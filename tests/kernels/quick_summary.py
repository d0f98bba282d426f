"""Summaries by numpy, all of a cache at once: the bits that Triton's interpreter makes, in a hundredth of its time.

For tests of what reads summaries. test_key_summary.py compares the two.
"""

import numpy as np
import torch

from vashista.kernels.key_summary import Rule, SummaryLevel, summarize


def summarize_quickly(k_cache: torch.Tensor, slots: torch.Tensor, *levels: SummaryLevel) -> None:
    """As `key_summary.summarize`, which does it where the rule is not that of means and variances.

    slots: of the last tokens of units, and of requests.
    """
    if any(level.rule != Rule.MEAN_VARIANCE for level in levels):
        summarize(k_cache, slots, *levels)
        return
    page_size = k_cache.shape[2]
    for level in levels:
        unit = level.unit_tokens
        is_last = torch.cat((slots[1:] // unit != slots[:-1] // unit, torch.tensor([True])))
        ends = slots[is_last]
        pages, units, counts = ends // page_size, ends % page_size // unit, (ends % unit + 1).numpy()
        keys = k_cache[pages].unflatten(2, (-1, unit))[torch.arange(len(ends)), :, units].float().numpy()
        first, second, steps = _encode(keys, counts[:, None, None, None])
        for part, values in ((level.first, first), (level.second, second), (level.steps, steps)):
            part[pages, :, units] = torch.from_numpy(values)


def _encode(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """keys: [num_units, num_kv_heads, unit, head_dim], of which `counts` count; the level's three parts of these."""
    zero, half = np.float32(0), np.float32(0.5)
    is_key = np.arange(keys.shape[2])[:, None] < counts
    share = _one_by(counts[..., 0].astype(np.float32), 0.0)
    mean = np.where(is_key, keys, zero).sum(2) * share
    step = np.abs(mean).max(-1, keepdims=True) / np.float32(127)
    code = np.clip(np.floor(mean * _one_by(step, 1e-36) + half), np.float32(-127), np.float32(127)).astype(np.int8)
    away = np.where(is_key, keys - (code.astype(np.float32) * step)[:, :, None], zero)
    radius = np.sqrt((away * away).sum(3).max(2)) * np.float32(1.00003) + np.float32(2e-18)
    off = np.where(is_key, keys - mean[:, :, None], zero)
    variance = (off * off).sum(2) * share
    most = variance.max(-1, keepdims=True)
    nibble = np.minimum(np.floor(np.sqrt(variance * _one_by(most, 1e-34, 49)) + half), np.float32(7)).astype(np.uint8)
    # byte 4w + 2h + b of the plane: numbers 4w + 2b and 4w + 2b + 1 of half h
    words = nibble.reshape(*nibble.shape[:2], 2, -1, 2, 2).swapaxes(2, 3)
    packed = (words[..., 0] | words[..., 1] << 4).reshape(*nibble.shape[:2], -1)
    steps = np.stack((step[..., 0], most[..., 0] / np.float32(127), radius, np.zeros_like(radius)), -1)
    return code.view(np.uint8), packed, steps


def _one_by(values: np.ndarray, least: float, one: int = 1) -> np.ndarray:
    """Reciprocals; 0 of what is not above `least`."""
    least = np.float32(least)
    return np.where(values > least, np.float32(one) / np.maximum(values, least), np.float32(0))
