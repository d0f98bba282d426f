"""What a `SupportForecast` learns of requests that have ended, as it is kept in a file.

No numpy here: the server reads the file before the kernel's filter is on, when it may have no threads.
"""

from __future__ import annotations

import math

import msgspec

LEARN = 0.05
"""Weight of a request in what is learnt, once as many have been heard of that their mean gives each no more."""
MAX_LOG_FACTOR = math.log(4.0)
"""One request counts as no further from the profile than that."""
GUESS_AUDITS = 20
"""So many audits that found what the profile says come before all others."""
KEPT_AUDITS = 1000
"""So many of the last count."""


class Learnt(msgspec.Struct, frozen=True):
    """Of one limit of the dropped mass."""

    num: int
    """Requests heard of."""
    log_factor: float
    """Log of how many times as many tokens as the profile says: their mean, and of many that of the last."""

    def after(self, log_factor: float) -> Learnt:
        """With one request more."""
        weight = max(LEARN, 1 / (self.num + 1))
        return Learnt(self.num + 1, self.log_factor + weight * (log_factor - self.log_factor))


class Dropped(msgspec.Struct, frozen=True):
    """Of all token budgets, over audits: the dropped mass that the profile says, and what was found."""

    num: float
    expected: float
    """Sum."""
    found: float
    """Sum."""

    @property
    def factor(self) -> float:
        """How many times as much is dropped as the profile says."""
        guess = GUESS_AUDITS * self.expected / self.num if self.num else 1.0
        return (guess + self.found) / (guess + self.expected)

    def after(self, num: int, expected: float, found: float) -> Dropped:
        """With so many audits more, of these means."""
        kept = min(1.0, KEPT_AUDITS / (self.num + num))
        return Dropped(
            kept * (self.num + num), kept * (self.expected + num * expected), kept * (self.found + num * found)
        )


class SavedSupport(msgspec.Struct, frozen=True):
    """What a `SupportForecast` has learnt."""

    learnt: dict[float, Learnt]
    """By `max_dropped_mass`, the one heard of last comes last."""
    mass: Dropped
