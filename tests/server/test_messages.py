"""/v1/messages through the real anthropic client, against a scripted engine that repeats the prompt."""

from __future__ import annotations

import asyncio
import json

import anthropic
import httpx
import pytest

from vashista.engine.errors import ERRORS

MESSAGES = [{"role": "user", "content": "hello world"}]
BODY = {"model": "reference-26m", "max_tokens": 4, "messages": MESSAGES}
NUM_CACHED = 3
"""What the scripted engine says of every prompt."""


@pytest.fixture
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def post(server, **fields):
    return httpx.post(server.url + "/v1/messages", json={**BODY, **fields}, timeout=60)


def token_ids_of(server, messages):
    """The prompt that /v1/chat/completions makes of the messages."""
    return httpx.post(server.url + "/tokenize", json={"messages": messages}).json()["tokens"]


def last_submit(server):
    return server.engine_messages("Submit")[-1]


def prompt_of_last(server):
    tokens = last_submit(server)["prompt_token_ids"]
    return httpx.post(server.url + "/detokenize", json={"tokens": tokens}).json()["prompt"]


def test_a_message_is_rendered_like_a_chat_and_answered(client, server):
    tokens = token_ids_of(server, MESSAGES)
    reply = client.messages.create(model="reference-26m", max_tokens=len(tokens), messages=MESSAGES)
    assert reply.content[0].text == "Question: hello world\nAnswer:"
    assert (reply.type, reply.role, reply.model) == ("message", "assistant", "reference-26m")
    assert reply.id.startswith("msg_")
    assert (reply.stop_reason, reply.stop_sequence) == ("max_tokens", None)
    assert reply.usage.input_tokens == len(tokens) - NUM_CACHED
    assert reply.usage.cache_read_input_tokens == NUM_CACHED
    assert reply.usage.output_tokens == len(tokens)
    assert reply._request_id
    assert last_submit(server)["prompt_token_ids"] == tokens


def test_the_clients_stream_adds_up_to_the_same_message(client, server):
    whole = client.messages.create(model="reference-26m", max_tokens=9, messages=MESSAGES)
    with client.messages.stream(model="reference-26m", max_tokens=9, messages=MESSAGES) as stream:
        texts = list(stream.text_stream)
        streamed = stream.get_final_message()
    assert len(texts) > 1
    assert "".join(texts) == streamed.content[0].text == whole.content[0].text
    assert streamed.stop_reason == whole.stop_reason == "max_tokens"
    assert streamed.usage.model_dump(exclude={"vashista"}) == whole.usage.model_dump(exclude={"vashista"})


def test_the_events_of_a_stream_come_in_anthropics_order(server):
    reply = post(server, stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in reply.text.removesuffix("\n\n").split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    data = [json.loads(line.removeprefix("data: ")) for _, line in events]
    deltas = names.count("content_block_delta")
    assert deltas == BODY["max_tokens"]
    assert names == [
        "message_start", "content_block_start", *["content_block_delta"] * deltas,
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert [entry["type"] for entry in data] == names
    start = data[0]["message"]
    assert (start["content"], start["stop_reason"], start["role"]) == ([], None, "assistant")
    assert start["usage"]["cache_read_input_tokens"] == NUM_CACHED
    assert data[1]["content_block"] == {"type": "text", "text": ""}
    assert data[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert data[-2]["usage"]["output_tokens"] == BODY["max_tokens"]


def test_a_stop_sequence_is_named_and_an_end_of_the_turn_is_none(client, server, script):
    for sequences, reason in ((["world", "moon"], "stop_sequence"), ([], "end_turn")):
        fields = {
            "model": "reference-26m",
            "max_tokens": 9,
            "messages": MESSAGES,
            "stop_sequences": sequences,
            "extra_body": {"seed": script.STOP},
        }
        reply = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            streamed = stream.get_final_message()
        for message in (reply, streamed):
            assert (message.stop_reason, message.stop_sequence) == (reason, sequences[0] if sequences else None)
            assert message.usage.output_tokens == 2
        assert last_submit(server)["sampling"].get("stop", []) == sequences


def test_the_async_client_gets_the_same(server):
    async def run():
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none") as client:
            reply = await client.messages.create(model="reference-26m", max_tokens=5, messages=MESSAGES)
            async with client.messages.stream(model="reference-26m", max_tokens=5, messages=MESSAGES) as stream:
                return reply.content[0].text, await stream.get_final_text()

    whole, streamed = asyncio.run(run())
    assert whole == streamed


def test_system_and_blocks_become_the_chats_messages(client, server):
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "you"}]
    cached = [{**part, "cache_control": {"type": "ephemeral", "ttl": "1h"}, "citations": None} for part in parts]
    client.messages.create(
        model="reference-26m", max_tokens=1, system=cached, messages=[{"role": "user", "content": cached}]
    )
    chat = [{"role": "system", "content": parts}, {"role": "user", "content": parts}]
    assert last_submit(server)["prompt_token_ids"] == token_ids_of(server, chat)


def test_neighbours_of_one_role_become_one_message(server):
    turns = [("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    post(server, system="s", messages=[{"role": role, "content": content} for role, content in turns])
    assert prompt_of_last(server) == "s\n\nQuestion: a\nb\nAnswer: c\n\nQuestion: d\nAnswer:"


def test_a_last_message_of_the_assistant_is_continued(client, server):
    turns = [*MESSAGES, {"role": "assistant", "content": "The answer is ("}]
    client.messages.create(model="reference-26m", max_tokens=1, messages=turns)
    assert prompt_of_last(server) == "Question: hello world\nAnswer: The answer is ("
    server.chat(messages=turns, continue_final_message=True)
    assert prompt_of_last(server) == "Question: hello world\nAnswer: The answer is ("


def test_a_chat_that_cannot_be_continued_says_why(server):
    reply = server.chat(continue_final_message=True)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_messages")
    assert "'user'" in reply.json()["error"]["message"]
    turns = [*MESSAGES, {"role": "assistant", "content": "x"}]
    reply = server.chat(messages=turns, continue_final_message=True, add_generation_prompt=True)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "continue_final_message")


def test_a_reply_can_be_sent_back_as_it_came(client, server):
    reply = client.messages.create(model="reference-26m", max_tokens=2, messages=MESSAGES)
    turns = [*MESSAGES, {"role": "assistant", "content": reply.content}, {"role": "user", "content": "more"}]
    client.messages.create(model="reference-26m", max_tokens=1, messages=turns)
    assert prompt_of_last(server).endswith("Question: more\nAnswer:")


def test_sampling_fields_reach_the_engine(server):
    fields = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "seed": 11, "cache_salt": "me", "priority": 3}
    assert post(server, **fields).status_code == 200
    submit = last_submit(server)
    got = {**submit["sampling"], "cache_salt": submit["cache_salt"], "priority": submit["priority"]}
    assert {name: got[name] for name in fields} == fields
    assert got["max_tokens"] == BODY["max_tokens"]


def test_harmless_fields_of_the_protocol_are_accepted(server):
    reply = post(
        server, metadata={"user_id": "me"}, tools=[], tool_choice=None, thinking={"type": "disabled"},
        service_tier="auto", speed="standard", mcp_servers=[], cache_control={"type": "ephemeral"}, container=None,
        vashista={"attention": {"mode": "dense"}}, chat_template_kwargs={"x": 1}, stop_sequences=None,
    )  # fmt: skip
    assert reply.status_code == 200, reply.text


IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}
BAD = [
    ({"max_tokens": None}, "invalid_request", "max_tokens"),
    ({"max_tokens": 0}, "invalid_request", "max_tokens"),
    ({"max_tokens": 20000}, "context_length_exceeded", "max_tokens"),
    ({"messages": []}, "invalid_messages", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_messages", "messages.0.role"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "unsupported_field", "'image'"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "unsupported_field", "tool_result"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]}, "invalid_request", "text"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "unknown_field", "messages.0.name"),
    ({"system": [IMAGE]}, "unsupported_field", "system"),
    (
        {"system": [{"type": "text", "text": "x", "cache_control": {"type": "eternal"}}]},
        "invalid_request",
        "ephemeral",
    ),
    ({"system": [{"type": "text", "text": "x", "citations": []}]}, "unsupported_field", "citations"),
    ({"cache_control": {"type": "ephemeral", "ttl": "9d"}}, "invalid_request", "cache_control"),
    ({"tools": [{"name": "x", "input_schema": {}}]}, "unsupported_field", "tools"),
    ({"tool_choice": {"type": "any"}}, "unsupported_field", "tool_choice"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "unsupported_field", "thinking"),
    ({"thinking": {"type": "adaptive"}}, "unsupported_field", "thinking"),
    ({"mcp_servers": [{}]}, "unsupported_field", "mcp_servers"),
    ({"output_config": {"effort": "high"}}, "unsupported_field", "output_config"),
    ({"service_tier": "priority"}, "unsupported_field", "service_tier"),
    ({"container": "x"}, "unsupported_field", "container"),
    ({"metadata": {"user": "me"}}, "unknown_field", "metadata.user"),
    ({"temperature": 2.1}, "invalid_request", "temperature"),
    ({"top_k": -2}, "invalid_request", "top_k"),
    ({"stop_sequences": "x"}, "invalid_request", "stop_sequences"),
    ({"stop_sequences": [""]}, "invalid_request", "stop_sequences.0"),
    ({"stop_sequences": ["x" * 1025]}, "invalid_request", "stop_sequences"),
    ({"stop_sequences": [str(number) for number in range(17)]}, "too_many_stops", "stop_sequences"),
    ({"stop": ["x"]}, "unknown_field", "stop"),
    ({"n": 2}, "unknown_field", "n"),
    ({"model": "claude"}, "model_not_found", "reference-26m"),
]


@pytest.mark.parametrize(("fields", "code", "part"), BAD)
def test_a_bad_message_is_refused_by_name_in_anthropics_words(server, fields, code, part):
    reply = post(server, **fields)
    body = reply.json()
    assert (reply.status_code, body["error"]["code"]) == (ERRORS[code].http_status, code), body
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["error"]["type"] == ("not_found_error" if code == "model_not_found" else "invalid_request_error")
    assert body["error"]["remedy"] == ERRORS[code].remedy
    assert part in body["error"]["message"]
    assert body["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]


def test_max_tokens_is_required(server):
    body = {name: value for name, value in BODY.items() if name != "max_tokens"}
    reply = httpx.post(server.url + "/v1/messages", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "max_tokens")


def test_the_anthropic_client_raises_its_own_errors_from_ours(client, server):
    with pytest.raises(anthropic.NotFoundError, match="reference-26m") as caught:
        client.messages.create(model="nope", max_tokens=1, messages=MESSAGES)
    assert caught.value.request_id == caught.value.body["request_id"]
    with pytest.raises(anthropic.BadRequestError, match="tools"):
        client.messages.create(model="reference-26m", max_tokens=1, messages=MESSAGES, tools=[{"name": "x"}])
    with pytest.raises(anthropic.NotFoundError, match="There is no path '/v1/messages/count_tokens'"):
        client.messages.count_tokens(model="reference-26m", messages=MESSAGES)


def test_wrong_methods_and_large_bodies_have_anthropic_bodies_too(server):
    wrong = httpx.get(server.url + "/v1/messages")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")
    large = post(server, system="x" * (1 << 20))
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
    assert httpx.get(server.url + "/v1/messagesx").json()["error"]["request_id"]


@pytest.mark.parametrize("streams", [False, True])
def test_an_error_before_the_first_token_has_its_status(server, script, streams):
    reply = post(server, seed=script.ERROR, stream=streams)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_grammar")
    assert reply.json()["type"] == "error"


def test_a_late_error_ends_the_stream_and_the_client_raises(client, script):
    received = []
    with (
        pytest.raises(anthropic.APIStatusError, match="scripted"),
        client.messages.stream(
            model="reference-26m", max_tokens=9, messages=MESSAGES, extra_body={"seed": script.LATE_ERROR}
        ) as stream,
    ):
        received.extend(stream.text_stream)
    assert len(received) == 2


def test_a_client_that_leaves_a_stream_frees_its_pages(client, server, script):
    num_aborts = len(server.engine_messages("Abort"))
    with client.messages.stream(
        model="reference-26m", max_tokens=9, messages=MESSAGES, extra_body={"seed": script.ENDLESS}
    ) as stream:
        next(iter(stream.text_stream))
    server.wait_for(lambda: len(server.engine_messages("Abort")) > num_aborts)
