"""The promise to running streams: no more than so many seconds between two of their tokens. No torch here.

`Scheduler` asks a `Pace` how many tokens of a prompt a step may read beside the streams. Expected times come from the
engine's step-time model; what steps really took corrects them: the limit is the promise divided by the worst ratio of
real to expected time of late, which is forgotten slowly.
"""

from __future__ import annotations

from collections.abc import Callable

LEAST_CHUNK = 16
"""Tokens of a prompt that a step reads whatever it takes, so that no prompt starves beside streams."""
FORGETTING = 0.98
"""Of the excess of the worst ratio a step; 1 % of it is left after 228 steps."""
MOST_SLACK = 4.0


class Pace:
    """The promise of one engine, and how it is kept."""

    def __init__(self, max_gap_s: float) -> None:
        assert max_gap_s > 0
        self.max_gap_s = max_gap_s
        self.num_gaps_total = 0
        """Steps that gave a running stream a token after an earlier one."""
        self.num_broken_total = 0
        """Those of them that came later than promised."""
        self._slack = 1.0

    @property
    def limit_s(self) -> float:
        """The most that a step may be expected to take."""
        return self.max_gap_s / self._slack

    def observe(self, expected_s: float, gap_s: float) -> None:
        """A running stream waited `gap_s` for its token, in a step expected to take `expected_s`."""
        self.num_gaps_total += 1
        self.num_broken_total += gap_s > self.max_gap_s
        matters = expected_s >= self.limit_s / 4 or gap_s > self.max_gap_s  # a short step may take twice its time
        ratio = gap_s / expected_s if matters and expected_s > 0 else 1.0
        self._slack = min(MOST_SLACK, max(1.0 + (self._slack - 1.0) * FORGETTING, ratio))


def promised_chunk(step_s: Callable[[int], float], most: int, limit_s: float, *, is_first: bool) -> int:
    """Tokens that a step reads of one prompt: what fits, 0 if that is too little; the first prompt always goes on."""
    least = min(LEAST_CHUNK, most)
    num_tokens = chunk_within(step_s, most, limit_s)
    if num_tokens >= least:
        return num_tokens
    return least if is_first else 0


def chunk_within(step_s: Callable[[int], float], most: int, limit_s: float) -> int:
    """The largest chunk of at most `most` tokens with which a step takes up to `limit_s`; 0 if none does.

    `step_s` gives the seconds of a step with a chunk of so many tokens. Where it falls somewhere, what is found fits,
    but may not be the largest.
    """
    if most <= 0 or step_s(most) <= limit_s:
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if step_s(middle) <= limit_s:
            low = middle
        else:
            high = middle
    return low
