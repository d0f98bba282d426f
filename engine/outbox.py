"""The engine's reports on their way to the server: at once where somebody waits for a token, else a few together.

A reply that is not streamed is of no use before its end, yet each token of it would wake the server, on a CPU that the
engine could use. The news of such requests wait up to HOLD_S, unless they are the first or the last of their request;
any other news take them along. Each then says how old it is, so that latencies are those of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from vashista.engine.messages import EngineStats, StepReport, Submit, TokenEvent
from vashista.engine.predict.coefficients import StepCoefficients

HOLD_S = 0.1


class Outbox:
    """Owned by the engine process's loop, between `Engine.step` and the channel."""

    def __init__(self, send: Callable[[StepReport], None], clock: Callable[[], float]) -> None:
        self._send = send
        self._clock = clock
        self._patient: set[str] = set()
        """Requests that are not streamed."""
        self._events: list[tuple[float, TokenEvent]] = []
        self._shares: dict[str, float] = {}
        self._progress: dict[str, int] = {}
        self._coefficients: StepCoefficients | None = None
        """The last that were sent or are held."""
        self._has_news_of_times = False
        self._oldest_s: float | None = None

    def expect(self, submit: Submit) -> None:
        """A request is about to run."""
        if not submit.is_streaming:
            self._patient.add(submit.request_id)

    def forget(self, request_id: str) -> None:
        """A request has ended before its time; of an unknown one there is nothing to forget."""
        self._patient.discard(request_id)

    def put(
        self,
        events: list[TokenEvent],
        stats: EngineStats,
        shares: dict[str, float] | None = None,
        progress: dict[str, int] | None = None,
        coefficients: StepCoefficients | None = None,
    ) -> None:
        """Send the news of a step, and what was held; or hold them. Coefficients are sent when they are others."""
        now_s = self._clock()
        if coefficients is not None and coefficients is not self._coefficients:
            self._coefficients, self._has_news_of_times = coefficients, True
        for request_id in shares or {}:
            self._progress.pop(request_id, None)  # what was held of it is old
        self._progress.update(progress or {})
        urgent = [event for event in events if self._is_urgent(event)]
        self._patient.difference_update(event.request_id for event in events if event.finish_reason is not None)
        if not urgent and events and (self._oldest_s is None or now_s - self._oldest_s < HOLD_S):
            self._oldest_s = now_s if self._oldest_s is None else self._oldest_s
            self._hold(now_s, events, shares)
            return
        if self._oldest_s is not None:
            self._hold(now_s, events, shares)
            events = [
                msgspec.structs.replace(event, age_s=now_s - made_s) if made_s < now_s else event
                for made_s, event in self._events
            ]
            shares, self._events, self._shares, self._oldest_s = self._shares, [], {}, None
        progress, self._progress = self._progress, {}
        coefficients = self._coefficients if self._has_news_of_times else None
        self._has_news_of_times = False
        self._send(StepReport(events, stats, shares or {}, progress, coefficients))

    def _is_urgent(self, event: TokenEvent) -> bool:
        is_first = event.scheduled_s is not None
        return is_first or event.finish_reason is not None or event.request_id not in self._patient

    def _hold(self, now_s: float, events: list[TokenEvent], shares: dict[str, float] | None) -> None:
        self._events += [(now_s, event) for event in events]
        for request_id, share_s in (shares or {}).items():
            self._shares[request_id] = self._shares.get(request_id, 0.0) + share_s
