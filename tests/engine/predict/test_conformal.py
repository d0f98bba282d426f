"""Coverage on streams that nobody here made easy: heavy tails, drift, jumps."""

from __future__ import annotations

import math
import random

import pytest

from vashista.engine.predict.conformal import COVERAGE, Conformal
from vashista.engine.predict.coverage import LiveCoverage
from vashista.engine.predict.prediction import Interval


def interval(conformal: Conformal, regime: str = "idle dense", forecast: float = 1.0) -> Interval:
    return conformal.bounds(regime).around(forecast)


def run(conformal: Conformal, outcomes: list[float], regime: str = "idle dense") -> list[bool]:
    """Each outcome against the interval that was given before it; the forecast is always 1."""
    inside = []
    for outcome in outcomes:
        bounds = conformal.bounds(regime)
        given = bounds.around(1.0)
        inside.append(given.lower <= outcome <= given.upper)
        conformal.observe(1.0, bounds, outcome, regime)
    return inside


def share(inside: list[bool]) -> float:
    return sum(inside) / len(inside)


@pytest.mark.parametrize("seed", range(3))
def test_a_steady_stream_is_covered_as_stated(seed: int) -> None:
    source = random.Random(seed)
    inside = run(Conformal(), [source.lognormvariate(0.3, 0.4) for _ in range(4000)])
    # Four standard deviations of a share of 4,000.
    assert share(inside) == pytest.approx(COVERAGE, abs=4 * math.sqrt(0.09 / 4000))


@pytest.mark.parametrize("seed", range(3))
def test_a_machine_that_grows_slower_and_noisier_is_followed(seed: int) -> None:
    source = random.Random(seed)
    outcomes = [math.exp(index / 1000 + source.gauss(0, 0.1 + index / 20_000)) for index in range(4000)]
    assert share(run(Conformal(), outcomes)) == pytest.approx(COVERAGE, abs=0.02)


def test_after_a_jump_intervals_find_their_width_again() -> None:
    source = random.Random(1)
    conformal = Conformal()
    run(conformal, [source.lognormvariate(0, 0.05) for _ in range(500)])
    inside = run(conformal, [source.lognormvariate(1.0, 0.3) for _ in range(900)])
    assert not any(inside[:5]), "nothing of the new world was inside before it was seen"
    assert share(inside[300:]) == pytest.approx(COVERAGE, abs=0.05)


def test_a_world_that_jumps_again_and_again_raises_the_alarm_and_a_calm_one_ends_it() -> None:
    source = random.Random(5)
    conformal, live = Conformal(), LiveCoverage(COVERAGE)
    jumping = [math.exp(index // 6 * 2 + source.gauss(0, 0.1)) for index in range(120)]
    for inside in run(conformal, jumping):
        live.add(is_inside=inside, width=1.0)
    assert live.is_drifting
    for inside in run(conformal, [source.lognormvariate(0, 0.1) for _ in range(600)]):
        live.add(is_inside=inside, width=1.0)
    assert not live.is_drifting


def test_without_outcomes_the_interval_is_wide_and_says_that_it_rests_on_none() -> None:
    first = interval(Conformal(), forecast=2.0)
    assert first.median == 2.0
    assert first.upper / first.lower > 2
    assert Conformal().num_outcomes("idle dense") == 0


def test_a_new_regime_borrows_from_the_others_until_it_knows_itself() -> None:
    source = random.Random(2)
    conformal = Conformal()
    run(conformal, [source.lognormvariate(0, 0.1) for _ in range(300)])
    borrowed = interval(conformal, "queued dense")
    assert borrowed.upper - borrowed.lower < 0.6
    run(conformal, [source.lognormvariate(1, 0.1) for _ in range(100)], "queued dense")
    assert interval(conformal, "queued dense").median == pytest.approx(math.e, rel=0.1)
    assert interval(conformal).median == pytest.approx(1.0, rel=0.1)


def test_a_state_that_is_restored_says_the_same() -> None:
    source = random.Random(3)
    conformal, again = Conformal(), Conformal()
    run(conformal, [source.lognormvariate(0, 0.3) for _ in range(400)])
    again.restore(conformal.state())
    before, after = interval(conformal), interval(again)
    assert (after.lower, after.upper) == pytest.approx((before.lower, before.upper), rel=1e-4)


def test_an_honest_interval_rarely_alarms_and_a_dishonest_one_soon() -> None:
    source = random.Random(4)
    honest, narrow = LiveCoverage(COVERAGE), LiveCoverage(COVERAGE)
    alarms = 0
    for index in range(2000):
        honest.add(is_inside=source.random() < 0.9, width=1.0)
        alarms += honest.is_drifting
        if index < 120:
            narrow.add(is_inside=source.random() < 0.7, width=0.5)
    assert alarms < 100
    assert narrow.is_drifting
    assert narrow.width == pytest.approx(0.5)
