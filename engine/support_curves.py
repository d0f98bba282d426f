"""Tokens kept against dropped mass for every KV head, between and beyond the points that a calibration measured.

`engine/support_profile.py` asks. Between measured points log tokens runs straight in log context and in log mass.
Outside of them:

- a context above the last: the trend of the last two contexts, or flat where that falls; with one context measured,
  in proportion to the context;
- a context below the first: as at the first;
- a mass above the largest target: as at that target;
- a mass below the smallest target: as the trend of the last two targets, and at least in proportion to 1 / mass, since
  nothing was measured there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MAX_LOG_TOKENS = 40.0
"""A steep trend may ask for more tokens than a float holds; the caller keeps no more than there are."""


class SupportCurves:
    """Of one profile; contexts ascend, targets descend, tokens: [num_layers][num_kv_heads][contexts][targets]."""

    def __init__(self, tokens: list[list[list[list[int]]]], contexts: Sequence[int], targets: Sequence[float]) -> None:
        self._tokens = np.log(np.asarray(tokens, dtype=np.float64))
        self._contexts = np.log(np.asarray(contexts, dtype=np.float64))
        self._targets = np.log(np.asarray(targets, dtype=np.float64))

    def tokens(self, context_len: int, mass: float) -> Floats:
        """[num_layers, num_kv_heads]: tokens to keep for a dropped mass above 0."""
        points, logs, log_mass = self._points(context_len), self._targets, math.log(mass)
        found = points[..., 0]
        if log_mass < logs[-1]:
            found = points[..., -1] + self._slope(points) * (logs[-1] - log_mass)
        elif log_mass < logs[0]:
            right = int(np.searchsorted(-logs, -log_mass))
            share = (logs[right - 1] - log_mass) / (logs[right - 1] - logs[right])
            found = points[..., right - 1] + (points[..., right] - points[..., right - 1]) * share
        tokens: Floats = np.exp(np.minimum(found, MAX_LOG_TOKENS))
        return tokens

    def mass(self, context_len: int, num_tokens: int) -> Floats:
        """[num_layers, num_kv_heads]: the dropped mass with so many tokens kept; the inverse of `tokens`."""
        points, budget = self._points(context_len), math.log(num_tokens)
        # Keeping one token is taken to drop everything: the start of the curve, above the largest target.
        xs = np.concatenate([np.zeros_like(points[..., :1]), points], axis=2)
        ys = np.concatenate([[0.0], self._targets])
        last = np.maximum((xs <= budget).sum(axis=2) - 1, 0)  # the smallest mass measured within the budget
        after = np.minimum(last + 1, len(ys) - 1)
        x0, x1 = (np.take_along_axis(xs, i[..., None], axis=2)[..., 0] for i in (last, after))
        share = np.divide(budget - x0, x1 - x0, out=np.zeros_like(x0), where=x1 > x0)
        measured = ys[last] + (ys[after] - ys[last]) * share
        beyond = self._targets[-1] - (budget - points[..., -1]) / self._slope(points)
        mass: Floats = np.exp(np.where(last == len(ys) - 1, beyond, measured))
        return mass

    def _points(self, context_len: int) -> Floats:
        """Log tokens at each target for this context: [num_layers, num_kv_heads, targets], not falling."""
        logs, contexts = self._tokens, self._contexts
        x = max(math.log(context_len), float(contexts[0]))
        found: Floats
        if len(contexts) == 1:
            found = logs[:, :, 0] + (x - contexts[0])
            return found
        right = int(np.clip(np.searchsorted(contexts, x), 1, len(contexts) - 1))
        left = right - 1
        slope = (logs[:, :, right] - logs[:, :, left]) / (contexts[right] - contexts[left])
        if x > contexts[-1]:
            grown = logs[:, :, -1] + np.maximum(slope, 0.0) * (x - contexts[-1])
            # Trends of different targets may cross; a smaller mass never needs fewer tokens.
            found = np.maximum.accumulate(grown, axis=2)
        else:
            found = logs[:, :, left] + slope * (x - contexts[left])
        return found

    def _slope(self, points: Floats) -> Floats:
        """Growth of log tokens per fall of log mass below the smallest target: [num_layers, num_kv_heads], >= 1."""
        if len(self._targets) == 1:
            return np.ones(points.shape[:2])
        slope: Floats = (points[..., -1] - points[..., -2]) / (self._targets[-2] - self._targets[-1])
        return np.maximum(slope, 1.0)
