"""What predictions have learnt, on disk: of this version it comes back as it was, of another it is learnt anew."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from vashista.engine.config import SavedStepTimes
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.features import COUNTS, KNOTS
from vashista.server.prediction_file import FILE_NAME, VERSION, PredictionFile, SavedPredictions

SAVED = SavedPredictions(
    step_times=SavedStepTimes(
        model_digest="d",
        device_name="CPU",
        dtype="float32",
        coefficients=StepCoefficients(base_s=1e-3, per_token_s=[1e-5] * len(KNOTS), counts_s=[1e-6] * len(COUNTS)),
    ),
    errors={"total_s": {"idle dense": [0.05, 0.05, 0.1, -0.2]}},
    pickup_s=3e-4,
)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    PredictionFile(tmp_path).save(SAVED)
    assert PredictionFile(tmp_path).load() == SAVED


def test_the_state_of_an_older_version_is_learnt_anew_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    PredictionFile(tmp_path).save(SAVED)
    path = tmp_path / FILE_NAME
    old = json.loads(path.read_text())
    old["version"] = 1
    old["step_times"]["coefficients"]["counts_s"].pop()  # version 1 had one count less
    path.write_text(json.dumps(old))
    with caplog.at_level(logging.WARNING):
        assert PredictionFile(tmp_path).load() is None
    assert f"it is of version 1, not {VERSION}" in caplog.text
    PredictionFile(tmp_path).save(SAVED)
    assert PredictionFile(tmp_path).load() == SAVED


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": "x"}', "\x00"])
def test_a_file_that_is_none_is_no_obstacle(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert PredictionFile(tmp_path).load() is None
    assert "predictions start anew" in caplog.text


NO_TIME = [
    {"base_s": value, "per_token_s": [value] * len(KNOTS), "counts_s": [value] * len(COUNTS)} for value in (0, 1e-300)
]
"""An engine that began with them divided by zero in its first step, was started anew with them, and so on."""


@pytest.mark.parametrize(
    ("coefficients", "words"),
    [
        *(({"base_s": value}, "predictions start anew") for value in (1e300, 3601.0, -1.0)),
        *((coefficients, "a step takes no time") for coefficients in NO_TIME),
    ],
)
def test_seconds_that_no_step_takes_are_not_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, coefficients: dict[str, object], words: str
) -> None:
    PredictionFile(tmp_path).save(SAVED)
    path = tmp_path / FILE_NAME
    edited = json.loads(path.read_text())
    edited["step_times"]["coefficients"] |= coefficients
    path.write_text(json.dumps(edited))
    with caplog.at_level(logging.WARNING):
        assert PredictionFile(tmp_path).load() is None
    assert words in caplog.text
