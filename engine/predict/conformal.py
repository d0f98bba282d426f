"""Intervals from what earlier predictions missed by: split conformal, on a sliding window, with adaptive levels.

For each quantity and regime (`predictor.py` tells them apart: Mondrian categories) the last WINDOW values of
log((outcome + hitch) / (forecast + hitch)) / scale are kept; the scale says how uncertain the forecast itself held the
request to be, the hitch what may happen to it however short the forecast: a reply of 3 ms a token that long prompts
join takes 300, one of 250 ms that no more join 3, and by ratios alone the upper bound of the one were a hundred times
the other's. ALONE expects nobody and has no hitch. With n values, the lower bound is the one of rank alpha * (n + 1)
from below and the upper one that from above, each with its own alpha: as long as outcomes are exchangeable each is
missed by alpha (Vovk, Gammerman and Shafer 2005; Lei et al., JASA 113, 2018). Where the rank falls between two, so does
the bound, which misses by alpha on average (definition 6 of Hyndman and Fan, American Statistician 50, 1996); the next
whole rank would miss by less than was stated, and from 20 values be the last. Outcomes are not exchangeable when load
or machine change, so each alpha follows its own misses, alpha += STEP * (target - missed), which keeps the long-run
share of misses at the target whatever comes (Gibbs and Candes, NeurIPS 2021). The median of the same values corrects
the forecast itself, as far as they prove it wrong: of the ranks that the true median may have (four standard deviations
to either side: neighbours are alike) the one whose value is nearest to 0 is taken. A median that follows every run of
slow outcomes comes later than the forecast, which has seen the same steps.

With fewer than LEAST_OUTCOMES no finite interval can promise its coverage: one of nineteen values cannot be missed by
less than one in twenty. Until then a regime guesses: what all regimes of its quantity missed by lately, and at first no
closer than FIRST_WIDTH; but ALONE takes nothing from those that others meet. Guesses are called that
(`Bounds.is_settled`), do not move the levels and raise no alarm. No bound lies beyond what was seen, nor further than
WIDEST from its median (both and the hitch), so that an interval always says something; where more would be needed,
outcomes are missed, and the live coverage tells (`engine/predict/coverage.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vashista.engine.predict.prediction import Interval

ALONE = "alone"
"""The regime of requests that meet nobody: nobody is there and nobody is expected."""
COVERAGE = 0.9
WINDOW = 300
STEP = 0.03
"""Replayed over recorded runs, 0.03 kept closer to 90 % than 0.01, with narrower intervals:
docs/prediction-findings.md."""
LEAST_ALPHA, MOST_ALPHA = 0.002, 0.2
LEAST_OUTCOMES = 20
"""From so many on a regime speaks for itself."""
FIRST_WIDTH = 0.5
"""Log half width of the first guess."""
WIDEST = math.log(10.0)
"""Log of how many times its median a bound may be, or the median a bound."""
LEAST_SHARE = 0.01
"""Of its median a lower bound is at least, where hitches may be longer than that."""
MAX_LOG = 8.0
TAIL_ALPHA = (1 - COVERAGE) / 2


class Bounds(NamedTuple):
    """Of log((outcome + hitch) / (forecast + hitch)) / scale."""

    low: float
    middle: float
    high: float
    is_settled: bool = False
    """Whether enough outcomes of the regime itself speak; else it is a guess."""

    def around(self, forecast: float, scale: float = 1.0, hitch: float = 0.0) -> Interval:
        """The interval of a forecast above 0."""
        low, place, high, _ = self
        factor = math.exp(place * scale)
        middle, whole = forecast * factor, (forecast + hitch) * factor
        below, above = min((place - low) * scale, WIDEST), min((high - place) * scale, WIDEST)
        if hitch == 0.0:
            return Interval(middle, middle * math.exp(-below), middle * math.exp(above))
        lower, upper = whole * math.exp(-below) - hitch, whole * math.exp(above) - hitch
        return Interval(middle, min(max(lower, LEAST_SHARE * middle), middle), max(upper, middle))


@dataclass(slots=True)
class Quantiles:
    """The last errors of one regime, and its levels."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    ordered: list[float] = field(default_factory=list)
    low_alpha: float = TAIL_ALPHA
    high_alpha: float = TAIL_ALPHA
    _bounds: Bounds | None = None

    def add(self, error: float) -> None:
        """One more; the oldest goes."""
        if len(self.recent) == WINDOW:
            del self.ordered[bisect_left(self.ordered, self.recent[0])]
        self.recent.append(error)
        insort(self.ordered, error)
        self._bounds = None

    def bounds(self) -> Bounds:
        """Of the next error."""
        if self._bounds is None:
            self._bounds = self._work_out()
        return self._bounds

    def _work_out(self) -> Bounds:
        values, count = self.ordered, len(self.ordered)
        low = _at(values, count - 1 - _place(count, self.low_alpha))
        high = _at(values, _place(count, self.high_alpha))
        return Bounds(low, self._middle(), high, count >= LEAST_OUTCOMES)

    def _middle(self) -> float:
        """The median as far as it is sure; 0 while it is not."""
        values, count = self.ordered, len(self.ordered)
        first = math.floor(count / 2 - 2.0 * math.sqrt(count))
        if first < 0:
            return 0.0
        return max(values[first], min(0.0, values[count - 1 - first]))

    def learn(self, error: float, bounds: Bounds) -> None:
        """Move the levels after an error for which those were the bounds."""
        self.low_alpha = _within(self.low_alpha + STEP * (TAIL_ALPHA - (error < bounds.low)))
        self.high_alpha = _within(self.high_alpha + STEP * (TAIL_ALPHA - (error > bounds.high)))
        self._bounds = None


class Conformal:
    """One quantity, in all regimes. An outcome must come with the bounds that were given for it."""

    def __init__(self) -> None:
        self._regimes: dict[str, Quantiles] = {}
        self._all = Quantiles()

    def bounds(self, regime: str) -> Bounds:
        """Of the next error."""
        count = self.num_outcomes(regime)
        if count >= LEAST_OUTCOMES:
            return self._regimes[regime].bounds()
        known = self._regimes.get(regime) if regime == ALONE else self._all
        if known is None or not known.ordered:
            return Bounds(-FIRST_WIDTH, 0.0, FIRST_WIDTH)
        low, middle, high, _ = known.bounds()
        least = FIRST_WIDTH * (1.0 - count / LEAST_OUTCOMES)
        return Bounds(min(low, middle - least), middle, max(high, middle + least))

    def num_outcomes(self, regime: str) -> int:
        """Outcomes of the regime itself; below LEAST_OUTCOMES its intervals are guesses."""
        own = self._regimes.get(regime)
        return 0 if own is None else len(own.ordered)

    def observe(
        self,
        forecast: float,
        bounds: Bounds,
        outcome: float,
        regimes: Sequence[str],
        scale: float = 1.0,
        hitch: float = 0.0,
    ) -> None:
        """Learn from an outcome above 0 for whose forecast those were the bounds.

        regimes: that it is an outcome of; the bounds were the first one's. hitch: of all of them but ALONE.
        """
        error = _error(forecast + hitch, outcome + hitch, scale)
        errors = {regime: _error(forecast, outcome, scale) if regime == ALONE else error for regime in regimes}
        known = {regime: self._regimes.setdefault(regime, Quantiles()) for regime in regimes}
        if bounds.is_settled:
            known[regimes[0]].learn(errors[regimes[0]], bounds)
        for regime, own in known.items():
            own.add(errors[regime])
            own.bounds()  # now, and not while a request waits for its prediction
        self._all.add(error)
        self._all.bounds()

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


def _error(forecast: float, outcome: float, scale: float) -> float:
    return max(-MAX_LOG, min(MAX_LOG, math.log(outcome / forecast) / scale))


def _place(count: int, alpha: float) -> float:
    """Rank from 0 of what the next value is above with a chance of alpha; the last where more were needed."""
    return min((1.0 - alpha) * (count + 1), count) - 1.0


def _at(values: Sequence[float], place: float) -> float:
    """At a rank between two values, so far between them."""
    index = int(place)
    rest = place - index
    return values[index] + rest * (values[index + 1] - values[index]) if rest > 0.0 else values[index]


def _within(alpha: float) -> float:
    return max(LEAST_ALPHA, min(MOST_ALPHA, alpha))
