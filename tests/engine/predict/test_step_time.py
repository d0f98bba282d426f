"""The step-time model on synthetic machines whose truth is known."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterator

import numpy as np
import pytest

from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.features import (
    COLD_KEEP,
    COUNTS,
    FEW_TOKENS,
    KNOTS,
    NUM_FEATURES,
    StepFeatures,
    idle_of,
    spread,
)
from vashista.engine.predict.non_negative import solve_non_negative
from vashista.engine.predict.step_time import StepTimeModel, guess_of
from vashista.engine.work import WorkModel

NAMES = ("base", *KNOTS, *COUNTS)
WORK = WorkModel(weights=2.5e7, head=4e6, pair=512.0, windows=((None, 16),))
GUESS = guess_of(WORK, device="cpu", dtype="float32", times=None)
TRUTH = StepCoefficients(
    base_s=4e-3,
    per_token_s=[1e-4, 1e-4, 2e-4, 2e-4, 2.5e-4, *([3e-4] * (len(KNOTS) - 5))],
    counts_s=[2e-5, 5e-5, 2e-4, 3e-4, 4e-4, 3e-8, 1e-8, 2e-8, 6e-8, 3e-3, 5e-3, 4e-3],
)

GPU_WORK = WorkModel(weights=7e9, head=3.3e7, pair=1024.0, windows=((None, 16),))
GPU_GUESS = guess_of(GPU_WORK, device="cuda", dtype="bfloat16", times=None)
GPU_TRUTH = StepCoefficients(
    base_s=7e-3,
    per_token_s=[1e-5 if knot < 512 else 2.4e-5 for knot in KNOTS],
    counts_s=[1e-5, 2e-5, 1e-4, 2e-4, 3e-4, 1e-8, 1e-9, 1e-8, 3e-8, 1e-4, 6.5e-3, 3.6e-3],
)


def step(source: random.Random) -> StepFeatures:
    num_decoding, num_sparse = source.randint(0, 12), source.randint(0, 4)
    chunk = source.choice([0, 0, source.randint(2, 500)])
    count = num_decoding + num_sparse + (chunk > 0)
    found = StepFeatures(num_decoding + num_sparse + chunk, count, count, source.randint(0, count), 0, num_sparse)
    found.decode_pairs = sum(source.randint(16, 4000) * 16 for _ in range(num_decoding))
    found.prompt_pairs = chunk * source.randint(16, 4000) * 16.0
    found.scored_pairs, found.kept_pairs = num_sparse * 4000.0, num_sparse * source.choice([256, 1024]) * 16.0
    return found


def replies(source: random.Random) -> Iterator[StepFeatures]:
    """Prompts and the replies to them, one by one: the first steps of each are cold."""
    while True:
        num_prompt, cold = source.randint(20, 500), 1.0
        yield StepFeatures(num_prompt, 1, 1, prompt_pairs=num_prompt * num_prompt * 8.0)
        for step in range(source.randint(5, 90)):
            yield StepFeatures(1, 1, 1, decode_pairs=(num_prompt + step) * 16.0, cold=cold)
            cold *= COLD_KEEP


def visits(source: random.Random) -> Iterator[StepFeatures]:
    """A prompt after a pause, its reply, and sometimes another prompt beside that."""
    while True:
        num_prompt, pause_s = source.randint(20, 500), source.choice([0.0, source.uniform(0.0, 0.1), 3.0])
        pairs = num_prompt * num_prompt * 8.0
        yield StepFeatures(num_prompt, 1, 1, prompt_pairs=pairs, idle=idle_of(pause_s))
        num_streams = 1
        for step in range(source.randint(5, 30)):
            own = (num_prompt + step) * 16.0 * num_streams
            if source.random() < 0.1 and num_streams < 8:
                more = source.randint(20, 500)
                yield StepFeatures(
                    more + num_streams, num_streams + 1, num_streams + 1,
                    decode_pairs=own, prompt_pairs=more * more * 8.0, split=1.0,
                )  # fmt: skip
                num_streams += 1
            else:
                yield StepFeatures(num_streams, num_streams, num_streams, decode_pairs=own)


def errors(model: StepTimeModel, truth: StepCoefficients, source: random.Random, count: int = 200) -> float:
    """Median relative error on steps that were not seen."""
    steps = [one for one in (step(source) for _ in range(count)) if one.num_tokens]
    return statistics.median(abs(model.coefficients.step_s(one) / truth.step_s(one) - 1) for one in steps)


def taught(count: int, noise: float, seed: int = 1, speed: float = 1.0) -> StepTimeModel:
    source, model = random.Random(seed), StepTimeModel(GUESS, WORK)
    for _ in range(count):
        one = step(source)
        model.observe(one, speed * TRUTH.step_s(one) * math.exp(source.gauss(0, noise)))
    return model


def test_it_learns_a_machine_that_is_not_as_it_was_guessed() -> None:
    assert errors(StepTimeModel(GUESS, WORK), TRUTH, random.Random(9)) > 0.15
    assert errors(taught(600, 0.0), TRUTH, random.Random(9)) < 0.02
    assert errors(taught(600, 0.1), TRUTH, random.Random(9)) < 0.05


def test_steps_in_which_the_machine_did_something_else_teach_little() -> None:
    source, model = random.Random(2), StepTimeModel(GUESS, WORK)
    for index in range(600):
        one = step(source)
        model.observe(one, TRUTH.step_s(one) * (8.0 if index % 12 == 0 else 1.0))
    assert errors(model, TRUTH, random.Random(9)) < 0.1


def test_a_machine_that_slows_down_is_followed_within_a_hundred_steps() -> None:
    source, model = random.Random(3), taught(600, 0.03)
    for _ in range(100):
        one = step(source)
        model.observe(one, 1.6 * TRUTH.step_s(one))
    assert statistics.median(
        model.coefficients.step_s(one) / TRUTH.step_s(one)
        for one in (step(source) for _ in range(99))
        if one.num_tokens
    ) == pytest.approx(1.6, rel=0.08)


def test_one_slow_first_step_does_not_have_all_others_expected_slow() -> None:
    prompt = StepFeatures(200, 1, 1)
    prompt.prompt_pairs = 200 * 100.0
    model = StepTimeModel(TRUTH, WORK)
    model.observe(prompt, 9 * TRUTH.step_s(prompt))
    assert model.coefficients.step_s(prompt) < 1.2 * TRUTH.step_s(prompt)
    for _ in range(3):
        model.observe(prompt, 9 * TRUTH.step_s(prompt))
    assert model.coefficients.step_s(prompt) == pytest.approx(9 * TRUTH.step_s(prompt), rel=0.2)  # so it is the machine


@pytest.mark.parametrize(("few", "many"), [(1.0, 2.0), (2.5, 1.0), (1.0, 0.5)])
def test_prompts_and_replies_are_followed_each_at_its_own_speed(few: float, many: float) -> None:
    """A neighbour takes memory bandwidth from the one, a core from the other."""
    source, model = random.Random(7), StepTimeModel(GUESS, WORK)
    steps = replies(source)
    for one in itertools.islice(steps, 3000):
        model.observe(one, TRUTH.step_s(one) * math.exp(source.gauss(0, 0.03)))
    num_prompts = 0
    while num_prompts < 15:
        one = next(steps)
        num_prompts += one.num_tokens > FEW_TOKENS
        model.observe(one, (many if one.num_tokens > FEW_TOKENS else few) * TRUTH.step_s(one))
    prompt, token = StepFeatures(200, 1, 1, prompt_pairs=320_000.0), StepFeatures(1, 1, 1, decode_pairs=4000.0)
    assert model.coefficients.step_s(prompt) == pytest.approx(many * TRUTH.step_s(prompt), rel=0.1)
    assert model.coefficients.step_s(token) == pytest.approx(few * TRUTH.step_s(token), rel=0.1)


@pytest.mark.parametrize(("few", "many"), [(1.0, 1.0), (0.5, 2.0), (3.0, 0.2)])
def test_coefficients_of_two_speeds_are_exact_beyond_the_knots_between_and_never_fall(few: float, many: float) -> None:
    found = TRUTH.scaled(few, many)
    seconds = [found.tokens_s(count) for count in range(1, 9000)]
    assert all(later >= sooner * (1 - 1e-12) for sooner, later in itertools.pairwise(seconds))
    assert found.tokens_s(5) == pytest.approx(few * TRUTH.tokens_s(5))
    for count in (256, 900, 8192, 8900):
        assert found.tokens_s(count) == pytest.approx(max(few * TRUTH.tokens_s(8), many * TRUTH.tokens_s(count)))
    assert found.count_s("prompt_pairs") == many * TRUTH.count_s("prompt_pairs")
    assert found.count_s("decode_pairs") == few * TRUTH.count_s("decode_pairs")


def test_of_replies_it_tells_the_mean_and_of_prompts_the_middle() -> None:
    """One step of five takes 1.8 times as long: a reply of many such steps takes 1.16 times as long."""
    source, model = random.Random(8), StepTimeModel(GUESS, WORK)
    for one in itertools.islice(replies(source), 6000):
        model.observe(one, TRUTH.step_s(one) * (1.8 if source.random() < 0.2 else 1.0))
    found = []
    for one in itertools.islice(replies(source), 6000):
        found.append((one.num_tokens > FEW_TOKENS, model.coefficients.step_s(one) / TRUTH.step_s(one)))
        model.observe(one, TRUTH.step_s(one) * (1.8 if source.random() < 0.2 else 1.0))
    few, many = (statistics.mean(ratio for is_many, ratio in found if is_many is kind) for kind in (False, True))
    assert few == pytest.approx(1.16, abs=0.03)
    assert 1.0 <= many < few


def test_kinds_that_never_come_do_not_hold_up_those_that_do() -> None:
    """Guessed 1.7 times too slow; steps of 2 to 31 tokens never come, which by the guess take longer than 32 do."""
    source, model = random.Random(9), StepTimeModel(GPU_GUESS, GPU_WORK)
    truth = StepCoefficients.of([0.6 * value for value in GPU_GUESS.vector()])
    seen = [StepFeatures(count, 1, 1, prompt_pairs=16.0 * count * count) for count in (32, 64, 128)]
    for _ in range(12):
        for one in (*seen, *(StepFeatures(1, 1, 1, decode_pairs=1600.0) for _ in range(4))):
            model.observe(one, truth.step_s(one) * math.exp(source.gauss(0, 0.01)))
    for one in (*seen, StepFeatures(8, 8, 8, decode_pairs=16_000.0), StepFeatures(1024, 1, 1)):
        assert model.coefficients.step_s(one) == pytest.approx(truth.step_s(one), rel=0.03)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_machine_that_changes_its_speed_is_thought_to_do_so_once(factor: float) -> None:
    """What never came is told by the guess, which was right, and by the speed."""
    source, model = random.Random(11), StepTimeModel(TRUTH, WORK)
    steps, streams = replies(source), StepFeatures(8, 8, 8, decode_pairs=64_000.0)
    for one in itertools.islice(steps, 400):
        model.observe(one, TRUTH.step_s(one) * math.exp(source.gauss(0, 0.02)))
    for one in itertools.islice(steps, 36):
        model.observe(one, factor * TRUTH.step_s(one) * math.exp(source.gauss(0, 0.02)))
    assert model.coefficients.step_s(streams) == pytest.approx(factor * TRUTH.step_s(streams), rel=0.1)


def test_more_tokens_than_the_last_knot_are_not_free() -> None:
    model = taught(48, 0.0)
    assert model.coefficients.tokens_s(16_384) > 1.5 * model.coefficients.tokens_s(8192)


def test_prompts_that_something_held_up_move_the_others_little() -> None:
    source, model = random.Random(10), taught(600, 0.02)
    prompt, found = StepFeatures(200, 1, 1, prompt_pairs=320_000.0), []
    for _ in range(300):
        model.observe(prompt, TRUTH.step_s(prompt) * (1.6 if source.random() < 0.15 else 1.0))
        found.append(model.coefficients.step_s(prompt) / TRUTH.step_s(prompt))
    assert statistics.median(found) == pytest.approx(1.0, abs=0.02)


def test_long_prompts_are_not_forgotten_over_many_short_steps() -> None:
    source, model = random.Random(4), taught(600, 0.02)
    long = StepFeatures(500, 1, 1, prompt_pairs=500 * 2000 * 16.0)
    for _ in range(5000):
        one = StepFeatures(3, 3, 3, decode_pairs=source.randint(50, 900) * 48.0)
        model.observe(one, TRUTH.step_s(one) * math.exp(source.gauss(0, 0.02)))
    assert model.coefficients.step_s(long) == pytest.approx(TRUTH.step_s(long), rel=0.1)


def test_a_model_that_goes_on_from_another_has_learnt_from_the_steps_of_both() -> None:
    source, model = random.Random(6), StepTimeModel(GUESS, WORK)
    for one in itertools.islice(replies(source), 48):
        model.observe(one, TRUTH.step_s(one))
    again = StepTimeModel(model.coefficients, WORK)
    for one in itertools.islice(replies(source), 24):
        again.observe(one, TRUTH.step_s(one))
    assert (GUESS.num_steps, model.coefficients.num_steps, again.coefficients.num_steps) == (0, 48, 72)


def test_steps_after_a_prompt_are_told_from_those_long_after() -> None:
    source, model = random.Random(5), StepTimeModel(GUESS, WORK)
    for one in itertools.islice(replies(source), 4000):
        model.observe(one, TRUTH.step_s(one) * math.exp(source.gauss(0, 0.05)))
    for known in (model, StepTimeModel(model.coefficients, WORK)):
        cold, warm = (StepFeatures(1, 1, 1, decode_pairs=4000.0, cold=cold) for cold in (1.0, 0.0))
        assert known.coefficients.step_s(cold) == pytest.approx(TRUTH.step_s(cold), rel=0.05)
        assert known.coefficients.step_s(warm) == pytest.approx(TRUTH.step_s(warm), rel=0.05)


def test_it_learns_what_reading_the_weights_twice_and_waking_up_cost() -> None:
    """From an engine of which little is known: prompts alone after pauses of any length, others beside streams."""
    source, model = random.Random(7), StepTimeModel(GPU_GUESS, GPU_WORK)
    steps = list(itertools.islice(visits(source), 4000))
    for one in steps[:3000]:
        model.observe(one, GPU_TRUTH.step_s(one) * math.exp(source.gauss(0, 0.05)))
    for known in (model, StepTimeModel(model.coefficients, GPU_WORK)):
        for name in ("split", "idle"):
            marked = [one for one in steps[3000:] if getattr(one, name) > 0.0]
            off = [abs(known.coefficients.step_s(one) / GPU_TRUTH.step_s(one) - 1.0) for one in marked]
            assert statistics.median(off) < 0.03
            assert known.coefficients.count_s(name) == pytest.approx(GPU_TRUTH.count_s(name), rel=0.15)


def test_a_machine_to_which_it_makes_no_difference_is_not_thought_to_wake_up_or_to_read_twice() -> None:
    source, model = random.Random(8), StepTimeModel(GPU_GUESS, GPU_WORK)
    even = StepCoefficients.of([*GPU_TRUTH.vector()[:-2], 0.0, 0.0])
    for one in itertools.islice(visits(source), 3000):
        model.observe(one, even.step_s(one) * math.exp(source.gauss(0, 0.05)))
    assert model.coefficients.count_s("split") < 0.1 * even.base_s
    assert model.coefficients.count_s("idle") < 0.1 * even.base_s


def test_a_machine_whose_caches_hold_no_weights_is_not_thought_cold() -> None:
    source, model = random.Random(6), StepTimeModel(GUESS, WORK)
    even = StepCoefficients.of([value * (name != "cold") for name, value in zip(NAMES, TRUTH.vector(), strict=True)])
    for one in itertools.islice(replies(source), 4000):
        model.observe(one, even.step_s(one) * math.exp(source.gauss(0, 0.05)))
    assert model.coefficients.count_s("cold") < 0.02 * even.base_s


def test_what_it_says_can_be_saved_and_taken_up() -> None:
    model = taught(600, 0.02)
    assert errors(StepTimeModel(model.coefficients, WORK), TRUTH, random.Random(9)) < 0.03


def test_tokens_are_spread_over_the_knots() -> None:
    assert spread(1) == [0.0] * len(KNOTS)
    assert sum(spread(700)) == 699
    assert len(StepFeatures(5).vector()) == NUM_FEATURES
    one = StepFeatures(700, 3, 2, 1, 1, 1, 10.0, 20.0, 30.0, 40.0, 0.5, 1.0, 0.3)
    assert TRUTH.step_s(one) == pytest.approx(float(np.dot(one.vector(), TRUTH.vector())))


def test_coefficients_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="not between 0 and 3600 s"):
        StepCoefficients(base_s=-1.0, per_token_s=[0.0] * len(KNOTS), counts_s=[0.0] * len(COUNTS))
    with pytest.raises(ValueError, match="length"):
        StepCoefficients(base_s=1.0, per_token_s=[], counts_s=[0.0] * len(COUNTS))


def test_non_negative_least_squares_from_anywhere_is_as_good_where_columns_are_alike_or_empty() -> None:
    random_source = np.random.default_rng(6)
    for _ in range(40):
        rows = random_source.random((30, 8)) * 10.0 ** random_source.uniform(-6, 6, 8)
        rows[:, 3], rows[:, 5] = 2.0 * rows[:, 1], 0.0
        y = rows @ (random_source.normal(0, 1, 8) / rows.max(0, initial=1e-9))
        gram, moments = rows.T @ rows + 1e-18 * np.eye(8), rows.T @ y
        cold = solve_non_negative(gram, moments)
        warm = solve_non_negative(gram, moments, 10.0 ** random_source.uniform(-9, 9, 8))

        def missed(x: np.ndarray, rows: np.ndarray = rows, y: np.ndarray = y) -> float:
            return float(((rows @ x - y) ** 2).sum())

        assert (warm >= 0).all()
        assert missed(warm) <= missed(cold) * (1 + 1e-6) + 1e-12


def test_non_negative_least_squares_meets_its_optimality_conditions() -> None:
    random_source = np.random.default_rng(5)
    for _ in range(50):
        rows = random_source.random((40, 8))
        y = rows @ random_source.normal(0, 1, 8) + random_source.normal(0, 0.1, 40)
        gram, moments = rows.T @ rows, rows.T @ y
        anywhere = random_source.random(8) * (random_source.random(8) < 0.6)
        for near in (None, np.zeros(8), anywhere, solve_non_negative(gram, moments)):
            x = solve_non_negative(gram, moments, near)
            slope = moments - gram @ x
            assert (x >= 0).all()
            assert (np.abs(slope[x > 0]) < 1e-6).all()
            assert (slope[x == 0] < 1e-6).all()
