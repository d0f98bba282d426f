"""How many requests come, and of what size: the predictor lets as many more arrive while it runs the queue forward."""

from __future__ import annotations

from collections import deque

WINDOW_S = 60.0
LEAST_ARRIVALS = 5
"""With fewer in the window nothing is said of more to come."""

MOST_ARRIVALS = 4096
SHORTEST_S = 5.0
"""A few that come at once are no rate."""


class Arrivals:
    """Of the last WINDOW_S seconds. Times are those of one clock."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=MOST_ARRIVALS)
        self._num_tokens = self._num_limits = 0
        self._first_s: float | None = None

    def observe(self, now_s: float, num_tokens: int, max_tokens: int) -> None:
        """A request came with so many prompt tokens to compute and so many to generate at most."""
        if self._first_s is None:
            self._first_s = now_s
        if len(self._recent) == MOST_ARRIVALS:
            self._forget()
        self._recent.append((now_s, num_tokens, max_tokens))
        self._num_tokens += num_tokens
        self._num_limits += max_tokens

    def rate(self, now_s: float) -> float:
        """Requests a second; 0 while too few are known."""
        recent = self._recent
        while recent and now_s - recent[0][0] > WINDOW_S:
            self._forget()
        if len(recent) < LEAST_ARRIVALS or self._first_s is None:
            return 0.0
        if len(recent) < MOST_ARRIVALS and now_s - self._first_s > WINDOW_S:
            return len(recent) / WINDOW_S
        # The span begins with an arrival: that one does not count.
        return (len(recent) - 1) / max(now_s - recent[0][0], SHORTEST_S)

    @property
    def mean_size(self) -> tuple[float, float]:
        """(prompt tokens to compute, max_tokens) of a recent request."""
        count = max(len(self._recent), 1)
        return self._num_tokens / count, self._num_limits / count

    def _forget(self) -> None:
        _, num_tokens, max_tokens = self._recent.popleft()
        self._num_tokens -= num_tokens
        self._num_limits -= max_tokens
