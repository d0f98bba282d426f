"""Step times: fitted exactly where they lie on a plane, never negative, and sparse ones where the module is sparse."""

from __future__ import annotations

from pathlib import Path

import pytest

from vashista.engine.calibrate import CalibrationPlan, calibrate
from vashista.engine.config import EngineConfig
from vashista.engine.model_config import load_model_config
from vashista.engine.sample_text import SampleTokens, read_sample_text
from vashista.engine.step_times import fit_non_negative, fit_times
from vashista.engine.support_profile import SparseStepTime, StepTime
from vashista.engine.tokenizer import Tokenizer
from vashista.kernels.cpu import library as cpu_library

MODEL = Path(__file__).parents[2] / "deploy" / "models" / "reference-26m"


def test_steps_on_a_plane_are_fitted_exactly() -> None:
    dense = [StepTime(context, 0.002 + 3e-6 * context) for context in (64, 1000, 5000)]
    pairs = [(1000, 256), (5000, 256), (5000, 1024)]
    sparse = [SparseStepTime(c, b, 0.002 + 1e-7 * c + 2e-6 * b) for c, b in pairs]
    times = fit_times(dense, sparse, "float32", "")
    assert times.overhead_s == pytest.approx(0.002)
    assert times.dense_s_per_token == pytest.approx(3e-6)
    assert times.sparse_s_per_context_token == pytest.approx(1e-7)
    assert times.sparse_s_per_kept_token == pytest.approx(2e-6)
    assert times.dense_step_s(2000) == pytest.approx(0.008)
    assert times.sparse_step_s(2000, 500) == pytest.approx(0.0032)
    assert times.sparse_step_s(100, 500) == pytest.approx(0.002 + 1e-5 + 2e-4)  # no more than there are


def test_without_sparse_steps_their_times_are_unknown() -> None:
    times = fit_times([StepTime(64, 0.001)], [], "float32", "")
    assert times.sparse_s_per_context_token is None
    assert times.sparse_step_s(100, 50) is None


def test_no_coefficient_is_negative_and_no_other_set_of_columns_fits_better() -> None:
    assert fit_non_negative([[1.0, 64.0], [1.0, 5000.0]], [0.003, 0.001])[1] == 0.0
    overhead, slope = fit_non_negative([[1.0, 100.0], [1.0, 1000.0]], [0.001, 0.1])
    assert overhead == 0.0
    assert 1e-5 < slope < 1e-4
    assert fit_non_negative([[1.0, 100.0]], [0.001])[0] == pytest.approx(0.001)


def test_sparse_steps_are_timed_where_the_module_is_sparse_and_the_context_long_enough() -> None:
    if cpu_library.load() is None:
        pytest.skip(f"no sparse attention here: {cpu_library.status()}")
    model_config = load_model_config(MODEL)
    tokenizer = Tokenizer.load(MODEL, model_config.vocab_size)
    passages = SampleTokens(read_sample_text(None)[:20_000], tokenizer).passages(1, 600)
    config = EngineConfig(
        model_dir=str(MODEL), device="cpu", attention="auto", max_context=600, max_running_requests=1, num_threads=1
    )
    profile = calibrate(config, model_config, CalibrationPlan([300, 600], 1), passages)
    [times] = profile.devices.values()
    assert [(step.context, step.token_budget) for step in times.sparse_steps] == [(600, 256)]
    assert times.sparse_step_s(600, 256) is not None
