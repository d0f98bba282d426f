"""Predictions over HTTP: in every reply and receipt, beside what came of them."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from pathlib import Path

import httpx
import openai
import pytest

from vashista.server.cli import run
from vashista.server.ledger.reader import reading, rows
from vashista.server.ledger.receipt import Receipt

MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"
STEP_S = 0.02
"""Of the scripted engine, which says the same of its steps."""
PICKUP_S = 3e-4
"""Until the engine takes a request in, where nothing was seen of that."""


def receipts(server) -> list[Receipt]:
    with reading(server.log_path.parent / "state" / "ledger.db") as connection:
        return [receipt for *_, receipt in rows(connection)]


@pytest.fixture(scope="module")
def steady(start_server):
    """A server whose steps all take the same."""
    return start_server(environ={"SCRIPTED_STEP_S": str(STEP_S)}).wait_ready()


def test_before_anything_ran_what_the_engine_says_of_its_steps_is_predicted(start_server):
    """No outcome has corrected it, and nobody else is expected: it does not depend on how fast this machine is."""
    fresh = start_server(environ={"SCRIPTED_STEP_S": str(STEP_S)}).wait_ready()
    asked = predict(fresh, model="reference-26m", prompt="hello world", max_tokens=11).json()["prediction"]
    assert asked["time_per_token_s"]["median"] == pytest.approx(STEP_S, rel=1e-3)
    assert asked["ttft_s"]["median"] >= PICKUP_S + STEP_S  # what the request has waited so far comes on top
    after_first_s = asked["total_s"]["median"] - asked["ttft_s"]["median"]
    assert after_first_s == pytest.approx(10 * STEP_S, rel=1e-3)
    told = fresh.complete(prompt="hello world", max_tokens=11).json()["usage"]["vashista"]["prediction"]
    assert told["time_per_token_s"]["median"] == pytest.approx(asked["time_per_token_s"]["median"], rel=1e-6)


def test_a_reply_carries_its_prediction_and_what_came_of_it(steady):
    usage = steady.complete(max_tokens=11).json()["usage"]["vashista"]
    prediction, outcome = usage["prediction"], usage["outcome"]
    assert prediction["num_tokens"] == outcome["num_tokens"] == 11
    assert prediction["coverage"] == 0.9
    for quantity in ("ttft_s", "time_per_token_s", "total_s", "busy_s", "energy_j"):
        assert_is_interval(prediction[quantity])
    assert prediction["support"]["dense_share"] == 1.0
    assert prediction["queue"]["num_running"] == 0
    assert outcome["total_s"] >= 10 * STEP_S  # the engine sleeps as long between its tokens
    assert outcome["total_s"] == pytest.approx(outcome["ttft_s"] + 10 * outcome["time_per_token_s"], rel=1e-3)


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


def assert_is_interval(interval) -> None:
    assert 0 < interval["lower"] < interval["median"] < interval["upper"]


def predict(server, **body) -> httpx.Response:
    return httpx.post(server.url + "/v1/predict", json=body, timeout=60)


def test_predict_answers_for_a_completion_without_running_it(steady):
    num_before = len(steady.engine_messages("Submit"))
    reply = predict(steady, model="reference-26m", prompt="hello world", max_tokens=20)
    assert reply.status_code == 200
    body = reply.json()
    assert body["admission"] == {"would_admit": True, "error": None, "retry_after_s": None}
    assert body["prediction"]["num_tokens"] == 20
    assert_is_interval(body["prediction"]["time_per_token_s"])
    assert len(steady.engine_messages("Submit")) == num_before


def test_predict_takes_chats_and_bare_sizes(steady):
    messages = [{"role": "user", "content": "hello world"}]
    chat = predict(steady, model="reference-26m", messages=messages, max_completion_tokens=8).json()["prediction"]
    assert chat["num_tokens"] == 8
    size = predict(
        steady, prompt_tokens=3000, max_tokens=100, n=2, vashista={"attention": {"token_budget": 512}}
    ).json()["prediction"]
    assert size["num_prompt_tokens"] == 3000
    # 46 full pages are shared by the two choices, 2 more each.
    assert size["kv_pages"] == 46 + 2 * (-(-3100 // 64) - 46)
    assert size["support"]["tokens_attended"] == pytest.approx(512, rel=0.01)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"prompt_tokens": 0, "max_tokens": 1}, "invalid_request"),
        ({"prompt_tokens": 5}, "invalid_request"),
        ({"prompt_tokens": 5, "max_tokens": 1, "temperature": 1}, "unknown_field"),
        ({"prompt_tokens": 16000, "max_tokens": 1000}, "context_length_exceeded"),
        ({"prompt_tokens": 5, "max_tokens": 1, "model": "other"}, "model_not_found"),
        ({"model": "reference-26m", "prompt": "x", "max_tokens": 99999}, "context_length_exceeded"),
        ({}, "invalid_request"),
    ],
)
def test_predict_names_what_is_wrong_with_a_body(steady, body, code):
    reply = predict(steady, **body)
    assert 400 <= reply.status_code < 500
    assert reply.json()["error"]["code"] == code


def test_predict_says_that_the_queue_is_full_and_when_to_come_back(start_server, script):
    server = start_server(max_running_requests=1, max_queued_requests=1).wait_ready()

    def hang() -> None:
        with contextlib.suppress(httpx.HTTPError):
            server.complete(seed=script.HANG)

    threading.Thread(target=hang, daemon=True).start()
    server.wait_for(lambda: server.engine_messages("Submit"))
    verdict = predict(server, prompt_tokens=10, max_tokens=4).json()["admission"]
    server.process.kill()
    assert verdict["would_admit"] is False
    assert verdict["error"]["code"] == "queue_full"
    assert verdict["retry_after_s"] > 0


def test_openai_clients_read_the_prediction(steady):
    client = openai.OpenAI(base_url=steady.url + "/v1", api_key="none")
    reply = client.completions.create(model="reference-26m", prompt="hello", max_tokens=3)
    assert reply.usage is not None
    assert reply.usage.model_extra["vashista"]["prediction"]["num_tokens"] == 3
    raw = client.post("/predict", body={"prompt_tokens": 7, "max_tokens": 3}, cast_to=httpx.Response)
    assert raw.json()["prediction"]["num_prompt_tokens"] == 7


def test_what_was_learnt_outlives_a_restart_and_a_broken_file_is_no_obstacle(start_server, tmp_path):
    state = tmp_path / "state"
    path = state / "predictions.json"
    server = start_server(state_dir=str(state)).wait_ready()
    for _ in range(3):
        assert server.complete(max_tokens=3).status_code == 200
    assert server.end() == 0
    saved = json.loads(path.read_text())
    assert sum(len(errors) - 2 for errors in saved["errors"]["total_s"].values()) == 3
    again = start_server(state_dir=str(state)).wait_ready()
    assert again.complete(max_tokens=3).json()["usage"]["vashista"]["prediction"]["num_outcomes"] == 3
    assert again.end() == 0
    path.write_text('{"version": 1, "step_times": 7')
    third = start_server(state_dir=str(state)).wait_ready()
    assert third.complete(max_tokens=3).json()["usage"]["vashista"]["prediction"]["num_outcomes"] == 0
    assert "predictions start anew" in third.log()


def test_the_command_asks_a_server(steady, capsys):
    arguments = ["predict", "--url", steady.url, "--prompt-tokens", "3000", "--max-tokens", "50"]
    assert run([*arguments, "--token-budget", "512", "--json"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply["admission"]["would_admit"] is True
    assert reply["prediction"]["support"]["tokens_attended"] == pytest.approx(512, rel=0.01)
    assert run(["predict", "--url", steady.url, "--prompt", "hello", "--max-tokens", "5"]) == 0
    text = capsys.readouterr().out
    assert "total for 5 tokens" in text
    assert "would let it in now" in text


def test_the_command_names_a_refused_request(steady, capsys):
    assert run(["predict", "--url", steady.url, "--prompt-tokens", "99999", "--max-tokens", "5"]) == 1
    text = capsys.readouterr().err
    assert "error[context_length_exceeded]" in text
    assert "the context of this model is 16384" in text
    assert "remedy: Shorten the prompt" in text


def test_the_command_asks_for_a_key_where_the_server_does(start_server, tmp_path, capsys):
    server = start_server(state_dir=str(tmp_path / "state")).wait_ready()
    assert run(["keys", "create", "alice", "--state-dir", str(tmp_path / "state")]) == 0
    server.wait_for(lambda: server.complete().status_code == 401)
    capsys.readouterr()
    for prompt in (["--prompt-tokens", "9"], ["--prompt", "hello"]):
        assert run(["predict", "--url", server.url, *prompt]) == 1
        text = capsys.readouterr().err
        assert "error[invalid_api_key]" in text
        assert "--api-key" in text


def test_the_command_needs_no_server(tmp_path, capsys):
    offline = ["predict", "--model", str(MODEL), "--state-dir", str(tmp_path), "--max-tokens", "40"]
    assert run([*offline, "--prompt-tokens", "4000", "--json"]) == 0
    dense = json.loads(capsys.readouterr().out)["prediction"]
    assert run([*offline, "--prompt-tokens", "4000", "--token-budget", "256", "--json"]) == 0
    sparse = json.loads(capsys.readouterr().out)["prediction"]
    assert sparse["time_per_token_s"]["median"] < dense["time_per_token_s"]["median"]
    assert sparse["support"]["dropped_mass"] > dense["support"]["dropped_mass"] == 0.0
    assert run([*offline, "--prompt-tokens", "32740"]) == 2
    assert "the context of this model is 32768" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(MODEL, bare, ignore=shutil.ignore_patterns("support_profile.json"))
    assert run(["predict", "--model", str(bare), "--state-dir", str(tmp_path), "--prompt-tokens", "9"]) == 2
    assert "Nothing is known of step times" in capsys.readouterr().err
