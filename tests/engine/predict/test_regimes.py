"""Which outcomes are alike: of those that meet nobody, of those that others may meet, of those that meet others."""

from __future__ import annotations

import pytest

from vashista.engine.messages import AttentionMode, SamplingParams, SchedulerRules, Submit
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.conformal import ALONE
from vashista.engine.predict.expected_support import SupportForecast
from vashista.engine.predict.features import COUNTS, KNOTS
from vashista.engine.predict.predictor import Forecast, Predictor
from vashista.engine.predict.queue import Entry, QueueMirror
from vashista.engine.work import WorkModel

STEP_S = 0.01
COSTS = StepCoefficients(base_s=STEP_S, per_token_s=[0.0] * len(KNOTS), counts_s=[0.0] * len(COUNTS), num_steps=700)
RULES = SchedulerRules(page_size=64, num_pages=1000, max_running_requests=8, max_batch_tokens=512, prefix_caching=False)


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(WorkModel(1000.0, 300.0, 4.0, ((None, 2),)), RULES, COSTS, SupportForecast((None,) * 2, None, 100))


def forecast(predictor: Predictor, queue: QueueMirror, now_s: float, *, is_sparse: bool = False) -> Forecast:
    attention = AttentionMode(token_budget=256) if is_sparse else AttentionMode()
    submit = Submit("own", [7] * 40, SamplingParams(seed=0, max_tokens=100), now_s, attention=attention)
    return predictor.forecast(queue, [submit], now_s)


def expect_others(predictor: Predictor, every_s: float) -> float:
    """Somebody has come so often while others were there; until when."""
    for index in range(20):
        predictor.arrivals.observe(index * every_s, [(40, 100)], is_met=True)
    return 20 * every_s


def test_who_meets_nobody_and_expects_nobody_is_alone_however_it_attends(predictor: Predictor) -> None:
    for is_sparse in (False, True):
        found = forecast(predictor, QueueMirror(), 1.0, is_sparse=is_sparse)
        assert (found.regime, found.is_idle, found.num_steps) == (ALONE, True, COSTS.num_steps)
        assert found.regimes_of(100, found.num_arrived + 1) == found.regimes_of(100, found.num_arrived + 9) == (ALONE,)


def test_who_was_expected_to_be_met_and_was_not_is_of_the_alone_too(predictor: Predictor) -> None:
    now_s = expect_others(predictor, every_s=4.0)
    found = forecast(predictor, QueueMirror(), now_s)
    predictor.arrivals.observe(now_s, [(40, 100)], is_met=False)
    assert (found.regime, found.is_idle) == ("idle dense", True)
    assert found.regimes_of(100, predictor.arrivals.num_requests) == ("idle dense", ALONE)
    predictor.arrivals.observe(now_s + 0.1, [(40, 100)], is_met=True)
    assert found.regimes_of(100, predictor.arrivals.num_requests) == ("idle dense",)


def test_a_forecast_that_let_others_arrive_says_nothing_of_the_alone(predictor: Predictor) -> None:
    now_s = expect_others(predictor, every_s=0.3)
    found = forecast(predictor, QueueMirror(), now_s, is_sparse=True)
    assert found.newcomers_per_s * found.total_s(100) > 1.0
    assert found.regimes_of(100, found.num_arrived + 1) == ("idle sparse",)
    assert found.regimes_of(2, found.num_arrived + 1) == ("idle sparse", ALONE)  # that one would have ended before


def test_who_meets_others_is_not_of_the_alone(predictor: Predictor) -> None:
    queue = QueueMirror()
    other = Submit("other", [7] * 40, SamplingParams(seed=0, max_tokens=100), 0.5)
    queue.submit(Entry(other, 0.5))
    found = forecast(predictor, queue, 1.0)
    assert (found.regime, found.is_idle) == ("queued dense", False)
    assert found.regimes_of(100, found.num_arrived + 1) == ("queued dense",)
