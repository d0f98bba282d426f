"""Seconds by feature: what the engine has learnt of its steps, as it is sent to the server and kept in a file."""

from __future__ import annotations

import functools
from bisect import bisect_right
from itertools import accumulate, pairwise
from operator import mul

import msgspec

from vashista.engine.predict.features import COUNTS, FEW_TOKENS, KNOTS, NUM_FEATURES, StepFeatures

_WIDTHS = tuple(end - start for start, end in pairwise(KNOTS))
"""Tokens from each knot to the next."""
MAX_S = 3600.0
"""No step takes so long; a file that says so is not the engine's."""


class StepCoefficients(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A step takes `base_s`, a part that rises with its tokens, and so much for each count; none is negative."""

    base_s: float
    """Of a step with one token that attends to nothing."""
    per_token_s: list[float]
    """Of one more token, from each knot on; [len(KNOTS)]."""
    counts_s: list[float]
    """Of one more of each of COUNTS."""
    gap_s: float = 0.0
    """Between two steps: news sent, requests taken in."""
    num_steps: int = 0
    """Steps that taught it, those of earlier engines included."""

    def __post_init__(self) -> None:
        if len(self.per_token_s) != len(KNOTS) or len(self.counts_s) != len(COUNTS):
            raise ValueError("per_token_s or counts_s is of another length")
        if not all(0.0 <= value <= MAX_S for value in (*self.vector(), self.gap_s)):
            raise ValueError(f"a coefficient is not between 0 and {MAX_S:.0f} s")

    @classmethod
    def of(cls, vector: list[float], *, gap_s: float = 0.0, num_steps: int = 0) -> StepCoefficients:
        """From [NUM_FEATURES] numbers in the order of `StepFeatures.vector`."""
        assert len(vector) == NUM_FEATURES
        middle = 1 + len(KNOTS)
        return cls(
            base_s=vector[0],
            per_token_s=vector[1:middle],
            counts_s=vector[middle:],
            gap_s=gap_s,
            num_steps=num_steps,
        )

    def scaled(self, few: float, many: float) -> StepCoefficients:
        """Steps of up to FEW_TOKENS tokens take `few` times as long, those of more `many` times.

        Between the two, seconds rise from the one knot to the next, and nowhere fall.
        """
        at_knots = [(few if knot <= FEW_TOKENS else many) * at for knot, at in zip(KNOTS, self.at_knots, strict=True)]
        at_knots = list(accumulate(at_knots, max))
        rises = [
            (above - below) / (end - start)
            for below, above, start, end in zip(at_knots, at_knots[1:], KNOTS, KNOTS[1:], strict=False)
        ]
        return msgspec.structs.replace(
            self,
            base_s=at_knots[0],
            per_token_s=[*rises, many * self.per_token_s[-1]],
            counts_s=[
                (many if name == "prompt_pairs" else few) * count_s
                for name, count_s in zip(COUNTS, self.counts_s, strict=True)
            ],
        )

    def vector(self) -> list[float]:
        """[NUM_FEATURES]"""
        return [self.base_s, *self.per_token_s, *self.counts_s]

    def count_s(self, name: str) -> float:
        """Seconds of one more of a count."""
        return self.counts_s[COUNTS.index(name)]

    def tokens_s(self, num_tokens: float) -> float:
        """Base and tokens, without the counts."""
        index = bisect_right(KNOTS, num_tokens) - 1
        if index < 0:
            return self.base_s
        return self.at_knots[index] + (num_tokens - KNOTS[index]) * self.per_token_s[index]

    def step_s(self, features: StepFeatures) -> float:
        """Seconds of a step, without the gap behind it."""
        total_s = self.tokens_s(features.num_tokens)
        for name, count_s in zip(COUNTS, self.counts_s, strict=True):
            total_s += getattr(features, name) * count_s
        return total_s

    @functools.cached_property
    def at_knots(self) -> list[float]:
        """`tokens_s` at each knot."""
        return list(accumulate(map(mul, self.per_token_s, _WIDTHS), initial=self.base_s))
