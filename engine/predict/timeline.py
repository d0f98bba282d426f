"""What a simulation found: when the own requests begin, and when they have how many tokens. No torch here."""

from __future__ import annotations

import math
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


@dataclass(slots=True)
class Timeline:
    """What becomes of the own requests; times are those of the clock that the simulation was given."""

    runs_s: float = math.inf
    """When the first of them begins to run."""
    first_s: float = math.inf
    """When its first token is there."""
    points: list[Point] = field(default_factory=list)
    """From the first token of the last of them to its end."""
    num_steps: float = 0.0
    num_events: int = 0

    def at(self, num_tokens: float) -> tuple[float, float]:
        """(time, busy seconds) when the last of them has so many tokens."""
        before = self.points[0]
        for point in self.points:
            if point.num_tokens >= num_tokens:
                width, part = point.num_tokens - before.num_tokens, num_tokens - before.num_tokens
                share = part / width if width > 0.0 else 1.0
                if point.cold_share and 0.0 < share < 1.0:
                    share += point.cold_share * ((1.0 - COLD_KEEP**part) / (1.0 - COLD_KEEP**width) - share)
                time_s = before.time_s + (point.time_s - before.time_s) * share
                return time_s, before.busy_s + (point.busy_s - before.busy_s) * share
            before = point
        return before.time_s, before.busy_s
