"""How requests choose their attention, within the operator's limits, and what is told about it afterwards."""

from __future__ import annotations

import httpx
import openai
import pytest

SPARSE = {"attention": {"mode": "sparse", "token_budget": 512}}


def submitted(server):
    """What the engine was last asked for."""
    return server.engine_messages("Submit")[-1].get("attention", {})


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"mode": "dense"}, {}),
        ({"mode": "sparse"}, {"max_dropped_mass": 0.03}),
        ({"mode": "sparse", "token_budget": 256}, {"token_budget": 256}),
        ({"token_budget": 999}, {"token_budget": 999}),
        ({"max_dropped_mass": 0.05}, {"max_dropped_mass": 0.05}),
        ({"mode": "sparse", "max_dropped_mass": 0.5}, {"max_dropped_mass": 0.5}),
    ],
)
def test_the_engine_gets_the_mode_that_was_asked_for(server, asked, expected):
    body = {} if asked is None else {"vashista": {"attention": asked}}
    assert server.complete(**body).status_code == 200
    assert submitted(server) == expected


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"mode": "dense", "token_budget": 512}, "ask for sparse"),
        ({"token_budget": 512, "max_dropped_mass": 0.1}, "give one of them"),
        ({"token_budget": 255}, "allows 256 and more"),
        ({"max_dropped_mass": 0.51}, "allows up to 0.5"),
        ({"token_budget": 95}, "greater than or equal to 96"),
        ({"max_dropped_mass": 0.0009}, "greater than or equal to 0.001"),
        ({"max_dropped_mass": 1}, "less than 1"),
        ({"mode": "sparse", "tokens": 512}, "Unknown field"),
        ({"mode": "sparse", "token_budget": 512.5}, "integer"),
        ({"mode": "sparse", "token_budget": True}, "integer"),
    ],
)
def test_what_is_not_possible_is_refused_with_what_is(server, asked, text):
    reply = server.complete(vashista={"attention": asked})
    assert reply.status_code == 400
    assert text in reply.json()["error"]["message"]


def test_a_sparse_reply_says_what_was_left_out(client):
    reply = client.completions.create(
        model="reference-26m", prompt="hello world", max_tokens=4, extra_body={"vashista": SPARSE}
    )
    support = reply.usage.vashista["support"]
    assert (support["dense_share"], support["dropped_mass_estimate"], support["dropped_mass_bound"]) == (0.25, 0.125, 1)
    assert support["audit"]["dropped_mass_high"] == 0.4


def test_a_stream_says_it_with_its_usage_and_choices_are_summed(client):
    chunks = list(
        client.chat.completions.create(
            model="reference-26m", messages=[{"role": "user", "content": "hello"}], max_tokens=3, n=2, stream=True,
            stream_options={"include_usage": True}, extra_body={"vashista": SPARSE},
        )
    )  # fmt: skip
    support = chunks[-1].usage.vashista["support"]
    assert support["num_head_steps"] == 200
    assert support["audit"]["num_audits"] == 4


def test_a_dense_reply_has_no_support(client):
    reply = client.completions.create(model="reference-26m", prompt="hello world", max_tokens=4)
    assert "support" not in reply.usage.model_dump()["vashista"]


def test_metrics_count_what_sparse_requests_left_out(server):
    server.complete(vashista=SPARSE)
    names = [
        'vashista_attention_head_steps_total{mode="sparse"}',
        'vashista_attention_head_steps_total{mode="dense"}',
        "vashista_attention_audits_total",
        'vashista_dropped_mass_ratio_count{kind="audit"}',
    ]
    before = [server.metric(name) for name in names]
    server.complete(vashista=SPARSE)
    assert [server.metric(name) - old for name, old in zip(names, before, strict=True)] == [75, 25, 2, 1]


def test_a_dense_server_refuses_sparse_requests(start_server):
    server = start_server("scripted", attention="dense").wait_ready()
    reply = server.complete(vashista=SPARSE)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_attention_mode"
    assert "attention = dense" in reply.json()["error"]["message"]
    assert server.complete(vashista={"attention": {"mode": "dense"}}).status_code == 200


def test_the_operator_sets_the_default_and_the_limits(start_server):
    server = start_server(
        "scripted", attention_mode="sparse", max_dropped_mass=0.1, min_token_budget=512, max_allowed_dropped_mass=0.2
    ).wait_ready()
    assert server.complete().status_code == 200
    assert submitted(server) == {"max_dropped_mass": 0.1}
    assert server.complete(vashista={"attention": {"mode": "dense"}}).status_code == 200
    assert submitted(server) == {}
    assert server.complete(vashista={"attention": {"token_budget": 511}}).status_code == 400
    assert server.complete(vashista={"attention": {"max_dropped_mass": 0.3}}).status_code == 400


def test_the_operator_may_limit_tokens_instead(start_server):
    server = start_server("scripted", attention_mode="sparse", token_budget=512).wait_ready()
    assert server.complete().status_code == 200
    assert submitted(server) == {"token_budget": 512}


def test_the_audited_mass_in_metrics_is_over_all_head_steps_like_bound_and_estimate(server):
    kinds = {kind: f'vashista_dropped_mass_ratio_sum{{kind="{kind}"}}' for kind in ("bound", "estimate", "audit")}
    server.complete(vashista=SPARSE)
    before = {kind: server.metric(name) for kind, name in kinds.items()}
    server.complete(vashista=SPARSE)
    added = {kind: server.metric(name) - before[kind] for kind, name in kinds.items()}
    assert added == pytest.approx({"bound": 1.0, "estimate": 0.125, "audit": 0.1 * 0.75})


def test_a_message_says_what_was_left_out_too(server):
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "reference-26m", "max_tokens": 3, "messages": messages}
    reply = httpx.post(server.url + "/v1/messages", json=body | {"vashista": SPARSE}, timeout=30).json()
    assert reply["usage"]["vashista"]["support"]["dense_share"] == 0.25
    dense = httpx.post(server.url + "/v1/messages", json=body, timeout=30).json()
    assert "support" not in dense["usage"]["vashista"]


def test_auto_means_vashista_where_requests_are_sparse_by_default(start_server):
    server = start_server("scripted", attention_mode="sparse").wait_ready()
    assert "Attention is vashista; requests are sparse" in server.announcement
