"""How many tokens requests generate before they end by themselves, learnt from those that ended; max_tokens is a limit.

A hazard for each stretch of lengths (1, 2 to 3, 4 to 7, ...): ends there divided by tokens generated there, so that
requests which reached their max_tokens teach as much as those that stopped (Kaplan and Meier's estimate, binned).
From it follows what a request that has generated g tokens and may generate M will still generate on average.
"""

from __future__ import annotations

import math
from array import array

NUM_BINS = 24
FORGET_TOKENS = 200_000.0
"""Tokens of one stretch after which an old one counts 1/e."""
FIRST_TOKENS, FIRST_STOPS = 200.0, 0.1
"""The guess that each stretch begins with: one end in 2,000 tokens."""


class OutputLengths:
    """For one model; all its requests together."""

    def __init__(self) -> None:
        self._tokens = [FIRST_TOKENS] * NUM_BINS
        self._stops = [FIRST_STOPS] * NUM_BINS
        self.num_requests = 0
        self._rebuild()

    def observe(self, num_tokens: int, *, has_stopped: bool) -> None:
        """A request generated so many tokens; whether it ended by itself, not at its limit."""
        if num_tokens < 1:
            return
        self.num_requests += 1
        last = min(num_tokens.bit_length() - 1, NUM_BINS - 1)
        for index in range(last + 1):
            spent = min(num_tokens + 1, 2 << index) - (1 << index)
            keep = math.exp(-spent / FORGET_TOKENS)
            self._tokens[index] = self._tokens[index] * keep + spent
            self._stops[index] *= keep
        self._stops[last] += has_stopped
        self._rebuild()

    def remaining(self, num_generated: int, max_tokens: int) -> float:
        """Mean number of tokens still to come, with the one that is next; at most what the limit leaves."""
        left = max_tokens - num_generated
        if left <= 1:
            return float(max(left, 0))
        survival, below = self._at(num_generated)
        _, until = self._at(max_tokens)
        return min(float(left), max(1.0, (until - below) / max(survival, 1e-12)))

    def state(self) -> tuple[list[float], list[float]]:
        """Tokens and ends of each stretch: to be kept in a file."""
        return list(self._tokens), list(self._stops)

    def restore(self, state: tuple[list[float], list[float]]) -> None:
        """Go on from a state. ValueError if it is none."""
        tokens, stops = state
        if not len(tokens) == len(stops) == NUM_BINS or not all(
            0 <= s <= t for s, t in zip(stops, tokens, strict=True)
        ):
            raise ValueError("these are no output lengths")
        self._tokens, self._stops = [max(count, 1.0) for count in tokens], [max(count, 1e-6) for count in stops]
        self._rebuild()

    def _at(self, length: int) -> tuple[float, float]:
        """Share of requests that generate more than `length` tokens, and the mean of min(tokens, length)."""
        if length < 1:
            return 1.0, 0.0
        index = min(length.bit_length() - 1, NUM_BINS - 1)
        survival, area, hazard = self.table[3 * index : 3 * index + 3]
        inside = length + 1 - (1 << index)
        decay = math.exp(-hazard * inside)
        return survival * decay, area + survival * (1.0 - decay) / hazard

    def _rebuild(self) -> None:
        table = array("d")
        survival, area = 1.0, 0.0
        for index in range(NUM_BINS):
            hazard = -math.log1p(-min(self._stops[index] / self._tokens[index], 0.999))
            table.extend((survival, area, hazard))
            decay = math.exp(-hazard * (1 << index))
            area += survival * (1.0 - decay) / hazard
            survival *= decay
        self.table = table
        """[NUM_BINS * 3]: survival and area before each stretch, hazard in it; native.c reads it, too."""
