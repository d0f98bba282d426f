"""Predictions over HTTP: in every reply and receipt, beside what came of them."""

from __future__ import annotations

import json

import pytest

from vashista.server.ledger.reader import reading, rows
from vashista.server.ledger.receipt import Receipt

STEP_S = 0.02
"""Of the scripted engine, which says the same of its steps."""


def receipts(server) -> list[Receipt]:
    with reading(server.log_path.parent / "state" / "ledger.db") as connection:
        return [receipt for *_, receipt in rows(connection)]


@pytest.fixture(scope="module")
def steady(start_server):
    """A server whose steps all take the same."""
    return start_server(environ={"SCRIPTED_STEP_S": str(STEP_S)}).wait_ready()


def test_a_reply_carries_its_prediction_and_what_came_of_it(steady):
    usage = steady.complete(max_tokens=11).json()["usage"]["vashista"]
    prediction, outcome = usage["prediction"], usage["outcome"]
    assert prediction["num_tokens"] == outcome["num_tokens"] == 11
    assert prediction["coverage"] == 0.9
    assert prediction["time_per_token_s"]["median"] == pytest.approx(STEP_S, rel=0.05)
    assert prediction["total_s"]["median"] == pytest.approx(11 * STEP_S, rel=0.2)
    for quantity in ("ttft_s", "time_per_token_s", "total_s", "busy_s", "energy_j"):
        interval = prediction[quantity]
        assert 0 < interval["lower"] < interval["median"] < interval["upper"]
    assert prediction["support"]["dense_share"] == 1.0
    assert prediction["queue"]["num_running"] == 0
    assert outcome["time_per_token_s"] == pytest.approx(STEP_S, rel=0.5)
    assert outcome["ttft_s"] < outcome["total_s"]


def test_the_receipt_has_the_same_prediction(steady):
    prediction = steady.complete(max_tokens=3).json()["usage"]["vashista"]["prediction"]
    kept = receipts(steady)[-1].prediction
    assert kept is not None
    assert kept["total_s"]["median"] == pytest.approx(prediction["total_s"]["median"], rel=1e-5)
    assert kept["queue"] == prediction["queue"]


def test_a_stream_says_it_with_its_usage(steady):
    text = steady.complete(max_tokens=4, stream=True, stream_options={"include_usage": True}).text
    last = json.loads(text.strip().split("\n\n")[-2].removeprefix("data: "))
    assert {"prediction", "outcome"} <= set(last["usage"]["vashista"])


def test_one_token_has_no_time_per_token(steady):
    usage = steady.complete(max_tokens=1).json()["usage"]["vashista"]
    assert usage["prediction"]["time_per_token_s"] is None
    assert usage["outcome"]["time_per_token_s"] is None


def test_metrics_say_how_predictions_hold(steady):
    steady.complete(max_tokens=4)
    assert steady.metric('vashista_prediction_error_ratio_count{quantity="ttft_s"}') >= 1
    assert 0 <= steady.metric('vashista_prediction_coverage_ratio{quantity="total_s"}') <= 1
    assert steady.metric("vashista_predictions_failed_total") == 0
