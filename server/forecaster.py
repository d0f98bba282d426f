"""Says what a request will take before it runs, and learns from what it took.

Admission asks for a `Foresight` of every request, `/v1/predict` for one of a request that does not run; the generation
hands it back with the outcome at the end. The queue is `EngineClient.queue`, what steps take comes with the engine's
reports; the intervals, the lengths of outputs and the step times outlive a restart in one file of the state folder
(`server/prediction_file.py`), which may be deleted at any time. For use on the event loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import msgspec

from vashista.engine.errors import VashistaError
from vashista.engine.messages import FinishReason, Ready, Submit, SupportReport
from vashista.engine.model_config import ModelConfig
from vashista.engine.predict.conformal import COVERAGE, Conformal
from vashista.engine.predict.coverage import LiveCoverage
from vashista.engine.predict.expected_support import SupportForecast
from vashista.engine.predict.prediction import Measured
from vashista.engine.predict.predictor import Forecast, Predictor
from vashista.engine.predict.prefixes import PrefixMemory
from vashista.engine.predict.queue import QueueMirror, never_stops
from vashista.engine.support_profile import SupportProfile
from vashista.engine.work import WorkModel
from vashista.server.engine_client import EngineClient
from vashista.server.foresight import QUANTITIES, Foresight, Rates, look_ahead, scale_of
from vashista.server.metrics import Metrics
from vashista.server.prediction_file import SavedPredictions
from vashista.server.prices import Prices

logger = logging.getLogger(__name__)
FIRST_WAIT_S, LONGEST_WAIT_S, WAIT_STEPS = 0.5, 600.0, 5
"""A Retry-After is looked for by doubling from the first to the longest, and then by so many halvings."""
PICKUP_SHARE = 0.05
"""How much one request moves what is known of the way to the engine."""
ROUGH_STEPS = 500
"""What is predicted from fewer steps misses by what no later prediction does: from then on intervals are learnt anew.
Replayed over recorded cells, what the first dozen requests missed by made idle intervals a tenth wider, those of a
document's time per token by a half: docs/prediction-findings.md."""


class Forecaster:
    """The server's one predictor, for the engine that is there now."""

    def __init__(
        self,
        engine: EngineClient,
        model: ModelConfig,
        metrics: Metrics,
        prices: Prices,
        *,
        model_dir: str,
        model_digest: str | None = None,
    ) -> None:
        self._engine = engine
        self._model = model
        self._metrics = metrics
        self._prices = prices
        self._model_dir = model_dir
        self._model_digest = model_digest
        self._ready: Ready | None = None
        self._predictor: Predictor | None = None
        self._last: Predictor | None = None
        self._prefixes = PrefixMemory(1, 1)
        self._conformal = {name: Conformal() for name in QUANTITIES}
        self.coverage = {name: LiveCoverage(COVERAGE) for name in QUANTITIES}
        self._is_drifting = False
        self._is_rough = True
        self._saved: SavedPredictions | None = None

    def restore(self, saved: SavedPredictions) -> None:
        """Go on from what an earlier server learnt, if it was with this model. Before the first prediction."""
        if saved.step_times.model_digest != self._model_digest:
            return
        try:
            for quantity, state in saved.errors.items():
                if quantity in self._conformal:
                    self._conformal[quantity].restore(state)
            self._saved = saved
            self._is_rough = saved.step_times.coefficients.num_steps < ROUGH_STEPS
        except (ValueError, TypeError) as error:
            logger.warning("predictions start anew: what was kept of their errors cannot be used: %s", error)
            self._conformal = {name: Conformal() for name in QUANTITIES}

    def state(self) -> SavedPredictions | None:
        """What has been learnt, to be kept; None before an engine was there."""
        predictor, step_times = self._last, self._engine.step_times
        if step_times is None:
            return None
        return SavedPredictions(
            step_times=step_times,
            lengths=None if predictor is None else predictor.lengths.state(),
            errors={name: own.state() for name, own in self._conformal.items()},
            pickup_s=None if predictor is None else predictor.pickup_s,
            support=None if predictor is None else predictor.support.state(),
        )

    @property
    def can_predict(self) -> bool:
        """Whether there is an engine that says what its steps take."""
        return self._current() is not None

    @property
    def is_drifting(self) -> bool:
        """Whether the stated coverage is not kept at present."""
        return self._is_drifting

    def predict(self, submits: Sequence[Submit], now_s: float, *, arrival_s: float | None = None) -> Foresight | None:
        """What these requests of one body would take if they were submitted now; None without an engine.

        Takes nothing and changes nothing. A failure is logged and gives None: a request is not lost over it.
        """
        predictor = self._current()
        if predictor is None:
            return None
        try:
            return self._predict(predictor, submits, now_s, now_s if arrival_s is None else arrival_s)
        except (ArithmeticError, LookupError, ValueError, AssertionError, MemoryError):
            logger.exception("a prediction failed")
            self._metrics.predictions_failed.inc()
            return None

    def alone_s(self, foresight: Foresight, now_s: float) -> float:
        """Upper end of the time that these requests would take with nobody else there."""
        return self._upper_s(foresight, QueueMirror(), now_s, 0.0)

    def wait_s(self, foresight: Foresight, deadline_s: float, now_s: float) -> float:
        """After so many seconds these requests would be done in time if they were sent then, as far as can be seen."""
        queue = self._engine.queue
        low_s, high_s = 0.0, FIRST_WAIT_S
        while self._upper_s(foresight, queue, now_s, high_s) > deadline_s:
            low_s, high_s = high_s, 2 * high_s
            if high_s > LONGEST_WAIT_S:
                return LONGEST_WAIT_S
        for _ in range(WAIT_STEPS):
            middle_s = (low_s + high_s) / 2
            if self._upper_s(foresight, queue, now_s, middle_s) > deadline_s:
                low_s = middle_s
            else:
                high_s = middle_s
        return high_s

    def _upper_s(self, foresight: Foresight, queue: QueueMirror, now_s: float, delay_s: float) -> float:
        """Upper end of the total of all of max_tokens, of requests sent after a delay to such a queue."""
        predictor = self._current()
        assert predictor is not None, "asked after a prediction"
        forecast = predictor.forecast(queue, foresight.submits, now_s, foresight.num_cached, delay_s=delay_s)
        bounds = {name: self._conformal[name].bounds(forecast.regime) for name in ("ttft_s", "total_s")}
        before_s = self._engine.delivery_s
        then = msgspec.structs.replace(foresight, said=None, forecast=forecast, before_s=before_s, bounds=bounds)
        return then.interval("total_s", forecast.num_tokens)[1].upper

    def begin(self, foresight: Foresight, now_s: float) -> None:
        """These requests are about to be submitted."""
        predictor = self._current()
        if predictor is None:
            return
        sizes = []
        for submit, num_cached in zip(foresight.submits, foresight.num_cached, strict=True):
            sizes.append((len(submit.prompt_token_ids) - num_cached, submit.sampling.max_tokens))
            self._prefixes.add(submit.prompt_token_ids, submit.cache_salt)
        predictor.arrivals.observe(now_s, sizes, is_met=not foresight.is_idle)

    def settle(
        self,
        foresight: Foresight,
        measured: Measured,
        num_tokens: Sequence[int],
        finish_reasons: Sequence[FinishReason],
        support: SupportReport | None,
    ) -> None:
        """All choices have ended by themselves: learn from it. num_tokens: of each choice."""
        predictor = self._current()
        if predictor is None:
            return
        for submit, count, reason in zip(foresight.submits, num_tokens, finish_reasons, strict=True):
            if reason is FinishReason.DEADLINE:
                continue  # it says nothing of where the text would have ended
            if submit.sampling.max_tokens > 0 and not never_stops(submit.sampling):
                predictor.lengths.observe(count, has_stopped=reason is FinishReason.STOP)
        if support is not None:
            first = foresight.submits[0]
            predictor.support.observe(first.attention, len(first.prompt_token_ids), max(1, num_tokens[0]), support)
        if not len(self._engine.queue):
            predictor.arrivals.rest(time.monotonic())
        longest = max(1, *num_tokens)
        regimes = self._regimes_of(foresight.forecast, longest, predictor.arrivals.num_requests)
        for quantity in QUANTITIES:
            outcome: float | None = getattr(measured, quantity)
            if outcome is not None and outcome > 0.0:
                self._learn(foresight, quantity, longest, outcome, regimes)
        self._watch_drift()

    def drain_s(self, now_s: float) -> float | None:
        """Seconds until everybody who waits now would have begun; None without an engine."""
        predictor = self._current()
        return None if predictor is None else predictor.drain_s(self._engine.queue, now_s)

    def observe_pickup(self, seconds: float) -> None:
        """So long after it was sent to an idle engine a request ran."""
        predictor = self._current()
        if predictor is not None:
            predictor.pickup_s += PICKUP_SHARE * (min(max(seconds, 0.0), 0.05) - predictor.pickup_s)

    def _predict(self, predictor: Predictor, submits: Sequence[Submit], now_s: float, arrival_s: float) -> Foresight:
        queue = self._engine.queue
        num_cached = [self._num_cached(submit, index, submits) for index, submit in enumerate(submits)]
        return look_ahead(
            predictor,
            queue,
            submits,
            num_cached,
            now_s=now_s,
            before_s=now_s - arrival_s + self._engine.delivery_s,
            conformal=self._conformal,
            rates=Rates(self._prices, self._engine.stats.power_w),
        )

    def _current(self) -> Predictor | None:
        """The predictor of the engine that is ready, with what it last said of its steps."""
        engine = self._engine
        if engine.ready is not self._ready:
            self._ready = engine.ready
            self._predictor = None if engine.ready is None else self._make(engine.ready)
        predictor, coefficients = self._predictor, engine.coefficients
        if predictor is not None and coefficients is not None and coefficients is not predictor.coefficients:
            predictor.set_coefficients(coefficients)
        return predictor

    def _make(self, ready: Ready) -> Predictor | None:
        if ready.rules is None or ready.coefficients is None:
            return None
        profile = None
        if ready.support_profile is not None:
            try:
                profile = SupportProfile.load(ready.support_profile, self._model_dir)
            except VashistaError as error:
                logger.warning("predictions do without the support profile: %s", error.message)
        support = SupportForecast(self._model.layer_windows, profile, ready.dense_below)
        self._prefixes = PrefixMemory(ready.num_pages if ready.rules.prefix_caching else 0, ready.page_size)
        predictor = Predictor(WorkModel.of(self._model), ready.rules, ready.coefficients, support)
        if not predictor.is_compiled:
            logger.warning(
                "predictions are made in Python, which takes milliseconds under load: no compiled simulation"
            )
        if self._last is not None:  # of an engine that has gone
            predictor.lengths, predictor.arrivals = self._last.lengths, self._last.arrivals
            predictor.pickup_s = self._last.pickup_s
            support.restore(self._last.support.state())
        elif self._saved is not None:
            self._go_on(predictor, self._saved)
        self._last = predictor
        return predictor

    def _go_on(self, predictor: Predictor, saved: SavedPredictions) -> None:
        try:
            if saved.lengths is not None:
                predictor.lengths.restore(saved.lengths)
            if saved.support is not None:
                predictor.support.restore(saved.support)
        except ValueError as error:
            logger.warning("predictions start anew: %s", error)
        if saved.pickup_s is not None and 0.0 <= saved.pickup_s <= 0.05:
            predictor.pickup_s = saved.pickup_s

    def _num_cached(self, submit: Submit, index: int, submits: Sequence[Submit]) -> int:
        """Prompt tokens that need not be computed; the choices after the first share the first one's prompt."""
        if submit.sampling.prompt_logprobs is not None:
            return 0
        assert self._predictor is not None
        rules = self._predictor.rules
        if not rules.prefix_caching:
            return 0
        if index and submits[index - 1].prompt_token_ids is submit.prompt_token_ids:
            return (len(submit.prompt_token_ids) - 1) // rules.page_size * rules.page_size
        return self._prefixes.num_cached(submit.prompt_token_ids, submit.cache_salt)

    def _regimes_of(self, forecast: Forecast, num_tokens: int, num_arrived: int) -> tuple[str, ...]:
        """What an outcome is to teach; nothing if its forecast is a rough one and those before were not."""
        is_rough = forecast.num_steps < ROUGH_STEPS
        if self._is_rough and not is_rough:
            self._is_rough = False
            self._conformal = {name: Conformal() for name in QUANTITIES}
        return forecast.regimes_of(num_tokens, num_arrived) if is_rough == self._is_rough else ()

    def _learn(
        self, foresight: Foresight, quantity: str, num_tokens: int, outcome: float, regimes: Sequence[str]
    ) -> None:
        forecast, interval = foresight.interval(quantity, num_tokens)
        scale = scale_of(quantity, num_tokens)
        own, bounds = self._conformal[quantity], foresight.bounds[quantity]
        if regimes:
            own.observe(forecast, bounds, outcome, regimes, scale, foresight.hitch_of(quantity))
        is_inside = interval.lower <= outcome <= interval.upper
        width = (interval.upper - interval.lower) / interval.median
        self.coverage[quantity].add(is_inside=is_inside, width=width, is_settled=bounds.is_settled)
        self._metrics.observe_prediction(quantity, abs(interval.median / outcome - 1.0), is_inside=is_inside)

    def _watch_drift(self) -> None:
        """Raise or end the alarm."""
        drifting = [name for name in QUANTITIES if self.coverage[name].is_drifting]
        if bool(drifting) == self._is_drifting:
            return
        self._is_drifting = bool(drifting)
        if drifting:
            shares = ", ".join(f"{name} {self.coverage[name].settled_share:.0%}" for name in drifting)
            logger.warning(
                "ALARM: predictions drift: of the last outcomes fewer than %.0f %% lay inside their intervals (%s); "
                "the machine or the load changes faster than the predictor learns",
                100 * COVERAGE,
                shares,
            )
        else:
            logger.info("predictions keep their coverage again")
