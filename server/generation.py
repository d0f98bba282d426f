"""One HTTP request while the engine works on it: its events, its books and its metrics.

A route makes a `Generation` from what admission let through, uses it as a context manager, and reads `next_events`
until it is empty. Leaving the context aborts what still runs, gives the places in the queue back and records the end
of every engine request exactly once. The receipt in `server/account.py` is made of what stands here then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from vashista.engine.errors import VashistaError
from vashista.engine.messages import FinishReason, SupportReport, TokenEvent
from vashista.engine.predict.prediction import Measured
from vashista.engine.support import merge_reports
from vashista.server.admission import Admitted
from vashista.server.engine_client import EngineClient
from vashista.server.forecaster import Forecaster
from vashista.server.ledger.receipt import Outcome
from vashista.server.metrics import Metrics
from vashista.server.prices import Cost, Prices
from vashista.server.schemas.responses import PromptTokensDetails, Usage, VashistaUsage

REPORT_S = 0.25
"""Seconds between two reports of a request's tokens to the metrics: many at once cost little, one by one a lot."""


class Generation:
    """The running engine requests of one HTTP request."""

    def __init__(
        self, admitted: Admitted, engine: EngineClient, metrics: Metrics, prices: Prices, forecaster: Forecaster
    ) -> None:
        self.admitted = admitted
        self._forecaster = forecaster
        self._prices = prices
        self._metrics = metrics
        self._is_closed = False
        self._has_taught = False
        self._unfinished_reason = FinishReason.ABORT
        self._index_of = {submit.request_id: index for index, submit in enumerate(admitted.submits)}
        self._tracks = [Track(submit.arrival_s) for submit in admitted.submits]
        metrics.prompt_tokens.inc(sum(len(submit.prompt_token_ids) for submit in admitted.submits))
        foresight = admitted.foresight
        self._submitted_s = time.monotonic()
        if foresight is not None:
            forecaster.begin(foresight, self._submitted_s)
        self._stream = engine.submit(admitted.submits, foresight.num_cached if foresight is not None else ())

    async def next_events(self) -> list[tuple[int, TokenEvent]]:
        """All news since the last call, as (choice, event); waits for some. [] at the end. Raises VashistaError."""
        try:
            events = await self._stream.next_events()
        except VashistaError:
            self._unfinished_reason = FinishReason.ERROR
            raise
        news = []
        for arrived_s, event in events:
            index = self._index_of[event.request_id]
            self.admitted.places[index].start()
            self._tracks[index].take(event, arrived_s, self._metrics)
            if event.finish_reason is not None:
                self.admitted.places[index].leave()
                due_s = self.admitted.submits[index].due_s
                if due_s is not None:
                    is_kept = event.finish_reason is not FinishReason.DEADLINE and arrived_s <= due_s
                    self._metrics.deadlines.labels("yes" if is_kept else "no").inc()
            news.append((index, event))
        self._teach()
        return news

    def usage(self) -> Usage:
        """Tokens so far. A prompt counts once for its n choices, and so do its cached tokens."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self.admitted.prompts)
        num_completion = sum(track.num_tokens for track in self._tracks)
        num_cached = sum(track.num_cached_tokens for track in self._tracks[:: self.admitted.num_choices])
        support = merge_reports([track.support for track in self._tracks if track.support is not None])
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_completion,
            total_tokens=num_prompt + num_completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
            vashista=self._vashista_usage(support),
        )

    def cost(self) -> Cost:
        """What it took so far; all of it once it is settled."""
        return self._prices.cost(self._stream.spending)

    def finish_reasons(self) -> tuple[FinishReason, ...]:
        """Why each choice ended, or why it was ended."""
        return tuple(track.finish_reason or self._unfinished_reason for track in self._tracks)

    def outcome(self) -> Outcome:
        """What it took: the earliest begin and the last end of its choices."""
        arrival_s = self._tracks[0].arrival_s
        scheduled = [track.scheduled_s for track in self._tracks if track.scheduled_s is not None]
        first = [track.first_s for track in self._tracks if track.num_tokens]
        ended = [track.end_s for track in self._tracks if track.end_s is not None]
        end_s = max(ended) if len(ended) == len(self._tracks) else time.monotonic()
        cost = self.cost()
        return Outcome(
            queue_s=max(0.0, min(scheduled) - arrival_s) if scheduled else None,
            ttft_s=min(first) - arrival_s if first else None,
            total_s=end_s - arrival_s,
            busy_s=cost.busy_s,
            energy_j=cost.energy_j,
            energy_source=cost.energy_source,
            cost_nano=cost.money_nano,
            currency=cost.currency,
        )

    def predicted(self) -> dict[str, Any] | None:
        """What was said of it before it ran, for the receipt."""
        foresight = self.admitted.foresight
        return None if foresight is None else foresight.prediction.record()

    def measured(self) -> Measured | None:
        """What it took, once all choices have ended by themselves; None before, and where no token came."""
        tracks = self._tracks
        if not all(track.end_s is not None and track.num_tokens for track in tracks):
            return None
        outcome = self.outcome()
        paces = [(track.last_s - track.first_s) / (track.num_tokens - 1) for track in tracks if track.num_tokens > 1]
        assert outcome.ttft_s is not None
        assert outcome.total_s is not None
        assert outcome.busy_s is not None
        num_tokens = max(track.num_tokens for track in tracks)
        foresight = self.admitted.foresight
        return Measured(
            queue_s=outcome.queue_s,
            ttft_s=outcome.ttft_s,
            time_per_token_s=sum(paces) / len(paces) if paces else None,
            total_s=outcome.total_s,
            busy_s=outcome.busy_s,
            num_tokens=num_tokens,
            predicted=None if foresight is None else foresight.given(num_tokens),
        )

    @property
    def is_settled(self) -> bool:
        """Whether the engine has said its last word on every choice, so that cost and receipt are complete."""
        return self._stream.is_settled

    def when_settled(self, callback: Callable[[], object]) -> None:
        """Call it then; at once if it is."""
        self._stream.when_settled(callback)

    async def wait_settled(self) -> None:
        """Return then."""
        await self._stream.wait_settled()

    def close(self) -> None:
        """Abort what still runs and balance the books; a second time does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stream.close()
        for track, place in zip(self._tracks, self.admitted.places, strict=True):
            track.report_gaps(self._metrics)
            place.leave()
            if track.finish_reason is None:
                self._metrics.requests.labels(self._unfinished_reason.value).inc()

    def _teach(self) -> None:
        """Let the forecaster learn, once, when the last choice has ended."""
        foresight, tracks = self.admitted.foresight, self._tracks
        if foresight is None or self._has_taught or any(track.finish_reason is None for track in tracks):
            return
        self._has_taught = True
        measured = self.measured()
        if measured is None:
            return
        scheduled_s = tracks[0].scheduled_s
        if scheduled_s is not None and foresight.is_idle:
            self._forecaster.observe_pickup(scheduled_s - self._submitted_s)
        self._forecaster.settle(
            foresight,
            measured,
            [track.num_tokens for track in tracks],
            self.finish_reasons(),
            merge_reports([track.support for track in tracks if track.support is not None]),
        )

    def _vashista_usage(self, support: SupportReport | None) -> VashistaUsage | None:
        """Support and prediction as far as they are known; cost and outcome once all choices have ended."""
        has_ended = all(track.finish_reason is not None for track in self._tracks)
        foresight = self.admitted.foresight
        if support is None and foresight is None and not has_ended:
            return None
        return VashistaUsage(
            support=support,
            cost=self.cost() if has_ended else None,
            prediction=None if foresight is None else foresight.prediction,
            outcome=self.measured() if has_ended else None,
            adapted=self.admitted.adapted,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Track:
    """Times and counts of one engine request."""

    __slots__ = (
        "arrival_s",
        "end_s",
        "finish_reason",
        "first_s",
        "gaps_s",
        "last_s",
        "num_cached_tokens",
        "num_tokens",
        "reported_s",
        "scheduled_s",
        "support",
    )

    def __init__(self, arrival_s: float) -> None:
        self.arrival_s = arrival_s
        self.first_s = 0.0
        self.last_s = 0.0
        self.gaps_s: list[float] = []
        self.reported_s = 0.0
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.scheduled_s: float | None = None
        self.end_s: float | None = None
        self.finish_reason: FinishReason | None = None
        self.support: SupportReport | None = None

    def take(self, event: TokenEvent, now_s: float, metrics: Metrics) -> None:
        """Count one event."""
        if event.scheduled_s is not None:
            self.scheduled_s = event.scheduled_s
            metrics.queue_time.observe(max(0.0, event.scheduled_s - self.arrival_s))
        if event.num_cached_tokens is not None:
            self.num_cached_tokens = event.num_cached_tokens
            metrics.cached_tokens.inc(event.num_cached_tokens)
        num_new = len(event.token_ids)
        if num_new:
            self._time_tokens(num_new, now_s, metrics)
        if event.support is not None:
            self.support = event.support
            metrics.observe_support(event.support)
        if event.finish_reason is not None:
            self._finish(event.finish_reason, now_s, metrics)

    def _time_tokens(self, num_new: int, now_s: float, metrics: Metrics) -> None:
        if self.num_tokens == 0:
            self.first_s = self.reported_s = now_s
            metrics.time_to_first_token.observe(now_s - self.arrival_s)
            metrics.generated_tokens.inc(num_new)
        else:
            self.gaps_s += [(now_s - self.last_s) / num_new] * num_new
        self.num_tokens += num_new
        self.last_s = now_s
        if now_s - self.reported_s >= REPORT_S:
            self.report_gaps(metrics)

    def report_gaps(self, metrics: Metrics) -> None:
        """Count the tokens, and the time between them, since the last report."""
        metrics.generated_tokens.inc(len(self.gaps_s))
        for gap_s in self.gaps_s:
            metrics.inter_token_latency.observe(gap_s)
        self.gaps_s.clear()
        self.reported_s = self.last_s

    def _finish(self, reason: FinishReason, now_s: float, metrics: Metrics) -> None:
        self.finish_reason = reason
        self.report_gaps(metrics)
        self.end_s = now_s
        metrics.requests.labels(reason.value).inc()
        metrics.request_duration.observe(now_s - self.arrival_s)
        if self.num_tokens > 1:
            metrics.time_per_output_token.observe((self.last_s - self.first_s) / (self.num_tokens - 1))
