"""When captures of CUDA graphs that failed for want of memory may be tried again; `DecodeGraphs` asks.

Memory comes back, as when long requests end, so nothing is given up for good. But a capture that fails costs every
graph of its kind, so tries are rare: after a failure its kind waits FIRST_PAUSE_S, twice as long after each further one
up to LONGEST_PAUSE_S, and the key that failed waits LONGEST_PAUSE_S. A kind that went well for as long begins anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 30.0, 3600.0
_MAX_KEYS = 1024


class CapturePause:
    """Of one kind of graphs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: seconds, never going back."""
        self._clock = clock
        self._pause_s = FIRST_PAUSE_S
        self._until_s: float | None = None
        self._failed: OrderedDict[Hashable, float] = OrderedDict()
        """Until when each key waits, oldest first."""
        self.num_failures = 0

    def begin(self, key: Hashable) -> float:
        """The capture of a key has failed: seconds until others of its kind may be tried."""
        now_s = self._clock()
        if self._until_s is not None:
            is_calm = now_s - self._until_s > LONGEST_PAUSE_S
            self._pause_s = FIRST_PAUSE_S if is_calm else min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._until_s = now_s + self._pause_s
        self._failed.pop(key, None)
        self._failed[key] = now_s + LONGEST_PAUSE_S
        while len(self._failed) > _MAX_KEYS:
            self._failed.popitem(last=False)
        self.num_failures += 1
        return self._pause_s

    @property
    def holds(self) -> bool:
        """Whether nothing of this kind is to be tried now."""
        return self._until_s is not None and self._clock() < self._until_s

    def holds_key(self, key: Hashable) -> bool:
        """Whether this key is not to be tried now."""
        if self.holds:
            return True
        until_s = self._failed.get(key)
        if until_s is None or self._clock() < until_s:
            return until_s is not None
        del self._failed[key]
        return False
