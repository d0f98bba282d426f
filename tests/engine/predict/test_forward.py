"""The compiled simulation against the plain one, and the queue's table against its entries."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vashista.engine.messages import (
    AttentionMode,
    EngineStats,
    FinishReason,
    SamplingParams,
    SchedulerRules,
    StepReport,
    Submit,
    SupportReport,
    TokenEvent,
)
from vashista.engine.models.decode_graph import PROMPT_ROWS
from vashista.engine.predict import forward
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.decode_costs import MAX_MODES
from vashista.engine.predict.expected_support import SupportForecast
from vashista.engine.predict.features import KNOTS
from vashista.engine.predict.kind_table import KindTable
from vashista.engine.predict.prediction import ExpectedSupport
from vashista.engine.predict.predictor import Forecast, Predictor
from vashista.engine.predict.queue import ROW, Entry, QueueMirror
from vashista.engine.work import WorkModel

pytestmark = pytest.mark.skipif(
    forward.load() is None, reason="no compiled simulation: built where there is a compiler"
)
SAME = 1e-9
"""Relative: the order of all sums is the same, so that only the last digits may differ."""
WINDOWS = (None, 300, None, 40)
WORK = WorkModel(weights=1000.0, head=300.0, pair=4.0, windows=((None, 4), (300, 2), (40, 2)))
MODES = (
    AttentionMode(),
    AttentionMode(token_budget=64),
    AttentionMode(token_budget=200),
    AttentionMode(max_dropped_mass=0.2),
)
COSTS = StepCoefficients(
    base_s=1.0,
    per_token_s=[0.01 + 0.001 * index for index in range(len(KNOTS))],
    counts_s=[0.002, 0.003, 0.01, 0.02, 0.001, 1e-4, 2e-5, 3e-5, 2e-4, 0.8, 0.6, 0.7],
    gap_s=0.05,
)


def rules_of(source: random.Random) -> SchedulerRules:
    running = source.choice([1, 3, 8, 40])
    return SchedulerRules(
        page_size=source.choice([4, 16]),
        num_pages=source.choice([200, 1000, 100_000]),  # the longest request has 160 pages of 4
        max_running_requests=running,
        max_batch_tokens=max(running, source.choice([16, 64, 512])),
        prefix_caching=source.random() < 0.5,
        max_token_gap_s=source.choice([None, None, 1.7, 3.0]),
        prompt_rows=source.choice([(), (30,), (8, 20, 60, 200)]),
    )


def submit_of(source: random.Random, name: str, arrival_s: float) -> Submit:
    never_stops = source.random() < 0.3
    sampling = SamplingParams(
        seed=0,
        max_tokens=source.choice([1, 2, source.randint(1, 40), source.randint(40, 200)]),
        temperature=source.choice([0.0, 1.0]),
        ignore_eos=never_stops,
        presence_penalty=source.choice([0.0, 0.0, 1.0]),
    )
    return Submit(
        name,
        [7] * source.choice([1, source.randint(1, 60), source.randint(60, 440)]),
        sampling,
        arrival_s,
        priority=source.choice([0, 0, 3]),
        due_s=source.choice([None, None, 50.0, arrival_s + 5.0]),
        attention=source.choice(MODES),
    )


def queue_of(source: random.Random, num_running: int, num_waiting: int) -> QueueMirror:
    """Some decode, some read, some wait, some have been preempted; some came and went before."""
    queue = QueueMirror()
    names = [f"r{source.randrange(10**6)}-{number}" for number in range(num_running + num_waiting)]
    for name in names:
        queue.submit(
            Entry(submit_of(source, name, source.choice([0.0, source.random()])), 99.0, source.choice([0, 16]))
        )
        if source.random() < 0.2:
            queue.submit(Entry(submit_of(source, f"gone{name}", 0.0), 0.0))
            queue.remove(f"gone{name}")
    events, progress = [], {}
    for name in names[:num_running]:
        entry = queue.get(name)
        assert entry is not None
        if source.random() < 0.7:
            events.append(TokenEvent(name, token_ids=[1] * source.randint(1, entry.max_tokens)))
        else:
            progress[name] = source.randint(1, entry.num_prompt)
    for name in names[num_running:]:
        if source.random() < 0.1:
            progress[name] = 0
    stats = EngineStats(
        num_pages_used=source.choice([0, 100, 190]), step_ended_s=source.choice([99.9, 98.0]), cold=source.random()
    )
    queue.take(StepReport(events, stats, dict.fromkeys(names[:num_running], 1e-3), progress=progress))
    return queue


def predictor_of(seed: int, *, is_plain: bool) -> Predictor:
    """Two of the same seed know the same."""
    source = random.Random(seed)
    rules = rules_of(source)
    predictor = Predictor(WORK, rules, COSTS, SupportForecast(WINDOWS, None, 100), is_plain=is_plain)
    assert predictor.is_compiled is not is_plain
    for _ in range(source.choice([0, 50])):
        predictor.lengths.observe(source.randint(1, 100), has_stopped=source.random() < 0.6)
    for second in range(source.choice([0, 40])):
        predictor.arrivals.observe(60 + second * source.choice([0.2, 1.0]), [(30, 20)], is_met=True)
    mode = MODES[3]
    for _ in range(source.choice([0, 30])):
        learn(predictor, mode, 200, 1, 0.9)
    return predictor


def learn(predictor: Predictor, mode: AttentionMode, num_prompt: int, num_tokens: int, attended_share: float) -> None:
    report = SupportReport(
        num_head_steps=8,
        tokens_attended=200.0 * attended_share,
        tokens_visible=200.0,
        dense_share=0.0,
        dropped_mass_bound=1.0,
        dropped_mass_estimate=0.1,
        support_gap=None,
    )
    predictor.support.observe(mode, num_prompt, num_tokens, report)


def forecast_of(predictor: Predictor, seed: int, num_running: int, num_waiting: int) -> Forecast:
    source = random.Random(seed)
    queue = queue_of(source, num_running, num_waiting)
    submits = [submit_of(source, f"own{source.randrange(10**6)}", 100.0) for _ in range(source.choice([1, 1, 3]))]
    cached = [source.choice([0, 16]) if len(submit.prompt_token_ids) > 16 else 0 for submit in submits]
    return predictor.forecast(queue, submits, 100.0, cached, delay_s=source.choice([0.0, 0.0, 4.0]))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 40), st.integers(0, 60))
def test_compiled_and_plain_say_the_same(seed: int, num_running: int, num_waiting: int) -> None:
    plain, compiled = (
        forecast_of(predictor_of(seed, is_plain=is_plain), seed, num_running, num_waiting) for is_plain in (True, False)
    )
    assert_same(compiled, plain)


def test_there_is_room_for_the_rows_of_all_graphs() -> None:
    assert len(PROMPT_ROWS) <= forward.MAX_PROMPT_ROWS


def test_a_queue_too_long_to_go_through_is_told_the_same() -> None:
    for seed in range(4):
        plain, compiled = (
            forecast_of(predictor_of(seed, is_plain=is_plain), seed, 10, 3000) for is_plain in (True, False)
        )
        assert plain.timeline.num_events > 500
        assert_same(compiled, plain)


def test_requests_that_each_attend_in_a_way_of_their_own_are_measured_once_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More ways than are remembered: a client chooses its budget freely, and a queue of them halted the server."""
    fills: list[tuple[AttentionMode, int]] = []
    measure = SupportForecast.uncorrected

    def counted(support: SupportForecast, mode: AttentionMode, context_len: int) -> ExpectedSupport:
        fills.append((mode, context_len))
        return measure(support, mode, context_len)

    monkeypatch.setattr(SupportForecast, "uncorrected", counted)
    num_modes = MAX_MODES + 88
    plain, compiled = (predictor_of(1, is_plain=is_plain) for is_plain in (True, False))
    forecasts = []
    for predictor in (plain, compiled):
        queue = QueueMirror()
        for number in range(num_modes):
            sampling = SamplingParams(seed=0, max_tokens=60, temperature=float(number % 2))
            mode = AttentionMode(token_budget=256 + number // 2 * 2)  # two kinds of each mode, in neighbouring rows
            queue.submit(Entry(Submit(f"a{number:04}", [7] * 200, sampling, 0.0, attention=mode), 99.0))
            mode = AttentionMode(token_budget=257 + number // 2 * 2)
            queue.submit(Entry(Submit(f"b{number:04}", [7] * 200, sampling, 0.0, attention=mode), 99.0))
        assert len({kind[0] for kind in queue.kinds}) == num_modes
        own = Submit("own", [7] * 20, SamplingParams(seed=0, max_tokens=5), 100.0)
        fills.clear()
        forecasts.append(predictor.forecast(queue, [own], 100.0))
    assert_same(forecasts[1], forecasts[0])
    assert len(fills) == len(set(fills))
    for predictor in (plain, compiled):
        fills.clear()
        predictor.forecast(queue, [own], 100.0)
        assert len(fills) <= 2, "what the queue needs was forgotten"


def test_how_a_request_attends_is_measured_when_it_first_runs_in_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    fills: list[AttentionMode] = []
    measure = SupportForecast.uncorrected

    def counted(support: SupportForecast, mode: AttentionMode, context_len: int) -> ExpectedSupport:
        fills.append(mode)
        return measure(support, mode, context_len)

    monkeypatch.setattr(SupportForecast, "uncorrected", counted)
    predictor, queue, late = predictor_of(1, is_plain=False), QueueMirror(), AttentionMode(token_budget=300)
    own = Submit("own", [7] * 20, SamplingParams(seed=0, max_tokens=5), 100.0)
    for number in range(3000):
        sampling = SamplingParams(seed=0, max_tokens=60)
        queue.submit(Entry(Submit(f"a{number:04}", [7] * 200, sampling, 0.0), 99.0))
    predictor.forecast(queue, [own], 100.0)
    queue.submit(Entry(Submit("late", [7] * 200, sampling, 1.0, attention=late), 99.0))
    fills.clear()
    assert predictor.forecast(queue, [own], 100.0).timeline.num_events > 500
    assert late not in fills, "too many are before it for it to run"
    for entry in queue.ordered[:-1]:
        queue.remove(entry.id)
    forecast = predictor.forecast(queue, [own], 100.0)
    assert late in fills
    assert_same(forecast, predictor_of(1, is_plain=True).forecast(queue, [own], 100.0))


def test_a_prediction_writes_only_the_kinds_that_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = KindTable._write

    def counted(table: KindTable, number: int) -> None:
        written.append(number)
        write(table, number)

    monkeypatch.setattr(KindTable, "_write", counted)
    predictor, queue = predictor_of(1, is_plain=False), QueueMirror()

    def submit(number: int) -> None:
        mode = AttentionMode(max_dropped_mass=0.05 + number / 1000)
        sampling = SamplingParams(seed=0, max_tokens=60 + 10 * number)
        queue.submit(Entry(Submit(f"a{number:04}", [7] * 200, sampling, 0.0, attention=mode), 99.0))

    def predict() -> list[int]:
        written.clear()
        predictor.forecast(queue, [Submit("own", [7] * 20, SamplingParams(seed=0, max_tokens=5), 100.0)], 100.0)
        return sorted(set(written))

    for number in range(300):
        submit(number)
    assert predict() == list(range(300))
    assert predict() == []
    submit(300)
    assert predict() == [300]
    queue.remove("a0007")
    submit(301)
    assert predict() == [7]
    predictor.forecast(QueueMirror(), [Submit("own", [7], SamplingParams(seed=0, max_tokens=5), 100.0)], 100.0)
    assert predict() == []


@pytest.mark.parametrize("is_plain", [False, True])
def test_what_changes_between_predictions_is_seen_by_the_next(is_plain: bool) -> None:
    """The table of kinds is kept: shapes that grow move in memory, corrections are learnt, kinds take free numbers."""
    kept = predictor_of(1, is_plain=is_plain)
    queue = QueueMirror()
    source = random.Random(5)
    for number in range(400):
        mode = source.choice([AttentionMode(max_dropped_mass=0.01 * (1 + number % 9)), *MODES])
        never_stops = source.random() < 0.5
        sampling = SamplingParams(seed=0, max_tokens=source.randint(1, 3000), ignore_eos=never_stops)
        entry = Entry(Submit(f"a{number:04}", [7] * 200, sampling, 0.0, attention=mode), 99.0)
        queue.submit(entry)
        if source.random() < 0.5:
            queue.remove(source.choice(queue.ordered).id)
        if source.random() < 0.3:
            learn(kept, mode, 200, 50, source.uniform(0.2, 0.9))
        fresh = Predictor(kept.work, kept.rules, kept.coefficients, kept.support, is_plain=True)
        fresh.lengths, fresh.arrivals = kept.lengths, kept.arrivals
        own = Submit("own", [7] * source.choice([20, 900]), sampling, 100.0, attention=source.choice(MODES))
        assert_same(kept.forecast(queue, [own], 100.0), fresh.forecast(queue, [own], 100.0))


def test_what_nobody_in_the_queue_needs_is_forgotten() -> None:
    predictor, queue = predictor_of(1, is_plain=False), QueueMirror()
    for number in range(3 * MAX_MODES):
        mode = AttentionMode(token_budget=256 + number)
        own = Submit("own", [7], SamplingParams(seed=0, max_tokens=5), 100.0, attention=mode)
        predictor.forecast(queue, [own], 100.0)
    assert len(predictor._costs._shapes) == MAX_MODES


def test_the_last_ways_to_attend_are_learnt_of_and_no_more() -> None:
    predictor = predictor_of(1, is_plain=False)
    for number in range(1000):
        mode = AttentionMode(max_dropped_mass=(1 + number) / 1001)
        learn(predictor, mode, 200, 50, 0.3)
        assert predictor.support.correction(mode) != 1.0
    assert len(predictor.support._learnt) < 100
    assert len(predictor.support._grid) < 100


def test_until_everybody_who_waits_has_begun_it_takes_the_same() -> None:
    for seed in range(30):
        queue = queue_of(random.Random(seed), 5, 20)
        plain, compiled = (predictor_of(seed, is_plain=is_plain).drain_s(queue, 100.0) for is_plain in (True, False))
        assert compiled == pytest.approx(plain, rel=SAME)


def test_new_coefficients_are_those_of_the_next_prediction() -> None:
    predictor = predictor_of(1, is_plain=False)
    before = forecast_of(predictor, 1, 4, 4).total_s(1)
    predictor.set_coefficients(COSTS.scaled(2.0, 2.0))
    assert forecast_of(predictor, 1, 4, 4).total_s(1) > 1.5 * before


def test_who_comes_after_a_pause_waits_for_a_machine_that_has_been_idle() -> None:
    predictor = Predictor(WORK, rules_of(random.Random(1)), COSTS, SupportForecast(WINDOWS, None, 100))
    queue = QueueMirror()
    submit = Submit("a", [7] * 40, SamplingParams(seed=0, max_tokens=4), 100.0)
    queue.take(StepReport([], EngineStats(step_ended_s=100.0), {}))
    soon, late = (predictor.forecast(queue, [submit], now_s).ttft_s for now_s in (100.0, 107.0))
    assert late - soon == pytest.approx(COSTS.count_s("idle"), rel=0.01)
    delayed = predictor.forecast(queue, [submit], 100.0, delay_s=7.0)
    assert delayed.ttft_s == pytest.approx(late, rel=1e-6)


def test_a_model_of_too_many_kinds_of_windows_is_predicted_in_python() -> None:
    work = WorkModel(1000.0, 300.0, 4.0, tuple((window, 1) for window in range(1, forward.MAX_WINDOWS + 2)))
    predictor = Predictor(work, rules_of(random.Random(1)), COSTS, SupportForecast((None,), None, 100))
    assert not predictor.is_compiled
    assert forecast_of(predictor, 1, 2, 2).ttft_s > 0


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "native.so").write_bytes(b"no library")
    with pytest.raises(OSError, match="native"):
        forward.Forward(tmp_path / "native.so")


def assert_same(compiled: Forecast, plain: Forecast) -> None:
    one, other = compiled.timeline, plain.timeline
    assert one.num_events == other.num_events
    for name in ("runs_s", "first_s", "num_steps"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=SAME), name
    assert one.num_points == other.num_points
    assert list(one.numbers) == pytest.approx(list(other.numbers), rel=SAME, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_the_table_is_what_the_entries_are_whatever_comes_and_goes(seed: int) -> None:
    source, queue = random.Random(seed), QueueMirror()
    names: list[str] = []
    for number in range(120):
        match source.randrange(5):
            case 0 | 1:
                names.append(f"{source.randrange(10**6)}-{number}")
                queue.submit(Entry(submit_of(source, names[-1], source.random()), source.random(), 16))
            case 2 if names:
                queue.remove(names.pop(source.randrange(len(names))))
            case 3 if names:
                queue.take(report_of(source, names))
            case 4 if source.random() < 0.05:
                queue.clear()
                names.clear()
        assert_in_table(queue)


def report_of(source: random.Random, names: list[str]) -> StepReport:
    stepped = source.sample(names, source.randint(1, len(names)))
    events, progress = [], {}
    for name in stepped:
        kind = source.random()
        if kind < 0.6:
            events.append(TokenEvent(name, token_ids=[1, 2]))
        elif kind < 0.8:
            events.append(TokenEvent(name, token_ids=[1], finish_reason=FinishReason.STOP))
            names.remove(name)
        else:
            progress[name] = source.choice([0, 5])
    return StepReport(events, EngineStats(), dict.fromkeys(stepped, 1e-3), progress=progress)


def assert_in_table(queue: QueueMirror) -> None:
    assert len(queue.order) == len(queue.ordered) == len(set(queue.order))
    for row, entry in zip(queue.order, queue.ordered, strict=True):
        numbers: list[Any] = list(queue.table[row * ROW : (row + 1) * ROW])
        assert queue.kinds[int(numbers.pop(5))] == entry.kind
        sizes = (entry.num_prompt, entry.num_output, entry.max_tokens, entry.never_stops)
        progress = (entry.num_computed, entry.num_cached, entry.submitted_s, entry.is_running)
        assert tuple(numbers) == (entry.rank[0], *sizes, *progress)
