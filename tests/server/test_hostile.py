"""Clients that mean ill, against a server: it stays up, its memory is bounded, others are answered."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

MEGABYTE = 1 << 20
LONG = "word " * (3 * MEGABYTE)


@pytest.fixture(scope="module")
def large(start_server: Any) -> Any:
    """A server with the real model's tokenizer, and bodies of the default size."""
    return start_server("real").wait_ready()


def peak_bytes(server: Any) -> int:
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def connect(server: Any) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=60)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/completions", {"prompt": ["hello", LONG]}),
        ("/v1/completions", {"prompt": "a" * (15 * MEGABYTE)}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 4}),
        ("/v1/predict", {"prompt": LONG}),
        ("/tokenize", {"prompt": LONG}),
    ],
    ids=["completion", "second prompt", "one word", "chat", "messages", "predict", "tokenize"],
)
def test_a_prompt_of_15_megabytes_is_refused_in_the_memory_of_a_few_copies(
    path: str, body: dict[str, Any], large: Any
) -> None:
    before = peak_bytes(large)
    reply = httpx.post(large.url + path, json={"model": "reference-26m", **body}, timeout=60)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert "has more than" in error["message"]
    assert "tokens" in error["message"]
    if path != "/v1/messages":
        assert error["code"] == "context_length_exceeded"
    assert peak_bytes(large) - before < 450 * MEGABYTE  # it took 3.5 GB while such texts were counted to their end


def test_bodies_that_never_end_fill_no_more_than_their_share_and_small_requests_are_answered(start_server: Any) -> None:
    # 80 MB in all: far more would take a busy machine a minute, after which the first bodies are cut off and make room.
    server = start_server("scripted", max_body_bytes=MEGABYTE).wait_ready()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    assert server.complete().status_code == 200  # what the first request loads is none of theirs
    before = peak_bytes(server)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(80)]
        for client in clients:
            client.sendall(head % MEGABYTE + b" " * (MEGABYTE - 1))
        # Which of them hold the share, of 16 whole bodies, is for the order to say in which the server reads.
        answers = dict.fromkeys(clients, b"")
        ends_s = time.monotonic() + 60
        while len(refused := [answer for answer in answers.values() if b"}}" in answer]) < 80 - 18:
            waiting = [client for client, answer in answers.items() if b"}}" not in answer]
            ready = select.select(waiting, [], [], max(0.0, ends_s - time.monotonic()))[0]
            assert ready, f"{len(refused)} refused"
            for client in ready:
                part = client.recv(1 << 16)
                assert part, answers[client]
                answers[client] += part
        for answer in refused:
            assert b"429 Too Many Requests" in answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "queue_full"
            assert b"retry-after" in answer.lower()
        assert server.complete().status_code == 200
        assert peak_bytes(server) - before < 16 * MEGABYTE * 4
    server.wait_for(lambda: server.complete(prompt="hello " * 20_000).status_code != 429)


def test_garbage_oversize_heads_and_idle_connections_leave_the_server_as_it_was(start_server: Any) -> None:
    server = start_server("scripted").wait_ready()
    before = peak_bytes(server)
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            client = stack.enter_context(connect(server))
            with contextlib.suppress(OSError):
                if number % 4 == 1:
                    client.sendall(b"\x16\x03\x01" + os.urandom(300))
                elif number % 4 == 2:
                    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: " + b"a" * 100_000)
                elif number % 4 == 3:
                    client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-")
        start_s = time.monotonic()
        assert server.complete().status_code == 200
        assert time.monotonic() - start_s < 10
        assert peak_bytes(server) - before < 100 * MEGABYTE
    assert server.complete().status_code == 200
    assert "unexpected error" not in server.log()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/predict", "/tokenize"])
def test_a_chat_of_more_messages_than_the_server_takes_is_told_the_limit(path: str, large: Any) -> None:
    """60,000 kept everybody waiting for 0.2 s; a list of five million numbers for 25."""
    message = {"role": "user", "content": "hi"}
    options = {"model": "reference-26m", "max_tokens": 1} if path.startswith("/v1") else {}
    reply = httpx.post(large.url + path, json={"messages": [message] * 60_000, **options}, timeout=60)
    assert reply.status_code == 413, reply.text
    assert "more than 131072 strings, lists and objects, or than 1048576 values in all" in reply.text
    assert "max_body_values" in reply.text
    reply = httpx.post(large.url + path, json={"messages": [message] * 20_000, **options}, timeout=60)
    assert reply.status_code == 200 if path == "/tokenize" else "context of this model is 32768" in reply.text


def test_the_limit_of_values_is_the_operators(start_server: Any) -> None:
    server = start_server("scripted", max_body_values=1024).wait_ready()
    assert server.complete(prompt=["a"] * 20).status_code == 200
    reply = server.complete(prompt=["a"] * 1024)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


def test_more_token_ids_than_a_text_may_have_are_no_text(large: Any) -> None:
    reply = httpx.post(large.url + "/detokenize", json={"tokens": [5] * (4 * 32768)}, timeout=60)
    assert reply.status_code == 200
    reply = httpx.post(large.url + "/detokenize", json={"tokens": [5] * (4 * 32768 + 1)}, timeout=60)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_ids_of_a_prompt_that_is_too_long_are_not_looked_at_and_others_are_named(large: Any) -> None:
    for prompt, words in (
        ([-1] * 40_000, "The prompt has 40000 tokens"),
        ([[5], [-1]], "prompt.1: Token id -1 is not in the vocabulary"),
        ([[5] * 30_000] * 2 + [[5] * 29_999 + [8192]], "prompt.2: Token id 8192 is not in the vocabulary"),
    ):
        reply = large.complete(prompt=prompt)
        assert reply.status_code == 400
        assert reply.json()["error"]["message"].startswith(words)
