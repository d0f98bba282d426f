"""What decode steps take on this device, dense and sparse, at each context: measured, and fitted to a few numbers.

`engine/calibrate.py` calls `measure_times` after the last passage; the result goes into the support profile, for the
predictor.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from vashista.engine.passage_run import PassageRun
from vashista.engine.support_curves import Floats
from vashista.engine.support_profile import DeviceTimes, SparseStepTime, StepTime

TOKEN_BUDGETS = (256, 1024, 4096)
"""Sparse steps are timed with these, at contexts of at least twice as many tokens."""


def measure_times(run: PassageRun, token_ids: list[int], contexts: Sequence[int]) -> DeviceTimes:
    """Time steps at these contexts, the passage being read; sparse ones too where the attention module can."""
    budgets = TOKEN_BUDGETS if run.is_sparse else ()
    sparse_cases = [(context, budget) for context in contexts for budget in budgets if context >= 2 * budget]
    times_s = run.time_steps(token_ids, [*((context, None) for context in contexts), *sparse_cases])
    dense = [StepTime(context, step_s) for context, step_s in zip(contexts, times_s, strict=False)]
    sparse = [
        SparseStepTime(context, budget, step_s)
        for (context, budget), step_s in zip(sparse_cases, times_s[len(contexts) :], strict=True)
    ]
    return fit_times(
        dense,
        sparse,
        dtype=str(run.runner.dtype).removeprefix("torch."),
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def fit_times(dense: list[StepTime], sparse: list[SparseStepTime], dtype: str, measured_at: str) -> DeviceTimes:
    """Fit step = overhead + dense * context, or overhead + scoring * context + attending * budget, all at once."""
    rows = [[1.0, step.context, 0.0, 0.0] for step in dense]
    rows += [[1.0, 0.0, step.context, step.token_budget] for step in sparse]
    times_s = [step.step_s for step in dense] + [step.step_s for step in sparse]
    overhead_s, dense_s, scoring_s, attending_s = fit_non_negative(rows, times_s)
    return DeviceTimes(
        dtype=dtype,
        measured_at=measured_at,
        overhead_s=overhead_s,
        dense_s_per_token=dense_s,
        dense_steps=dense,
        sparse_s_per_context_token=scoring_s if sparse else None,
        sparse_s_per_kept_token=attending_s if sparse else None,
        sparse_steps=sparse,
    )


def fit_non_negative(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Coefficients >= 0 of the columns with the least sum of squared relative errors; 0 where noise would give less.

    Tries every set of columns: there are a few only.
    """
    y = np.asarray(values, dtype=np.float64)
    table: Floats = np.asarray(rows, dtype=np.float64) / y[:, None]
    best, least = np.zeros(table.shape[1]), float(len(y))
    for size in range(1, table.shape[1] + 1):
        for columns in combinations(range(table.shape[1]), size):
            part = np.linalg.lstsq(table[:, columns], np.ones(len(y)), rcond=None)[0]
            error = float(((table[:, columns] @ part - 1.0) ** 2).sum())
            if (part >= 0.0).all() and error < least - 1e-12:
                best, least = np.zeros(table.shape[1]), error
                best[list(columns)] = part
    result: list[float] = best.tolist()
    return result
