"""Each bad request gets its named error, status and remedy, over real HTTP."""

from __future__ import annotations

import socket

import httpx
import openai
import pytest

from vashista.engine.errors import ERRORS

BAD_COMPLETIONS = [
    ({"prompt": ""}, "empty_prompt", "no tokens"),
    ({"prompt": []}, "empty_prompt", "list of prompts is empty"),
    ({"prompt": [[]]}, "empty_prompt", "no tokens"),
    ({"prompt": ["a", ""]}, "empty_prompt", "prompt.1 has no tokens"),
    ({"prompt": 5}, "invalid_request", "must be a string"),
    ({"prompt": ["a", 5]}, "invalid_request", "must be a string"),
    ({"prompt": [True]}, "invalid_request", "must be a string"),
    ({"prompt": [8192]}, "token_out_of_vocabulary", "8192"),
    ({"prompt": [5, -1]}, "token_out_of_vocabulary", "-1"),
    ({"prompt": [10**30]}, "token_out_of_vocabulary", "vocabulary"),
    ({"prompt": [5] * 16384}, "context_length_exceeded", "at most 16383"),
    ({"prompt": [5] * 16380, "max_tokens": 5}, "context_length_exceeded", "max_tokens may be at most 4"),
    ({"max_tokens": 20000}, "context_length_exceeded", "20004"),
    ({"max_tokens": 0}, "invalid_request", "echo"),
    ({"max_tokens": -1}, "invalid_request", "greater than or equal to 0, got -1"),
    ({"max_tokens": 1.5}, "invalid_request", "valid integer"),
    ({"max_tokens": True}, "invalid_request", "valid integer"),
    ({"repetition_penalty": 1e-40}, "invalid_request", "greater than or equal to 0.01"),
    ({"max_tokens": "4"}, "invalid_request", "valid integer"),
    ({"max_tokens": 10**4290}, "invalid_request", "less than"),
    ({"min_tokens": 5}, "invalid_request", "more than max_tokens"),
    ({"temperature": 2.1}, "invalid_request", "less than or equal to 2, got 2.1"),
    ({"temperature": "hot"}, "invalid_request", "valid number"),
    ({"temperature": 10**400}, "invalid_request", "temperature"),
    ({"top_p": 0}, "invalid_request", "greater than 0"),
    ({"top_k": -2}, "invalid_request", "top_k"),
    ({"min_p": 1.5}, "invalid_request", "min_p"),
    ({"repetition_penalty": 0}, "invalid_request", "repetition_penalty"),
    ({"presence_penalty": 3}, "invalid_request", "presence_penalty"),
    ({"seed": 1 << 63}, "invalid_request", "seed"),
    ({"n": 0}, "invalid_request", "n:"),
    ({"n": 17}, "invalid_request", "at most 16 on this server, got 17"),
    ({"prompt": ["a"] * 600}, "invalid_request", "600 prompts"),
    ({"logprobs": 21}, "invalid_request", "at most 20"),
    ({"prompt_logprobs": 21}, "invalid_request", "at most 20"),
    ({"stop": [str(i) for i in range(17)]}, "too_many_stops", "at most 16"),
    ({"stop_token_ids": list(range(17))}, "too_many_stops", "at most 16"),
    ({"stop_token_ids": [9000]}, "token_out_of_vocabulary", "stop_token_ids"),
    ({"stop": ""}, "invalid_request", "stop"),
    ({"stop": [""]}, "invalid_request", "stop"),
    ({"stop": ["x" * 1025]}, "invalid_request", "1024"),
    ({"logit_bias": {"9000": 1}}, "token_out_of_vocabulary", "logit_bias"),
    ({"logit_bias": {"a": 1}}, "invalid_request", "logit_bias"),
    ({"logit_bias": {"5": 101}}, "invalid_request", "logit_bias.5"),
    ({"stream_options": {"include_usage": True}}, "invalid_request", "stream: true"),
    ({"stream": True, "stream_options": {"include_usag": True}}, "unknown_field", "stream_options.include_usag"),
    ({"temprature": 1}, "unknown_field", "Did you mean 'temperature'?"),
    ({"vashista": {"speed": 11}}, "unknown_field", "vashista.speed"),
    ({"vashista": {"attention": {"mode": "magic"}}}, "invalid_request", "dense"),
    ({"suffix": "end"}, "unsupported_field", "suffix: should be '', got \"end\". Filling in the middle is not"),
    ({"stop": [""]}, "invalid_request", 'stop.0: should have at least 1 character, got "".'),
    ({"best_of": 3}, "unsupported_field", "best_of"),
    ({"model": "gpt-4"}, "model_not_found", "reference-26m"),
    ({"model": None}, "invalid_request", "model"),
    ({"response_format": {"type": "xml"}}, "invalid_request", "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wat"}}}},
        "invalid_grammar",
        "response_format",
    ),
    ({"response_format": {"type": "json_schema"}}, "invalid_request", "required"),
    ({"cache_salt": ""}, "invalid_request", "cache_salt"),
    ({"priority": 5000}, "invalid_request", "priority"),
]


@pytest.mark.parametrize(("fields", "code", "part"), BAD_COMPLETIONS)
def test_a_bad_completion_is_refused_by_name(server, fields, code, part):
    reply = server.complete(**fields)
    error = reply.json()["error"]
    assert (error["code"], reply.status_code) == (code, ERRORS[code].http_status), error
    assert part in error["message"]
    assert error["remedy"] == ERRORS[code].remedy
    assert error["type"] in {"invalid_request_error", "not_found_error"}
    assert len(error["message"]) < 600


BAD_CHATS = [
    ({"messages": []}, "invalid_messages", "messages: should have at least 1 item, got []."),
    ({"tools": [{}]}, "unsupported_field", "tools: should have at most 0 items, got [{}]. Tools are not supported."),
    ({"messages": None}, "invalid_messages", "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "invalid_messages", "role"),
    ({"messages": [{"content": "x"}]}, "invalid_request", "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "invalid_request", "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_request", "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "invalid_request", "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "mood": "y"}]}, "unknown_field", "messages.0.mood"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "unsupported_field",
        "image_url",
    ),
    ({"tools": [{"type": "function"}]}, "unsupported_field", "tools"),
    ({"tool_choice": "required"}, "unsupported_field", "tool_choice"),
    ({"functions": [{}]}, "unsupported_field", "functions"),
    ({"audio": {"voice": "x"}}, "unsupported_field", "audio"),
    ({"modalities": ["audio"]}, "unsupported_field", "modalities"),
    ({"store": True}, "unsupported_field", "store"),
    ({"service_tier": "flex"}, "unsupported_field", "service_tier"),
    ({"prediction": {}}, "unsupported_field", "prediction"),
    ({"top_logprobs": 2}, "invalid_request", "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_request", "at most 20"),
    ({"logprobs": 1}, "invalid_request", "valid boolean"),
    ({"max_completion_tokens": 0}, "invalid_request", "max_completion_tokens"),
    ({"messages": [{"role": "user", "content": "x " * 40000}]}, "context_length_exceeded", "messages"),
]


@pytest.mark.parametrize(("fields", "code", "part"), BAD_CHATS)
def test_a_bad_chat_is_refused_by_name(server, fields, code, part):
    reply = server.chat(**fields)
    error = reply.json()["error"]
    assert (error["code"], reply.status_code) == (code, ERRORS[code].http_status), error
    assert part in error["message"] + str(error["param"])


BAD_BODIES = [
    (b"", "invalid_body", "empty"),
    (b"{", "invalid_body", "not valid JSON"),
    (b"[]", "invalid_body", "array"),
    (b"null", "invalid_body", "null"),
    (b"true", "invalid_body", "boolean"),
    (b'{"temperature": NaN}', "invalid_body", "not valid JSON"),
    (b'{"temperature": -Infinity}', "invalid_body", "not valid JSON"),
    (b'{"temperature": 1e999}', "invalid_body", "out of range"),
    (b'{"prompt": "\xff\xfe"}', "invalid_body", "utf-8"),
    (b'{"prompt": "\\ud800"}', "invalid_body", "not valid JSON"),
    (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "body_too_deep", "64"),
    (b"[" * 100_000, "body_too_deep", "64"),
    (b'{"a":' * 60_000, "body_too_deep", "64"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", "invalid_body", "JSON"),
]


@pytest.mark.parametrize(("body", "code", "part"), BAD_BODIES)
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize", "/detokenize"]
)
def test_a_bad_body_is_refused_by_name_on_every_route(server, path, body, code, part):
    reply = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)
    assert part in reply.json()["error"]["message"]


def test_another_content_type_is_refused_because_browsers_may_forge_it(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        body = b'{"model": "reference-26m", "prompt": "x"}'
        reply = httpx.post(server.url + "/v1/completions", content=body, headers={"content-type": kind})
        assert reply.json()["error"]["code"] == "invalid_body"
        assert "application/json" in reply.json()["error"]["message"]


def test_a_body_without_a_content_type_is_refused_because_a_page_can_send_a_blob_without_one(server):
    reply = httpx.post(server.url + "/v1/completions", content=b'{"model": "reference-26m", "prompt": "x"}')
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_body")
    assert "no Content-Type" in reply.json()["error"]["message"]


def test_a_body_of_fifty_megabytes_is_refused_with_its_length(server):
    body = b'{"prompt": "' + b"x" * (50 << 20) + b'"}'
    reply = httpx.post(server.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert "at most 1048576" in reply.json()["error"]["message"]


def test_a_chunked_body_is_refused_as_soon_as_it_is_too_large(server):
    def chunks():
        for _ in range(100):
            yield b" " * 65536

    reply = httpx.post(server.url + "/tokenize", content=chunks(), headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


def test_a_too_long_body_is_refused_before_it_is_sent(server):
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /tokenize HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {1 << 40}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_unknown_paths_and_methods_have_openai_bodies_too(server):
    missing = httpx.get(server.url + "/v2/completions")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = httpx.get(server.url + "/v1/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/version"])
def test_what_can_be_read_can_be_asked_for_its_head(server, path):
    """As load balancers check health; they got 405."""
    head, whole = httpx.head(server.url + path), httpx.get(server.url + path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_the_openai_client_raises_its_own_errors_from_ours(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="reference-26m"):
            client.completions.create(model="nope", prompt="x")
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="reference-26m", prompt="x", temperature=9)
        assert caught.value.code == "invalid_request"
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nope")
        assert client.models.retrieve("reference-26m").id == "reference-26m"
        assert [model.id for model in client.models.list()] == ["reference-26m"]


def test_tokenize_wants_a_prompt_or_messages_and_not_both(server):
    for body in ({}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}):
        reply = httpx.post(server.url + "/tokenize", json=body)
        assert reply.status_code == 400
        assert "either prompt or messages" in reply.json()["error"]["message"]


def test_a_request_that_needs_more_pages_than_there_are_is_refused(start_server):
    small = start_server(environ={"SCRIPTED_PAGES": "4"}).wait_ready()
    reply = small.complete(max_tokens=300)
    assert reply.json()["error"]["code"] == "kv_capacity_exceeded"
    assert "holds 256 (4 pages of 64)" in reply.json()["error"]["message"]
    assert small.complete(max_tokens=252).status_code == 200


def test_the_server_never_imports_torch(start_server):
    server = start_server().wait_ready()
    server.process.terminate()
    assert "no torch" in server.process.communicate(timeout=30)[0]
