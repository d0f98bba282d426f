"""The computed Retry-After against an engine that does exactly what its steps are said to take, on no clock at all;
and which outcomes teach what forecasts miss by."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from vashista.engine.config import SavedStepTimes
from vashista.engine.messages import (
    EngineStats,
    FinishReason,
    SamplingParams,
    SchedulerRules,
    StepReport,
    Submit,
    TokenEvent,
)
from vashista.engine.model_config import load_model_config
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.features import COUNTS, KNOTS
from vashista.engine.predict.prediction import Measured
from vashista.engine.predict.queue import Entry, QueueMirror
from vashista.server.forecaster import FIRST_WAIT_S, ROUGH_STEPS, WAIT_STEPS, Forecaster
from vashista.server.foresight import Foresight
from vashista.server.metrics import Metrics
from vashista.server.prediction_file import SavedPredictions
from vashista.server.prices import Prices

MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"
STEP_S = 0.02
NOW_S = 1000.0
RULES = SchedulerRules(page_size=64, num_pages=1000, max_running_requests=2, max_batch_tokens=512, prefix_caching=False)


def engine_of(num_left: int) -> SimpleNamespace:
    """Two requests run that have so many tokens to go, and leave no place for a third."""
    queue = QueueMirror()
    for name in ("a", "b"):
        sampling = SamplingParams(seed=0, max_tokens=1000, ignore_eos=True)
        queue.submit(Entry(Submit(name, [7] * 10, sampling, NOW_S - 50), NOW_S - 50))
    engine = SimpleNamespace(
        ready=SimpleNamespace(rules=RULES, support_profile=None, dense_below=256, num_pages=1000, page_size=64),
        coefficients=StepCoefficients(base_s=STEP_S, per_token_s=[0.0] * len(KNOTS), counts_s=[0.0] * len(COUNTS)),
        queue=queue,
        delivery_s=0.0,
        stats=EngineStats(),
        step_times=None,
    )
    engine.ready.coefficients = engine.coefficients
    advance(engine, 1000 - num_left, NOW_S)
    return engine


def advance(engine: SimpleNamespace, num_steps: int, now_s: float) -> None:
    events = [TokenEvent(name, token_ids=[1] * num_steps) for name in ("a", "b")]
    stats = EngineStats(num_pages_used=20, step_ended_s=now_s)
    engine.queue.take(StepReport(events, stats, {"a": 0.01, "b": 0.01}))


def forecaster_of(engine: SimpleNamespace) -> Forecaster:
    config = load_model_config(str(MODEL))
    return Forecaster(engine, config, Metrics(), Prices(), model_dir=str(MODEL))  # type: ignore[arg-type]


def total_s(forecaster: Forecaster, now_s: float) -> float:
    """Upper end of what a request of 4 tokens is told."""
    foresight = forecaster.predict([Submit("own", [7] * 9, SamplingParams(seed=0, max_tokens=4), now_s)], now_s)
    assert foresight is not None
    return foresight.prediction.total_s.upper


@pytest.mark.parametrize("num_left", [60, 150, 400])
@pytest.mark.parametrize("deadline_s", [0.5, 1.5])
def test_after_the_time_of_a_retry_after_the_deadline_holds_and_not_long_before(
    num_left: int, deadline_s: float
) -> None:
    engine = engine_of(num_left)
    forecaster = forecaster_of(engine)
    submit = Submit("own", [7] * 9, SamplingParams(seed=0, max_tokens=4), NOW_S)
    foresight = forecaster.predict([submit], NOW_S)
    assert foresight is not None
    assert foresight.prediction.total_s.upper > deadline_s
    wait_s = forecaster.wait_s(foresight, deadline_s, NOW_S)

    assert total_s(forecaster_of(later(num_left, wait_s)), NOW_S + wait_s) <= deadline_s
    widest_s = max(FIRST_WAIT_S, wait_s) / 2 ** (WAIT_STEPS - 1) + STEP_S
    earlier_s = max(0.0, wait_s - widest_s)
    assert total_s(forecaster_of(later(num_left, earlier_s)), NOW_S + earlier_s) > deadline_s


def later(num_left: int, passed_s: float) -> SimpleNamespace:
    """The engine after it has run for so long."""
    engine = engine_of(num_left)
    num_steps = int(passed_s / STEP_S + 1e-9)
    advance(engine, num_steps, NOW_S + num_steps * STEP_S)
    return engine


def idle_engine(num_steps: int) -> SimpleNamespace:
    """Nobody is there; so many steps have taught what steps take."""
    engine = engine_of(1000)
    engine.queue = QueueMirror()
    learn_steps(engine, num_steps)
    return engine


def learn_steps(engine: SimpleNamespace, num_steps: int) -> None:
    engine.coefficients = msgspec.structs.replace(engine.coefficients, num_steps=num_steps)


def ask(forecaster: Forecaster) -> Foresight:
    foresight = forecaster.predict([Submit("own", [7] * 9, SamplingParams(seed=0, max_tokens=4), NOW_S)], NOW_S)
    assert foresight is not None
    return foresight


def end(forecaster: Forecaster, foresight: Foresight, factor: float) -> None:
    """It took so many times as long as was foreseen."""
    forecaster.begin(foresight, NOW_S)
    forecast = foresight.forecast
    measured = Measured(
        queue_s=0.0,
        ttft_s=factor * forecast.ttft_s,
        time_per_token_s=factor * forecast.time_per_token_s(4),
        total_s=factor * forecast.total_s(4),
        busy_s=factor * forecast.busy_s(4),
        num_tokens=4,
    )
    forecaster.settle(foresight, measured, [4], [FinishReason.LENGTH], None)


def test_what_the_first_steps_foretold_wrongly_is_forgotten_once_more_have_taught() -> None:
    engine = idle_engine(0)
    forecaster = forecaster_of(engine)
    for _ in range(30):
        end(forecaster, ask(forecaster), 3.0)
    rough = ask(forecaster)
    assert rough.prediction.num_outcomes == 30
    assert rough.prediction.total_s.median > 2 * rough.forecast.total_s(4)
    learn_steps(engine, ROUGH_STEPS)
    end(forecaster, ask(forecaster), 1.0)
    found = ask(forecaster)
    assert found.prediction.num_outcomes == 1
    assert found.prediction.total_s.median == pytest.approx(found.forecast.total_s(4))
    end(forecaster, rough, 3.0)
    assert ask(forecaster).prediction.num_outcomes == 1, "what was foretold before teaches nothing any more"


def test_what_an_earlier_server_learnt_is_kept_unless_it_was_rough() -> None:
    for num_steps in (ROUGH_STEPS - 1, ROUGH_STEPS):
        engine = idle_engine(num_steps)
        saved = SavedPredictions(
            step_times=SavedStepTimes(
                model_digest="d", device_name="CPU", dtype="float32", coefficients=engine.coefficients
            ),
            errors={name: {"alone": [0.05, 0.05, *[0.1] * 40]} for name in ("ttft_s", "total_s")},
        )
        config = load_model_config(str(MODEL))
        forecaster = Forecaster(  # type: ignore[arg-type]
            engine, config, Metrics(), Prices(), model_dir=str(MODEL), model_digest="d"
        )
        forecaster.restore(saved)
        learn_steps(engine, ROUGH_STEPS)
        end(forecaster, ask(forecaster), 1.0)
        assert ask(forecaster).prediction.num_outcomes == (1 if num_steps < ROUGH_STEPS else 41)
