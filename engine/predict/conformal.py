"""Intervals from what earlier predictions missed by: split conformal, on a sliding window, with adaptive levels.

For each quantity and regime (how loaded, dense or sparse) the last WINDOW values of log(outcome / forecast) / scale are
kept; the scale says how uncertain the forecast itself held the request to be. With n of them, the lower bound is the
value of rank alpha * (n + 1) from below and the upper one that from above, each with its own alpha: as long as outcomes
are exchangeable each is missed by alpha at most (Vovk, Gammerman and Shafer 2005; Lei et al., JASA 113, 2018). They are
not exchangeable when load or machine change, so each alpha follows its own misses, alpha += STEP * (target - missed),
which keeps the long-run share of misses at the target whatever comes (Gibbs and Candes, NeurIPS 2021). The median of
the same values corrects the forecast itself.

A regime with few outcomes borrows from the others of its quantity; with none at all the first guess is wide.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from vashista.engine.predict.prediction import Interval

COVERAGE = 0.9
WINDOW = 300
STEP = 0.01
LEAST_ALPHA, MOST_ALPHA = 0.002, 0.2
LEAST_OUTCOMES = 20
"""From so many on a regime speaks for itself."""
FIRST_WIDTH = 0.5
"""Log half width of the first guess."""
MAX_LOG = 8.0
TAIL_ALPHA = (1 - COVERAGE) / 2


class Bounds(NamedTuple):
    """Of log(outcome / forecast) / scale."""

    low: float
    middle: float
    high: float

    def around(self, forecast: float, scale: float = 1.0) -> Interval:
        """The interval of a forecast above 0."""
        low, middle, high = (forecast * math.exp(error * scale) for error in self)
        return Interval(middle, low, high)


@dataclass(slots=True)
class Quantiles:
    """The last errors of one regime, and its levels."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    ordered: list[float] = field(default_factory=list)
    low_alpha: float = TAIL_ALPHA
    high_alpha: float = TAIL_ALPHA

    def add(self, error: float) -> None:
        """One more; the oldest goes."""
        if len(self.recent) == WINDOW:
            del self.ordered[bisect_left(self.ordered, self.recent[0])]
        self.recent.append(error)
        insort(self.ordered, error)

    def bounds(self) -> Bounds:
        """Of the next error."""
        values, count = self.ordered, len(self.ordered)
        middle = values[count // 2] if count % 2 else (values[count // 2 - 1] + values[count // 2]) / 2
        low = -self._high([-value for value in reversed(values)], self.low_alpha)
        return Bounds(low, middle, self._high(values, self.high_alpha))

    @staticmethod
    def _high(values: list[float], alpha: float) -> float:
        """The value that the next one is above with a chance of alpha."""
        place = (1.0 - alpha) * (len(values) + 1) - 1.0
        last = len(values) - 1
        if place > last:
            # Too few to say: beyond the largest by a part of what lies between it and the median.
            return values[-1] + (place - last) * max(values[-1] - values[last // 2], 0.02)
        return values[math.ceil(place)]

    def learn(self, error: float, bounds: Bounds) -> None:
        """Move the levels after an error for which those were the bounds."""
        self.low_alpha = _within(self.low_alpha + STEP * (TAIL_ALPHA - (error < bounds.low)))
        self.high_alpha = _within(self.high_alpha + STEP * (TAIL_ALPHA - (error > bounds.high)))


class Conformal:
    """One quantity, in all regimes. An outcome must come with the bounds that were given for it."""

    def __init__(self) -> None:
        self._regimes: dict[str, Quantiles] = {}
        self._all = Quantiles()

    def bounds(self, regime: str) -> Bounds:
        """Of the next error."""
        own = self._regimes.get(regime)
        if own is not None and len(own.ordered) >= LEAST_OUTCOMES:
            return own.bounds()
        if self._all.ordered:
            low, middle, high = self._all.bounds()
            few = max(0.0, 1.0 - len(self._all.ordered) / LEAST_OUTCOMES)
            return Bounds(low - few * FIRST_WIDTH, middle, high + few * FIRST_WIDTH)
        return Bounds(-FIRST_WIDTH, 0.0, FIRST_WIDTH)

    def num_outcomes(self, regime: str) -> int:
        """Outcomes that the interval rests on."""
        own = self._regimes.get(regime)
        count = 0 if own is None else len(own.ordered)
        return count if count >= LEAST_OUTCOMES else len(self._all.ordered)

    def observe(self, forecast: float, bounds: Bounds, outcome: float, regime: str, scale: float = 1.0) -> None:
        """Learn from an outcome above 0 for whose forecast those were the bounds."""
        error = max(-MAX_LOG, min(MAX_LOG, math.log(outcome / forecast) / scale))
        own = self._regimes.setdefault(regime, Quantiles())
        own.learn(error, bounds)
        own.add(error)
        self._all.add(error)

    def state(self) -> dict[str, list[float]]:
        """The last errors of each regime, and its two levels before them: to be kept in a file."""
        return {
            name: [own.low_alpha, own.high_alpha, *(round(error, 6) for error in own.recent)]
            for name, own in self._regimes.items()
        }

    def restore(self, state: dict[str, list[float]]) -> None:
        """Go on from a state."""
        for name, (low_alpha, high_alpha, *errors) in state.items():
            own = self._regimes[name] = Quantiles(low_alpha=_within(low_alpha), high_alpha=_within(high_alpha))
            for error in errors[-WINDOW:]:
                own.add(max(-MAX_LOG, min(MAX_LOG, error)))
                self._all.add(max(-MAX_LOG, min(MAX_LOG, error)))


def _within(alpha: float) -> float:
    return max(LEAST_ALPHA, min(MOST_ALPHA, alpha))
