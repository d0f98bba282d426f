"""Coverage on streams that nobody here made easy: heavy tails, drift, jumps."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vashista.engine.predict.conformal import ALONE, COVERAGE, LEAST_OUTCOMES, WIDEST, Bounds, Conformal, Quantiles
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
        conformal.observe(1.0, bounds, outcome, [regime])
    return inside


def share(inside: list[bool]) -> float:
    return sum(inside) / len(inside)


@pytest.mark.parametrize("seed", range(3))
def test_a_steady_stream_is_covered_as_stated(seed: int) -> None:
    source = random.Random(seed)
    inside = run(Conformal(), [source.lognormvariate(0.3, 0.4) for _ in range(4000)])
    # Four standard deviations of a share of 4,000.
    assert share(inside) == pytest.approx(COVERAGE, abs=4 * math.sqrt(0.09 / 4000))


@pytest.mark.parametrize("count", [20, 24, 33])
def test_few_outcomes_are_covered_as_stated_and_not_more(count: int) -> None:
    """Whole ranks alone would hold 92 % of the next after 24."""
    source, inside, num_streams = random.Random(count), 0, 8000
    for _ in range(num_streams):
        known = Quantiles()
        for _ in range(count):
            known.add(source.gauss(0, 1))
        low, _, high, _ = known.bounds()
        inside += low <= source.gauss(0, 1) <= high
    # Between two ranks as far from the middle as these, the share of a bell curve is not quite even: 0.3 % at most.
    assert inside / num_streams == pytest.approx(COVERAGE, abs=0.003 + 3 * math.sqrt(0.09 / num_streams))


@pytest.mark.parametrize("seed", range(3))
def test_where_errors_are_as_wide_as_foreseen_wide_and_narrow_ones_are_covered_alike(seed: int) -> None:
    source, conformal = random.Random(seed), Conformal()
    inside: dict[float, list[bool]] = {0.5: [], 4.0: []}
    for _ in range(4000):
        scale = source.choice(list(inside))
        bounds, outcome = conformal.bounds(ALONE), math.exp(scale * source.gauss(0.02, 0.1))
        said = bounds.around(1.0, scale)
        inside[scale].append(said.lower <= outcome <= said.upper)
        conformal.observe(1.0, bounds, outcome, [ALONE], scale)
    for found in inside.values():
        assert share(found) == pytest.approx(COVERAGE, abs=0.025)


@pytest.mark.parametrize("hitch", [0.0, 0.04])
def test_what_may_happen_to_short_and_long_forecasts_alike_is_covered_with_a_hitch_alone(hitch: float) -> None:
    """Tokens of 3 to 4 ms, and of 300 where others' prompts come between, which is foreseen in half of the cases."""
    source, conformal = random.Random(1), Conformal()
    inside, uppers = [], []
    for _ in range(4000):
        is_met = source.random() < 0.3
        forecast = 0.25 if source.random() < (0.6 if is_met else 0.3) else 0.003
        outcome = (0.3 if is_met else 0.003) * source.uniform(1.0, 1.3)
        bounds = conformal.bounds("busy dense")
        given = bounds.around(forecast, 1.0, hitch)
        assert 0.0 < given.lower <= given.median <= given.upper
        inside.append(given.lower <= outcome <= given.upper)
        uppers.append(given.upper / given.median)
        conformal.observe(forecast, bounds, outcome, ["busy dense"], 1.0, hitch)
    assert (share(inside[200:]) == pytest.approx(COVERAGE, abs=0.02)) == (hitch > 0.0)


@pytest.mark.parametrize("hitch", [0.0, 0.04])
def test_who_meets_nobody_has_no_hitches(hitch: float) -> None:
    source, conformal, plain = random.Random(2), Conformal(), Conformal()
    for _ in range(60):
        outcome = source.lognormvariate(-6.0, 0.2)
        for own, its in ((conformal, hitch), (plain, 0.0)):
            own.observe(0.0025, own.bounds("idle dense"), outcome, ["idle dense", ALONE], 1.0, its)
    assert conformal.bounds(ALONE) == plain.bounds(ALONE)
    assert (conformal.bounds("idle dense") == plain.bounds("idle dense")) == (hitch == 0.0)


@given(
    st.floats(-8.0, 8.0), st.floats(0.0, 8.0), st.floats(0.0, 8.0), st.floats(1e-6, 1e4), st.floats(1.0, 5.0),
    st.floats(0.0, 10.0),
)  # fmt: skip
def test_an_interval_holds_its_median_and_is_above_nothing(
    place: float, below: float, above: float, forecast: float, scale: float, hitch: float
) -> None:
    found = Bounds(place - below, place, place + above).around(forecast, scale, hitch)
    assert 0.0 < found.lower <= found.median <= found.upper < math.inf


def test_an_outcome_of_two_regimes_teaches_both_and_moves_the_levels_of_the_first_alone() -> None:
    source, conformal = random.Random(7), Conformal()
    conformal.observe(1.0, conformal.bounds(ALONE), 1.0, [ALONE])
    levels = conformal.state()[ALONE][:2]
    for _ in range(2 * LEAST_OUTCOMES):
        bounds = conformal.bounds("idle dense")
        conformal.observe(1.0, bounds, source.lognormvariate(0, 0.1), ["idle dense", ALONE])
    state = conformal.state()
    assert len(state["idle dense"]) == 2 + 2 * LEAST_OUTCOMES
    assert state[ALONE][3:] == state["idle dense"][2:]
    assert state[ALONE][:2] == levels != state["idle dense"][:2]


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
    assert not any(inside[:2]), "nothing of the new world was inside before it was seen"
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
    run(conformal, [source.lognormvariate(0.5, 0.1) for _ in range(300)])
    borrowed = interval(conformal, "queued dense")
    assert borrowed.median == pytest.approx(math.exp(0.5), rel=0.05)
    assert borrowed.upper / borrowed.lower > 2, "the others may be surer than it can be"
    assert conformal.num_outcomes("queued dense") == 0
    assert not conformal.bounds("queued dense").is_settled
    run(conformal, [source.lognormvariate(1, 0.1) for _ in range(100)], "queued dense")
    assert interval(conformal, "queued dense").median == pytest.approx(math.e, rel=0.1)
    assert conformal.bounds("queued dense").is_settled
    assert interval(conformal).median == pytest.approx(math.exp(0.5), rel=0.1)


def test_who_meets_nobody_does_not_borrow_from_those_that_others_meet() -> None:
    source = random.Random(9)
    conformal = Conformal()
    run(conformal, [source.lognormvariate(1.0, 1.0) for _ in range(300)], "queued dense")
    first = conformal.bounds(ALONE)
    assert first == Conformal().bounds(ALONE)
    run(conformal, [source.lognormvariate(0, 0.01) for _ in range(LEAST_OUTCOMES - 1)], ALONE)
    later = conformal.bounds(ALONE)
    assert not later.is_settled
    assert later.high - later.low < 0.2 * (first.high - first.low)
    other = conformal.bounds("busy sparse")
    assert other.high > first.high, "of those that others meet more is known than of a first guess"


outcomes_of_all_sizes = st.lists(
    st.tuples(st.floats(-9, 9), st.sampled_from(["idle dense", "queued dense"])), max_size=2 * LEAST_OUTCOMES
)


@settings(max_examples=200, deadline=None)
@given(outcomes_of_all_sizes, st.floats(1.0, 4.2))
def test_however_few_and_far_the_outcomes_no_interval_is_absurd(errors: list[tuple[float, str]], scale: float) -> None:
    conformal = Conformal()
    for error, regime in errors:
        conformal.observe(1.0, conformal.bounds(regime), math.exp(error), [regime], scale)
        for asked in ("idle dense", "queued dense", "busy sparse"):
            found = conformal.bounds(asked).around(1.0, scale)
            assert found.lower <= found.median <= found.upper
            assert math.log(found.upper / found.median) <= WIDEST + 1e-9
            assert math.log(found.median / found.lower) <= WIDEST + 1e-9


def test_a_forecast_is_moved_as_far_as_outcomes_prove_it_wrong_and_no_further() -> None:
    source = random.Random(8)
    chance = [1.3] * 170 + [0.7] * 130  # a fair coin shows so many once in a hundred times; the plain median is 1.3
    source.shuffle(chance)
    conformal = Conformal()
    run(conformal, chance)
    assert interval(conformal).median == 1.0
    biased = Conformal()
    run(biased, [source.lognormvariate(-0.5, 0.2) for _ in range(300)])
    assert interval(biased).median == pytest.approx(math.exp(-0.5), rel=0.1)
    few = Conformal()
    run(few, [1.3] * 15)
    assert interval(few).median == 1.0


def test_no_bound_lies_beyond_what_was_seen() -> None:
    source = random.Random(6)
    conformal = Conformal()
    outcomes = [source.lognormvariate(0, 0.2) for _ in range(LEAST_OUTCOMES + 30)]
    run(conformal, outcomes)
    for _ in range(20):  # misses on both sides drive the levels as far as they go
        for outcome in (0.1, 9.0):
            conformal.observe(1.0, conformal.bounds("idle dense"), outcome, ["idle dense"])
    found = interval(conformal)
    assert found.lower == pytest.approx(0.1)
    assert found.upper == pytest.approx(9.0)


def test_a_guess_that_misses_leaves_the_levels_of_its_regime_alone() -> None:
    guessed, fresh = Conformal(), Conformal()
    for index in range(LEAST_OUTCOMES - 1):
        guessed.observe(1.0, guessed.bounds("idle dense"), math.exp(index), ["idle dense"])
    fresh.observe(1.0, fresh.bounds("idle dense"), 1.0, ["idle dense"])
    assert guessed.state()["idle dense"][:2] == fresh.state()["idle dense"][:2]


def test_a_state_that_is_restored_says_the_same() -> None:
    source = random.Random(3)
    conformal, again = Conformal(), Conformal()
    run(conformal, [source.lognormvariate(0, 0.3) for _ in range(400)])
    again.restore(conformal.state())
    before, after = interval(conformal), interval(again)
    assert (after.lower, after.upper) == pytest.approx((before.lower, before.upper), rel=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_a_server_that_meets_its_load_for_the_first_time_raises_no_alarm(seed: int) -> None:
    """Idle and well known at first, then three kinds of load, each foretold wrongly in its own way."""
    source = random.Random(seed)
    conformal, live, num_guesses = Conformal(), LiveCoverage(COVERAGE), 0
    centers = {"busy dense": 1.0, "busy sparse": -1.0, "queued dense": 2.5}
    for index in range(300):
        regime = "idle dense" if index < 60 else source.choice(list(centers))
        outcome = source.lognormvariate(centers.get(regime, 0.0), 0.3 if index >= 60 else 0.03)
        bounds = conformal.bounds(regime)
        said = bounds.around(1.0)
        num_guesses += not bounds.is_settled
        live.add(is_inside=said.lower <= outcome <= said.upper, width=1.0, is_settled=bounds.is_settled)
        conformal.observe(1.0, bounds, outcome, [regime])
        assert not live.is_drifting, f"after {index} outcomes"
    assert num_guesses == 4 * LEAST_OUTCOMES


def test_guesses_count_in_the_share_and_not_for_the_alarm() -> None:
    live = LiveCoverage(COVERAGE)
    for _ in range(100):
        live.add(is_inside=False, width=1.0, is_settled=False)
    assert (live.share, live.settled_share, live.is_drifting) == (0.0, 1.0, False)
    for _ in range(60):
        live.add(is_inside=False, width=1.0, is_settled=True)
    assert live.is_drifting


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
