"""From a forecast to what is said of a request: intervals around it, its price, its pages; and back, for the outcome.

`server/forecaster.py` makes a `Foresight` of every request that is admitted; `vashista predict` makes one without a
server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from vashista.engine.messages import Submit
from vashista.engine.predict.conformal import COVERAGE, Bounds, Conformal
from vashista.engine.predict.prediction import Given, Interval, Prediction, QueueAhead
from vashista.engine.predict.predictor import Forecast, Predictor
from vashista.engine.predict.queue import QueueMirror
from vashista.server.prices import Prices

HITCH_TOKENS = 16.0
"""So many tokens are as sure of their mean time as not."""
QUANTITIES = ("ttft_s", "time_per_token_s", "total_s", "busy_s")


class Rates(msgspec.Struct, frozen=True):
    """What busy time is multiplied with."""

    prices: Prices
    power_w: float | None = None
    """As measured; None takes the setting."""

    def energy_j(self, busy_s: Interval) -> Interval:
        """Of the busy time."""
        return busy_s.scaled(self.prices.power_w if self.power_w is None else self.power_w)

    def money(self, busy_s: Interval, energy_j: Interval) -> Interval | None:
        """At the operator's prices; None where there are none."""
        if self.prices.is_free:
            return None
        median, lower, upper = (
            self.prices.per_request + self.prices.money(busy_s.median, energy_j.median),
            self.prices.per_request + self.prices.money(busy_s.lower, energy_j.lower),
            self.prices.per_request + self.prices.money(busy_s.upper, energy_j.upper),
        )
        return Interval(round(median, 9), round(lower, 9), round(upper, 9))


class Foresight(msgspec.Struct, frozen=True):
    """A prediction with what is needed to learn from its outcome."""

    said: Prediction | None
    forecast: Forecast
    submits: Sequence[Submit]
    num_cached: Sequence[int]
    before_s: float
    """What comes on top of the forecast: from the arrival to the prediction, and the way of an event to the server."""
    bounds: Mapping[str, Bounds]
    """Of each quantity."""

    @property
    def prediction(self) -> Prediction:
        """What was said."""
        assert self.said is not None
        return self.said

    @property
    def is_idle(self) -> bool:
        """Whether nobody else was in the engine."""
        return self.forecast.is_idle

    def interval(self, quantity: str, num_tokens: int) -> tuple[float, Interval]:
        """(forecast, interval) of a quantity, given so many output tokens.

        No request ends before its first token, whatever the errors of the one quantity and of the other were: the total
        is moved and widened upwards to what is said of the first token, the first token's lower bound downwards to
        what is said of a total of one token. Each interval holds all that its own errors ask for.
        """
        forecast, interval = self._by_own_errors(quantity, num_tokens)
        if quantity == "total_s":
            first = self._by_own_errors("ttft_s", 1)[1]
            middle, upper = max(interval.median, first.median), max(interval.upper, first.upper)
            return forecast, Interval(middle, interval.lower, upper)
        if quantity == "ttft_s":
            shortest = self._by_own_errors("total_s", 1)[1]
            return forecast, Interval(interval.median, min(interval.lower, shortest.lower), interval.upper)
        return forecast, interval

    def _by_own_errors(self, quantity: str, num_tokens: int) -> tuple[float, Interval]:
        forecast = self._forecast(quantity, num_tokens)
        return forecast, self.bounds[quantity].around(forecast, scale_of(quantity, num_tokens), self.hitch_of(quantity))

    def hitch_of(self, quantity: str) -> float:
        """What may come on top of a quantity however short it was foreseen, as `Bounds` takes it."""
        return self.forecast.hitch_s if quantity == "time_per_token_s" else 0.0

    def given(self, num_tokens: int) -> Given:
        """What this foresight says of so many output tokens."""
        return Given(
            time_per_token_s=self.interval("time_per_token_s", num_tokens)[1] if num_tokens > 1 else None,
            total_s=self.interval("total_s", num_tokens)[1],
            busy_s=self.interval("busy_s", num_tokens)[1],
        )

    def _forecast(self, quantity: str, num_tokens: int) -> float:
        match quantity:
            case "ttft_s":
                return self.before_s + self.forecast.ttft_s
            case "time_per_token_s":
                return self.forecast.time_per_token_s(max(num_tokens, 2))
            case "total_s":
                return self.before_s + self.forecast.total_s(num_tokens)
        return self.forecast.busy_s(num_tokens)


def look_ahead(
    predictor: Predictor,
    queue: QueueMirror,
    submits: Sequence[Submit],
    num_cached: Sequence[int],
    *,
    now_s: float,
    before_s: float,
    conformal: Mapping[str, Conformal],
    rates: Rates,
) -> Foresight:
    """What these requests of one body would take if they were submitted now."""
    forecast = predictor.forecast(queue, submits, now_s, num_cached)
    bounds = {name: own.bounds(forecast.regime) for name, own in conformal.items()}
    ahead = Foresight(None, forecast, submits, num_cached, before_s, bounds)
    num_tokens, given = forecast.num_tokens, ahead.given(forecast.num_tokens)
    energy_j = rates.energy_j(given.busy_s)
    firsts = [index for index in range(len(submits)) if not _shares_prompt(submits, index)]
    prediction = Prediction(
        coverage=COVERAGE,
        num_outcomes=conformal["total_s"].num_outcomes(forecast.regime),
        num_prompt_tokens=sum(len(submits[index].prompt_token_ids) for index in firsts),
        num_cached_tokens=sum(num_cached[index] for index in firsts),
        num_tokens=num_tokens,
        ttft_s=ahead.interval("ttft_s", 1)[1],
        time_per_token_s=given.time_per_token_s,
        total_s=given.total_s,
        kv_pages=_kv_pages(submits, predictor.rules.page_size),
        busy_s=given.busy_s,
        energy_j=energy_j,
        money=rates.money(given.busy_s, energy_j),
        currency=None if rates.prices.is_free else rates.prices.currency,
        support=predictor.support.over(submits[0].attention, len(submits[0].prompt_token_ids), num_tokens),
        queue=QueueAhead(
            num_running=queue.num_running,
            num_waiting=queue.num_waiting,
            num_waiting_tokens=queue.num_waiting_tokens,
            arrivals_per_s=forecast.newcomers_per_s,
        ),
    )
    return Foresight(prediction, forecast, submits, num_cached, before_s, bounds)


def scale_of(quantity: str, num_tokens: int) -> float:
    """How uncertain a forecast is: the fewer tokens, the more does a single hitch change their mean."""
    return math.sqrt(1.0 + HITCH_TOKENS / max(num_tokens - 1, 1)) if quantity == "time_per_token_s" else 1.0


def _shares_prompt(submits: Sequence[Submit], index: int) -> bool:
    """Whether it is a further choice of the prompt before it."""
    return index > 0 and submits[index - 1].prompt_token_ids is submits[index].prompt_token_ids


def _kv_pages(submits: Sequence[Submit], page_size: int) -> int:
    """Pages of all choices at their end; those of one prompt share its full pages."""
    total = 0
    for index, submit in enumerate(submits):
        num_prompt = len(submit.prompt_token_ids)
        total += -(-(num_prompt + submit.sampling.max_tokens) // page_size)
        total -= num_prompt // page_size if _shares_prompt(submits, index) else 0
    return total
