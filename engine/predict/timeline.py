"""What a simulation found: when the own requests begin, and when they have how many tokens. No torch here."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from vashista.engine.predict.features import COLD_KEEP


class Point(NamedTuple):
    """How far the last of the own requests is."""

    num_tokens: float
    time_s: float
    busy_s: float
    """Of all own requests."""
    cold_share: float = 0.0
    """Of the time since the point before: what fell with each step."""


POINT = len(Point._fields)


@dataclass(slots=True)
class Timeline:
    """What becomes of the own requests; times are those of the clock that the simulation was given."""

    runs_s: float = math.inf
    """When the first of them begins to run."""
    first_s: float = math.inf
    """When its first token is there."""
    numbers: array[float] = field(default_factory=lambda: array("d"))
    """[num_points * POINT]: from the first token of the last of them to its end. An object for each point would take
    longer to make than a short queue to run forward."""
    num_steps: float = 0.0
    num_events: int = 0
    _last: tuple[float, tuple[float, float]] | None = None
    """What `at` was asked last, and what it said: several quantities are told of the same number of tokens."""

    @property
    def num_points(self) -> int:
        """From the first token on."""
        return len(self.numbers) // POINT

    def note(self, point: Point) -> None:
        """One more, the last."""
        self.numbers.extend(point)
        self._last = None

    def point(self, index: int) -> Point:
        """The first is 0, the last -1."""
        start = index % self.num_points * POINT
        return Point(*self.numbers[start : start + POINT])

    def at(self, num_tokens: float) -> tuple[float, float]:
        """(time, busy seconds) when the last of them has so many tokens."""
        if self._last is None or self._last[0] != num_tokens:
            self._last = num_tokens, self._find(num_tokens)
        return self._last[1]

    def _find(self, num_tokens: float) -> tuple[float, float]:
        for index, reached in enumerate(self.numbers[::POINT]):
            if reached >= num_tokens:
                return _between(self.point(max(index - 1, 0)), self.point(index), num_tokens)
        last = self.point(-1)
        return last.time_s, last.busy_s


def _between(before: Point, point: Point, num_tokens: float) -> tuple[float, float]:
    width, part = point.num_tokens - before.num_tokens, num_tokens - before.num_tokens
    share = part / width if width > 0.0 else 1.0
    if point.cold_share and 0.0 < share < 1.0:
        share += point.cold_share * ((1.0 - COLD_KEEP**part) / (1.0 - COLD_KEEP**width) - share)
    time_s = before.time_s + (point.time_s - before.time_s) * share
    return time_s, before.busy_s + (point.busy_s - before.busy_s) * share
