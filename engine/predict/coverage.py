"""Whether intervals hold what they promise: the share of the last outcomes inside, and an alarm when it is too low.

Share and width are of all outcomes. The alarm judges settled intervals alone: a guess from too few outcomes promises
nothing yet, and a server that has just started is no machine that drifts.
"""

from __future__ import annotations

import math
from collections import deque

WINDOW = 200
LEAST = 50
"""No alarm with fewer settled outcomes."""
ALARM_DEVIATIONS, CALM_DEVIATIONS = 3.1, 1.3
"""Standard deviations of a fair share: below the first an honest interval is found once in a thousand looks."""


class LiveCoverage:
    """Of one quantity."""

    def __init__(self, target: float) -> None:
        self._target = target
        self._recent: deque[tuple[bool, float]] = deque(maxlen=WINDOW)
        self._num_inside = 0
        self._width = 0.0
        self._settled: deque[bool] = deque(maxlen=WINDOW)
        self._num_settled_inside = 0
        self.is_drifting = False

    def add(self, *, is_inside: bool, width: float, is_settled: bool = True) -> None:
        """One outcome; width: of its interval, relative to the median; is_settled: `Bounds.is_settled`."""
        if len(self._recent) == WINDOW:
            was_inside, old_width = self._recent[0]
            self._num_inside -= was_inside
            self._width -= old_width
        self._recent.append((is_inside, width))
        self._num_inside += is_inside
        self._width += width
        if is_settled:
            self._judge(is_inside=is_inside)

    def _judge(self, *, is_inside: bool) -> None:
        """Raise or end the alarm after a settled outcome."""
        if len(self._settled) == WINDOW:
            self._num_settled_inside -= self._settled[0]
        self._settled.append(is_inside)
        self._num_settled_inside += is_inside
        count = len(self._settled)
        if count >= LEAST:
            deviations = CALM_DEVIATIONS if self.is_drifting else ALARM_DEVIATIONS
            least = count * self._target - deviations * math.sqrt(count * self._target * (1 - self._target))
            self.is_drifting = self._num_settled_inside < least

    @property
    def settled_share(self) -> float:
        """What the alarm judges: of the last settled outcomes, those inside; 1 before the first."""
        return self._num_settled_inside / len(self._settled) if self._settled else 1.0

    @property
    def num_outcomes(self) -> int:
        """That the share is of."""
        return len(self._recent)

    @property
    def share(self) -> float:
        """Of the last outcomes, those inside; 1 before the first."""
        return self._num_inside / len(self._recent) if self._recent else 1.0

    @property
    def width(self) -> float:
        """Mean width of their intervals, relative to the median; 0 before the first."""
        return self._width / len(self._recent) if self._recent else 0.0
