"""Says what a request will take before it runs, and learns from what it took.

Admission asks for a `Foresight` of every request, `/v1/predict` for one of a request that does not run; the generation
hands it back with the outcome at the end. The queue is `EngineClient.queue`, what steps take comes with the engine's
reports; the intervals, the lengths of outputs and the step times outlive a restart in one file of the state folder
(`server/prediction_file.py`), which may be deleted at any time. For use on the event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from vashista.engine.errors import VashistaError
from vashista.engine.messages import FinishReason, Ready, Submit, SupportReport
from vashista.engine.model_config import ModelConfig
from vashista.engine.predict.conformal import COVERAGE, Conformal
from vashista.engine.predict.coverage import LiveCoverage
from vashista.engine.predict.expected_support import SupportForecast
from vashista.engine.predict.prediction import Interval, Measured, Prediction, QueueAhead
from vashista.engine.predict.predictor import Forecast, Predictor
from vashista.engine.predict.prefixes import PrefixMemory
from vashista.engine.predict.queue import never_stops
from vashista.engine.support_profile import SupportProfile
from vashista.engine.work import WorkModel
from vashista.server.engine_client import EngineClient
from vashista.server.metrics import Metrics
from vashista.server.prices import Prices

logger = logging.getLogger(__name__)
QUANTITIES = ("ttft_s", "time_per_token_s", "total_s", "busy_s")
PICKUP_SHARE = 0.05
"""How much one request moves what is known of the way to the engine."""


@dataclass(frozen=True, slots=True)
class Foresight:
    """A prediction with what is needed to learn from its outcome."""

    prediction: Prediction
    forecast: Forecast
    submits: Sequence[Submit]
    num_cached: list[int]
    arrival_s: float
    before_s: float
    """From the arrival to the prediction."""
    factors: dict[str, Interval]
    """Of each quantity: what its forecast was multiplied with."""

    @property
    def is_idle(self) -> bool:
        """Whether nobody else was in the engine."""
        return self.forecast.regime.startswith("idle")

    def interval(self, quantity: str, num_tokens: int) -> tuple[float, Interval]:
        """(forecast, interval) of a quantity, given so many output tokens."""
        forecast = self._forecast(quantity, num_tokens)
        return forecast, self.factors[quantity].scaled(forecast)

    def _forecast(self, quantity: str, num_tokens: int) -> float:
        match quantity:
            case "ttft_s":
                return self.before_s + self.forecast.ttft_s
            case "time_per_token_s":
                return self.forecast.time_per_token_s(max(num_tokens, 2))
            case "total_s":
                return self.before_s + self.forecast.total_s(num_tokens)
        return self.forecast.busy_s(num_tokens)


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
    ) -> None:
        self._engine = engine
        self._model = model
        self._metrics = metrics
        self._prices = prices
        self._model_dir = model_dir
        self._ready: Ready | None = None
        self._predictor: Predictor | None = None
        self._prefixes = PrefixMemory(1, 1)
        self._conformal = {name: Conformal() for name in QUANTITIES}
        self.coverage = {name: LiveCoverage(COVERAGE) for name in QUANTITIES}
        self._is_drifting = False

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
        except (ArithmeticError, LookupError, ValueError, AssertionError):
            logger.exception("a prediction failed")
            self._metrics.predictions_failed.inc()
            return None

    def begin(self, foresight: Foresight, now_s: float) -> None:
        """These requests are about to be submitted."""
        predictor = self._current()
        if predictor is None:
            return
        for submit, num_cached in zip(foresight.submits, foresight.num_cached, strict=True):
            num_tokens = len(submit.prompt_token_ids) - num_cached
            predictor.arrivals.observe(now_s, num_tokens, submit.sampling.max_tokens)
            self._prefixes.add(submit.prompt_token_ids, submit.cache_salt)

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
            if submit.sampling.max_tokens > 0 and not never_stops(submit.sampling):
                predictor.lengths.observe(count, has_stopped=reason is FinishReason.STOP)
        if support is not None:
            predictor.support.observe(foresight.submits[0].attention, foresight.prediction.support, support)
        longest = max(1, *num_tokens)
        for quantity in QUANTITIES:
            outcome: float | None = getattr(measured, quantity)
            if outcome is not None and outcome > 0.0:
                self._learn(foresight, quantity, longest, outcome)
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
        forecast = predictor.forecast(queue, submits, now_s, num_cached)
        factors = {name: own.interval(1.0, forecast.regime) for name, own in self._conformal.items()}
        before_s = now_s - arrival_s + self._engine.delivery_s
        num_tokens, num_prompt = forecast.num_tokens, len(submits[0].prompt_token_ids)
        ttft_s = factors["ttft_s"].scaled(before_s + forecast.ttft_s)
        total_s = factors["total_s"].scaled(before_s + forecast.total_s(num_tokens))
        per_token_s = None
        if num_tokens > 1:
            per_token_s = factors["time_per_token_s"].scaled(forecast.time_per_token_s(num_tokens))
        busy_s = factors["busy_s"].scaled(forecast.busy_s(num_tokens))
        power_w = self._engine.stats.power_w
        energy_j = busy_s.scaled(self._prices.power_w if power_w is None else power_w)
        prediction = Prediction(
            coverage=COVERAGE,
            num_outcomes=self._conformal["total_s"].num_outcomes(forecast.regime),
            num_prompt_tokens=sum(len(submit.prompt_token_ids) for submit in _firsts(submits)),
            num_cached_tokens=sum(num_cached[submits.index(submit)] for submit in _firsts(submits)),
            num_tokens=num_tokens,
            ttft_s=ttft_s,
            time_per_token_s=per_token_s,
            total_s=total_s,
            kv_pages=_kv_pages(submits, predictor.rules.page_size),
            busy_s=busy_s,
            energy_j=energy_j,
            money=self._money(busy_s, energy_j),
            currency=None if self._prices.is_free else self._prices.currency,
            support=predictor.support.over(submits[0].attention, num_prompt, num_tokens),
            queue=QueueAhead(
                num_running=queue.num_running,
                num_waiting=queue.num_waiting,
                num_waiting_tokens=queue.num_waiting_tokens,
                arrivals_per_s=forecast.newcomers_per_s,
            ),
        )
        return Foresight(prediction, forecast, submits, num_cached, arrival_s, before_s, factors)

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
        if self._predictor is not None:
            predictor.lengths, predictor.arrivals = self._predictor.lengths, self._predictor.arrivals
        return predictor

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

    def _money(self, busy_s: Interval, energy_j: Interval) -> Interval | None:
        if self._prices.is_free:
            return None
        prices = self._prices
        pairs = ((busy_s.median, energy_j.median), (busy_s.lower, energy_j.lower), (busy_s.upper, energy_j.upper))
        return Interval(*(round(prices.per_request + prices.money(*pair), 9) for pair in pairs))

    def _learn(self, foresight: Foresight, quantity: str, num_tokens: int, outcome: float) -> None:
        forecast, interval = foresight.interval(quantity, num_tokens)
        is_inside = self._conformal[quantity].observe(forecast, interval, outcome, foresight.forecast.regime)
        self.coverage[quantity].add(is_inside=is_inside, width=(interval.upper - interval.lower) / interval.median)
        self._metrics.observe_prediction(quantity, abs(interval.median / outcome - 1.0), is_inside=is_inside)

    def _watch_drift(self) -> None:
        """Raise or end the alarm."""
        drifting = [name for name in QUANTITIES if self.coverage[name].is_drifting]
        if bool(drifting) == self._is_drifting:
            return
        self._is_drifting = bool(drifting)
        if drifting:
            shares = ", ".join(f"{name} {self.coverage[name].share:.0%}" for name in drifting)
            logger.warning(
                "ALARM: predictions drift: of the last outcomes fewer than %.0f %% lay inside their intervals (%s); "
                "the machine or the load changes faster than the predictor learns",
                100 * COVERAGE,
                shares,
            )
        else:
            logger.info("predictions keep their coverage again")


def _firsts(submits: Sequence[Submit]) -> list[Submit]:
    """One a prompt."""
    return [s for i, s in enumerate(submits) if not i or submits[i - 1].prompt_token_ids is not s.prompt_token_ids]


def _kv_pages(submits: Sequence[Submit], page_size: int) -> int:
    """Pages of all choices at their end; those of one prompt share its full pages."""
    total, before = 0, None
    for submit in submits:
        prompt = submit.prompt_token_ids
        shared = len(prompt) // page_size if before is prompt else 0
        total += -(-(len(prompt) + submit.sampling.max_tokens) // page_size) - shared
        before = prompt
    return total
