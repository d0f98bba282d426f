"""Finds the requests that cannot be done by their deadline any more, of those that want to be ended then.

The engine asks before every step. A request is late when even alone on the engine, and if its output ended as soon as
it may, it would need more time than is left; as expected times are not certain, only what a fifth less time would not
help is ended. The time itself ends it in any case. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vashista.engine.predict.queue import never_stops
from vashista.engine.request import Request, Status
from vashista.engine.scheduler import BatchItem, Scheduler, StepEstimate

CAUTION = 0.8
"""Of the expected time that a request still needs, the share that counts."""


class Deadlines:
    """Of one engine."""

    def __init__(self, scheduler: Scheduler, estimate: Callable[[], StepEstimate]) -> None:
        """estimate: makes the estimate of an empty step."""
        self._scheduler = scheduler
        self._estimate = estimate
        self._requests: dict[str, tuple[Request, float]] = {}

    def add(self, request: Request) -> None:
        """Watch a request, if it asked for it."""
        if request.submit.stop_at_s is not None:
            self._requests[request.id] = (request, request.submit.stop_at_s)

    def late(self, now_s: float) -> Iterable[Request]:
        """Those that are to end now. Each is named once."""
        found = []
        for request, stop_at_s in list(self._requests.values()):
            left_s = stop_at_s - now_s
            if request.status is Status.FINISHED:
                del self._requests[request.id]
            elif left_s <= 0 or CAUTION * self._least_s(request, left_s) > left_s:
                del self._requests[request.id]
                found.append(request)
        return found

    def _least_s(self, request: Request, left_s: float) -> float:
        """What it still needs at least; the prefix cache is looked at only where that decides."""
        needed_s = self._from(request, request.num_computed_tokens)
        if CAUTION * needed_s > left_s and request.status is Status.WAITING:
            needed_s = self._from(request, self._scheduler.num_cached_tokens(request))
        return needed_s

    def _from(self, request: Request, num_computed: int) -> float:
        """The same, with so many of its tokens computed."""
        sampling, num_known = request.sampling, request.num_known_tokens
        most = self._scheduler.max_batch_tokens
        seconds, start = 0.0, num_computed
        while start < num_known:
            chunk = min(most, num_known - start)
            seconds += self._step_s(request, start, chunk)
            start += chunk
        num_more = max(1, sampling.min_tokens - request.num_output_tokens)
        if never_stops(sampling):
            num_more = max(1, sampling.max_tokens - request.num_output_tokens)
        return seconds + (num_more - 1) * self._step_s(request, num_known, 1)

    def _step_s(self, request: Request, start: int, num_tokens: int) -> float:
        return self._estimate().seconds(BatchItem(request, start, num_tokens))
