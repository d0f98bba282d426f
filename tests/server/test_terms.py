"""Deadlines and limits of cost: kept, refused with what is possible, or met by attending to fewer tokens."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import httpx
import msgspec
import openai
import pytest

from vashista.engine.errors import CostLimitError, DeadlineError, DeadlineImpossibleError, PredictionMissingError
from vashista.engine.messages import AttentionMode, SamplingParams, Submit
from vashista.engine.predict.prediction import ExpectedSupport, Interval, Prediction, QueueAhead
from vashista.server.ledger.reader import reading, rows
from vashista.server.schemas.fields import AttentionOptions, VashistaOptions
from vashista.server.settings import Settings
from vashista.server.terms import Run, Terms

STEP_S = 0.02


@pytest.fixture(scope="module")
def steady(start_server):
    """A server whose steps all take the same, one request at a time."""
    return start_server(environ={"SCRIPTED_STEP_S": str(STEP_S)}, max_running_requests=1).wait_ready()


def within(server, deadline_s, **fields):
    options = {"deadline_s": deadline_s, **fields.pop("options", {})}
    return server.complete(vashista=options, **fields)


def test_a_deadline_that_holds_changes_nothing_and_is_in_the_receipt(steady):
    with openai.OpenAI(base_url=steady.url + "/v1", api_key="none", max_retries=0) as client:
        reply = client.completions.create(
            model="reference-26m",
            prompt="hello",
            max_tokens=4,
            extra_body={"vashista": {"deadline_s": 30, "stop_at_deadline": True}},
        )
    assert reply.choices[0].finish_reason == "length"
    assert steady.metric('vashista_deadlines_total{kept="yes"}') >= 1
    (submit,) = [message for message in steady.engine_messages("Submit") if message.get("stop_at_s")][-1:]
    assert submit["due_s"] == submit["stop_at_s"] == pytest.approx(submit["arrival_s"] + 30)
    with reading(steady.log_path.parent / "state" / "ledger.db") as connection:
        parameters = [receipt.parameters for *_, receipt in rows(connection)][-1]
    assert (parameters["deadline_s"], parameters["stop_at_deadline"]) == (30, True)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
def test_a_header_says_the_same_as_the_field(steady, path):
    body = {"model": "reference-26m", "max_tokens": 500}
    text = {"messages": [{"role": "user", "content": "hello"}]} if path != "/v1/completions" else {"prompt": "hello"}
    reply = httpx.post(steady.url + path, json=body | text, headers={"X-Vashista-Deadline-S": "0.5"}, timeout=60)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "deadline_impossible")
    assert reply.json()["error"]["message"].startswith("vashista.deadline_s is 0.5 s")


def test_headers_and_the_fields_of_the_body_go_together(steady):
    body = {"model": "reference-26m", "prompt": "hello", "max_tokens": 4, "vashista": {"deadline_s": 30}}
    headers = {"x-vashista-stop-at-deadline": "true"}
    assert httpx.post(steady.url + "/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
    (submit,) = [message for message in steady.engine_messages("Submit") if message.get("stop_at_s")][-1:]
    assert submit["stop_at_s"] == pytest.approx(submit["arrival_s"] + 30)
    size = {"prompt_tokens": 9, "max_tokens": 500}
    reply = httpx.post(steady.url + "/v1/predict", json=size, headers={"x-vashista-deadline-s": "0.5"}, timeout=60)
    assert reply.json()["error"]["code"] == "deadline_impossible"


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ([("x-vashista-deadline", "3")], "Unknown header 'x-vashista-deadline'; there are x-vashista-deadline-s,"),
        ([("x-vashista-deadline-s", "soon")], "must be a number, or true or false"),
        ([("x-vashista-deadline-s", "")], "must be a number, or true or false"),
        ([("x-vashista-deadline-s", "[" * 5000)], "must be a number, or true or false"),
        ([("x-vashista-deadline-s", "true")], "valid number"),
        ([("x-vashista-deadline-s", "-1")], "greater than 0"),
        ([("x-vashista-adapt", "2"), ("x-vashista-deadline-s", "9")], "valid boolean"),
        ([("x-vashista-max-cost", "1")], "stands both in the header x-vashista-max-cost and in vashista.max_cost"),
        ([("x-vashista-adapt", "true"), ("x-vashista-adapt", "true")], "x-vashista-adapt is there twice"),
    ],
)
def test_a_header_that_says_nothing_or_the_same_again_is_an_error(steady, headers, words):
    body = {"model": "reference-26m", "prompt": "hello", "max_tokens": 4}
    if "max-cost" in headers[0][0]:
        body["vashista"] = {"max_cost": 2}
    reply = httpx.post(steady.url + "/v1/completions", json=body, headers=headers, timeout=60)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
def test_a_deadline_that_nobody_could_keep_is_refused_with_what_is_possible(steady, path):
    body = {"model": "reference-26m", "max_tokens": 500, "vashista": {"deadline_s": 0.5}}
    text = {"messages": [{"role": "user", "content": "hello"}]} if path != "/v1/completions" else {"prompt": "hello"}
    reply = httpx.post(steady.url + path, json=body | text, timeout=60)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "deadline_impossible")
    assert "retry-after" not in reply.headers
    assert error["prediction"]["total_s"]["median"] == pytest.approx(500 * STEP_S, rel=0.5)
    assert error["param"] == "vashista.deadline_s"


def test_under_load_retry_after_is_the_time_after_which_the_deadline_holds(start_server):
    server = start_server(environ={"SCRIPTED_STEP_S": str(STEP_S)}, max_running_requests=1).wait_ready()
    for _ in range(25):  # intervals of a server that has seen some requests
        server.complete(max_tokens=4)
    others = [threading.Thread(target=server.complete, kwargs={"max_tokens": 150, "ignore_eos": True}) for _ in "ab"]
    for thread in others:
        thread.start()
    server.wait_for(
        lambda: len([m for m in server.engine_messages("Submit") if m["sampling"]["max_tokens"] == 150]) == 2
    )
    reply = within(server, 1.5, max_tokens=4)
    num_before = server.metric("vashista_generated_tokens_total")
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (429, "deadline_not_met"), reply.text
    assert error["prediction"]["queue"]["num_running"] + error["prediction"]["queue"]["num_waiting"] == 2
    preview = httpx.post(
        server.url + "/v1/predict", json={"prompt_tokens": 9, "max_tokens": 4, "vashista": {"deadline_s": 1.5}}
    ).json()
    assert preview["admission"]["error"]["code"] == "deadline_not_met"
    assert preview["admission"]["retry_after_s"] > 0
    # Seconds of the engine, which takes as long as the machine lets it: as many steps as they have by its own word.
    num_steps = int(reply.headers["retry-after"]) / STEP_S
    server.wait_for(
        lambda: (
            server.metric("vashista_generated_tokens_total") >= num_before + 2 * num_steps
            or server.metric("vashista_requests_running") == 0
        )
    )
    assert within(server, 1.5, max_tokens=4).status_code == 200
    for thread in others:
        thread.join()


def test_a_limit_of_cost_needs_prices_and_is_kept(steady, start_server):
    reply = steady.complete(vashista={"max_cost": 1})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "vashista.max_cost")
    assert "no prices" in reply.json()["error"]["message"]
    priced = start_server(price_per_request=0.5, currency="CHF").wait_ready()
    assert priced.complete(vashista={"max_cost": 1}).status_code == 200
    refused = priced.complete(vashista={"max_cost": 0.4}).json()["error"]
    assert refused["code"] == "max_cost_exceeded"
    assert "0.4 CHF" in refused["message"]
    assert refused["prediction"]["money"]["upper"] >= 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"deadline_s": 0}, "greater than 0"),
        ({"deadline_s": "soon"}, "valid number"),
        ({"max_cost": -1}, "greater than or equal to 0"),
        ({"stop_at_deadline": True}, "needs deadline_s"),
        ({"adapt": True}, "needs deadline_s or max_cost"),
        ({"deadline": 3}, "Unknown field"),
    ],
)
def test_terms_that_mean_nothing_are_errors(steady, options, words):
    reply = steady.complete(vashista=options)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


def test_a_reply_that_cannot_be_complete_any_more_ends_with_the_reason_deadline(start_server):
    server = start_server("real", num_threads=1, kv_cache_bytes=64 << 20).wait_ready()
    for _ in range(3):
        server.complete(max_tokens=8)
    engine = server.engine_pid()
    body = {"max_tokens": 150, "ignore_eos": True}
    asked = {"model": "reference-26m", "prompt": "hello world", **body}
    prediction = httpx.post(server.url + "/v1/predict", json=asked, timeout=60).json()["prediction"]
    deadline_s = 1.0 + 2 * prediction["total_s"]["upper"]  # as this machine is now: it is to be admitted
    body["vashista"] = {"deadline_s": deadline_s, "stop_at_deadline": True}
    replies: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: replies.append(server.complete(**body)))
    thread.start()
    server.wait_for(lambda: server.metric("vashista_requests_running") == 1)
    os.kill(engine, signal.SIGSTOP)
    time.sleep(deadline_s + 0.5)
    os.kill(engine, signal.SIGCONT)
    thread.join(60)
    choice = replies[0].json()["choices"][0]
    assert choice["finish_reason"] == "deadline", replies[0].text
    assert 0 < replies[0].json()["usage"]["completion_tokens"] < 150
    assert server.metric('vashista_deadlines_total{kept="no"}') == 1


# --- adapting, against a predictor whose every word is known


class Foreseen:
    """The part of a Foresight that terms look at."""

    def __init__(self, prediction: Prediction) -> None:
        self.prediction = prediction


class Oracle:
    """10 s dense; sparse takes a second for each 100 tokens kept, and drops 1 / budget * 50 of the mass."""

    def __init__(self, *, has_profile: bool = True, alone_s: float = 10.0) -> None:
        self._has_profile = has_profile
        self._alone_s = alone_s
        self.asked: list[AttentionMode] = []

    def predict(self, submits, now_s, *, arrival_s=None):
        mode = submits[0].attention
        self.asked.append(mode)
        total_s = 10.0 if mode.token_budget is None else min(10.0, mode.token_budget / 100)
        dropped = 0.0 if mode.token_budget is None else 50 / mode.token_budget if self._has_profile else None
        return Foreseen(prediction_of(total_s, dropped))

    def alone_s(self, submits, now_s):
        return self._alone_s

    def wait_s(self, submits, deadline_s, now_s):
        return 7.0


def prediction_of(total_s: float, dropped: float | None) -> Prediction:
    interval = Interval(total_s, total_s * 0.9, total_s)
    return Prediction(
        coverage=0.9,
        num_outcomes=50,
        num_prompt_tokens=900,
        num_cached_tokens=0,
        num_tokens=100,
        ttft_s=interval,
        time_per_token_s=interval,
        total_s=interval,
        kv_pages=16,
        busy_s=interval,
        energy_j=interval,
        money=None,
        currency=None,
        support=ExpectedSupport(tokens_visible=1000, tokens_attended=1000, dense_share=1.0, dropped_mass=dropped),
        queue=QueueAhead(num_running=0, num_waiting=0, num_waiting_tokens=0, arrivals_per_s=0.0),
    )


def meet(oracle: Oracle, options: dict[str, object], *, mode: AttentionMode | None = None, **settings: object) -> Run:
    submit = Submit("r", [1] * 900, SamplingParams(seed=0, max_tokens=100), arrival_s=0.0)
    if mode is not None:
        submit = Submit("r", [1] * 900, SamplingParams(seed=0, max_tokens=100), arrival_s=0.0, attention=mode)
    terms = Terms(Settings.model_validate({"model": "x", **settings}), oracle)  # type: ignore[arg-type]
    run = Run([submit], oracle.predict([submit], 0.0))
    return terms.meet(VashistaOptions.model_validate(options), run)


def test_the_largest_budget_that_meets_the_deadline_is_taken_and_told():
    run = meet(Oracle(), {"deadline_s": 6.0, "adapt": True}, max_allowed_dropped_mass=0.5)
    assert run.adapted is not None
    assert run.adapted.token_budget == run.submits[0].attention.token_budget == 562  # 1000 * 3/4 * 3/4
    assert run.adapted.expected_dropped_mass == pytest.approx(50 / 562)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (AttentionMode(), {"mode": "dense"}),
        (AttentionMode(token_budget=900), {"mode": "sparse", "token_budget": 900}),
        (AttentionMode(max_dropped_mass=0.4), {"mode": "sparse", "max_dropped_mass": 0.4}),
    ],
)
def test_what_was_asked_for_is_told_as_requests_say_it(mode: AttentionMode, said: dict[str, object]):
    run = meet(Oracle(), {"deadline_s": 6.0, "adapt": True}, mode=mode, max_allowed_dropped_mass=0.5)
    asked = msgspec.to_builtins(run.adapted)["asked"]
    assert asked == said
    AttentionOptions.model_validate(asked)


def test_no_budget_drops_more_than_is_allowed():
    with pytest.raises(DeadlineImpossibleError, match="up to 10 s even when nobody else"):
        meet(Oracle(), {"deadline_s": 2.0, "adapt": True}, max_allowed_dropped_mass=0.1)
    asked = AttentionMode(max_dropped_mass=0.06)
    own = {"attention": {"max_dropped_mass": 0.06}}
    with pytest.raises(DeadlineImpossibleError):
        meet(Oracle(), own | {"deadline_s": 6.0, "adapt": True}, mode=asked, max_allowed_dropped_mass=0.5)


def test_a_limit_that_was_not_asked_for_does_not_keep_a_request_from_being_adapted():
    server_default = AttentionMode(max_dropped_mass=0.03)
    options = {"attention": {"mode": "sparse"}, "deadline_s": 6.0, "adapt": True}
    run = meet(Oracle(), options, mode=server_default, max_allowed_dropped_mass=0.5)
    assert run.adapted is not None
    assert run.adapted.expected_dropped_mass > 0.03


class Table(Oracle):
    """10 s dense; of each budget what a table says: (total, dropped mass)."""

    def __init__(self, table: dict[int, tuple[float, float]]) -> None:
        super().__init__()
        self._table = table

    def predict(self, submits, now_s, *, arrival_s=None):
        mode = submits[0].attention
        self.asked.append(mode)
        return Foreseen(prediction_of(*self._table.get(mode.token_budget, (10.0, 0.0))))


LADDER = [750, 562, 421, 315, 236, 177, 132, 99, 96]
"""Of 1,000 tokens, down to a least budget of 96."""


def adapted_budget(oracle: Oracle, *, deadline_s: float, allowed: float) -> int | None:
    settings = {"max_allowed_dropped_mass": allowed, "min_token_budget": LADDER[-1]}
    try:
        run = meet(oracle, {"deadline_s": deadline_s, "adapt": True}, **settings)
    except DeadlineImpossibleError:
        return None
    assert run.adapted is not None
    return run.adapted.token_budget


def first_of(table: dict[int, tuple[float, float]], *, deadline_s: float, allowed: float) -> int | None:
    for budget in LADDER:
        total_s, dropped = table[budget]
        if dropped > allowed:
            return None
        if total_s <= deadline_s:
            return budget
    return None


def test_a_budget_is_found_in_few_predictions():
    for deadline_s in (0.1, 0.3, 1.0, 3.0, 6.0, 7.5):
        oracle = Oracle()
        adapted_budget(oracle, deadline_s=deadline_s, allowed=0.9)
        tried = [mode.token_budget for mode in oracle.asked[1:]]
        assert set(tried) <= set(LADDER)
        assert 0 < len(tried) <= len(LADDER).bit_length()


def test_where_totals_fall_and_mass_rises_halving_finds_what_trying_all_finds():
    source, found = random.Random(7), []
    for _ in range(300):
        totals = sorted((source.choice([source.uniform(0.5, 9.0), 3.0]) for _ in LADDER), reverse=True)
        masses = sorted(source.choice([source.random(), 0.2]) for _ in LADDER)
        table = dict(zip(LADDER, zip(totals, masses, strict=True), strict=True))
        terms = {"deadline_s": source.choice([3.0, source.uniform(0.5, 9.0)]), "allowed": source.choice([0.2, 0.9])}
        found.append(adapted_budget(Table(table), **terms))
        assert found[-1] == first_of(table, **terms)
    assert None in found
    assert len(set(found)) > 6


def test_a_budget_that_is_taken_meets_the_terms_whatever_the_others_do():
    source, num_found = random.Random(8), 0
    for _ in range(300):
        table = {budget: (source.uniform(0.5, 9.0), source.random()) for budget in LADDER}
        budget = adapted_budget(Table(table), deadline_s=4.0, allowed=0.5)
        if budget is not None:
            num_found += 1
            assert table[budget][0] <= 4.0
            assert table[budget][1] <= 0.5
    assert num_found > 50


def test_nothing_is_adapted_unasked_nor_without_a_profile_nor_on_a_dense_server():
    for oracle, options, settings in (
        (Oracle(), {"deadline_s": 6.0}, {}),
        (Oracle(has_profile=False), {"deadline_s": 6.0, "adapt": True}, {}),
        (Oracle(), {"deadline_s": 6.0, "adapt": True}, {"attention": "dense"}),
    ):
        with pytest.raises(DeadlineImpossibleError):
            meet(oracle, options, max_allowed_dropped_mass=0.5, **settings)


class Failing(Oracle):
    """Predicts dense requests alone."""

    def predict(self, submits, now_s, *, arrival_s=None):
        found = super().predict(submits, now_s, arrival_s=arrival_s)
        return None if submits[0].attention.is_sparse else found


@pytest.mark.parametrize(
    ("oracle", "deadline_s", "settings", "why"),
    [
        (Oracle(), 0.2, {"max_allowed_dropped_mass": 0.5}, "Adapted to a token budget of 256, which drops 0.2 of "
         "the attention's mass, it would take up to 2.56 s now"),
        (Oracle(), 6.0, {"max_allowed_dropped_mass": 0.03}, "no smaller token budget is expected to drop at most 0.03"),
        (Oracle(has_profile=False), 6.0, {"max_allowed_dropped_mass": 0.5}, "without a support profile nobody knows"),
        (Failing(), 6.0, {"max_allowed_dropped_mass": 0.5}, "this server cannot predict at present"),
        (Oracle(), 6.0, {"attention": "dense"}, "this server runs dense attention alone"),
        (Oracle(), 6.0, {"min_token_budget": 4096}, "the least token budget, 4096, is all that it attends to"),
    ],
)  # fmt: skip
def test_a_refusal_says_why_the_request_was_not_adapted(oracle, deadline_s, settings, why):
    with pytest.raises(DeadlineImpossibleError, match="even when nobody else is served") as caught:
        meet(oracle, {"deadline_s": deadline_s, "adapt": True}, **settings)
    assert why in str(caught.value)
    with pytest.raises(DeadlineImpossibleError) as caught:
        meet(oracle, {"deadline_s": deadline_s}, **settings)
    assert str(caught.value).endswith("even when nobody else is served.")


def test_a_refusal_that_waiting_helps_says_how_long():
    with pytest.raises(DeadlineError) as caught:
        meet(Oracle(alone_s=1.0), {"deadline_s": 6.0})
    assert caught.value.retry_after_s == 7.0
    assert isinstance(caught.value.prediction, Prediction)


def test_terms_without_a_prediction_are_not_ignored():
    submit = Submit("r", [1], SamplingParams(seed=0, max_tokens=1), arrival_s=0.0)
    terms = Terms(Settings.model_validate({"model": "x"}), Oracle())  # type: ignore[arg-type]
    with pytest.raises(PredictionMissingError):
        terms.meet(VashistaOptions(deadline_s=1.0), Run([submit], None))
    assert terms.meet(VashistaOptions(), Run([submit], None)).adapted is None


def test_the_upper_end_of_the_price_counts():
    class Priced(Oracle):
        def predict(self, submits, now_s, *, arrival_s=None):
            found = super().predict(submits, now_s)
            money = Interval(1.0, 0.5, 2.0)
            found.prediction = msgspec.structs.replace(found.prediction, money=money, currency="EUR")
            return found

    assert meet(Priced(), {"max_cost": 2.0}, price_per_request=1.0).adapted is None
    with pytest.raises(CostLimitError, match="may cost up to 2 EUR"):
        meet(Priced(), {"max_cost": 1.5}, price_per_request=1.0)
