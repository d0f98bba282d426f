import asyncio
import json
import socket
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vashista.engine.errors import (
    InvalidKeyError,
    ModelNotFoundError,
    ServerUnreachableError,
    UnexpectedReplyError,
    WorkloadError,
)
from vashista.server.loadgen.client import OpenAIClient, Prompt, ReplyReader, RequestShape
from vashista.server.loadgen.connection import ConnectionPool, Endpoint
from vashista.server.loadgen.outcome import Outcome
from vashista.server.loadgen.target import TokenCounter, UsageCounter, find_model


def with_client(url, work, *, key=None, timeout_s=20.0):
    async def main():
        pool = ConnectionPool(Endpoint.parse(url), api_key=key)
        try:
            return await work(OpenAIClient(pool, timeout_s=timeout_s))
        finally:
            pool.close()

    return asyncio.run(main())


def send(server, prompt=None, *, timeout_s=20.0, **shape):
    async def work(client):
        outcome = Outcome(index=0, intended_s=0.0)
        full = RequestShape(**({"model": "fake", "endpoint": "completions"} | shape))
        await client.send(full, prompt or Prompt(5, text="one two three"), outcome, origin_s=0.0)
        return outcome

    return with_client(server.url, work, timeout_s=timeout_s)


def read(pieces, *, is_streaming=True, status=200):
    """Feed a reader pieces that arrive at 1, 2, 3 ... seconds."""
    outcome = Outcome(index=0, intended_s=0.0)
    reader = ReplyReader(outcome, is_streaming=is_streaming, origin_s=0.0)
    reader.head(status)
    for second, piece in enumerate(pieces, start=1):
        reader.data(piece, float(second))
    reader.finish()
    return outcome


def event(value, end=b"\n\n"):
    return b"data: " + json.dumps(value).encode() + end


def text(value, finish_reason=None):
    return event({"choices": [{"text": value, "finish_reason": finish_reason}]})


def test_times_are_those_of_the_chunks_that_carry_text():
    usage = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}})
    outcome = read([text(""), text("a"), text("b"), text("cd", "length"), usage, b"data: [DONE]\n\n"])
    assert outcome.error_code is None
    assert outcome.first_token_s == 2.0
    assert outcome.token_times_s == [2.0, 3.0, 4.0]
    assert outcome.end_s == 6.0
    assert outcome.tpot_s == (6.0 - 2.0) / 3
    assert (outcome.num_prompt_tokens, outcome.num_output_tokens, outcome.finish_reason) == (7, 4, "length")


def test_a_chats_role_chunk_is_not_its_first_token_but_reasoning_is():
    role = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    thought = event({"choices": [{"delta": {"reasoning_content": "hm"}}]})
    answer = event({"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}]})
    assert read([role, thought, answer]).token_times_s == [2.0, 3.0]


def test_without_usage_chunks_are_counted_and_that_is_said():
    outcome = read([text("a"), text("b", "stop"), b"data: [DONE]\n\n"])
    assert outcome.num_output_tokens == 2
    assert not outcome.is_counted_by_usage


STREAM = b": ping\n\n" + text("\u00e9\r\n") + b"event: x\n" + text("b") + text("c", "length") + b"data: [DONE]\n\n"


@given(st.lists(st.integers(0, len(STREAM)), max_size=8), st.booleans())
def test_a_stream_reads_the_same_however_it_is_cut(cuts, has_crlf):
    stream = STREAM.replace(b"\n", b"\r\n") if has_crlf else STREAM
    borders = sorted({0, len(stream), *cuts})
    outcome = read([stream[begin:end] for begin, end in pairwise(borders)])
    assert outcome.error_code is None
    assert (outcome.num_output_tokens, outcome.finish_reason) == (3, "length")


@given(st.lists(st.binary(max_size=60), max_size=6), st.booleans(), st.sampled_from([200, 400, 500]))
def test_no_bytes_make_the_reader_raise(pieces, is_streaming, status):
    outcome = read([b"data: ", *pieces, b"\n\n"], is_streaming=is_streaming, status=status)
    assert outcome.is_ok == (outcome.end_s is not None)


@pytest.mark.parametrize(
    ("pieces", "status", "code"),
    [
        ([text("a")], 200, "incomplete_stream"),
        ([], 200, "incomplete_stream"),
        ([b"data: {broken\n\n"], 200, "unexpected_reply"),
        ([b"data: [1]\n\n"], 200, "unexpected_reply"),
        ([event({"error": {"message": "m", "code": "engine_died"}})], 200, "engine_died"),
        ([event({"error": "plain"})], 200, "stream_error"),
        ([b'{"error": {"message": "m", "code": "queue_full"}}'], 429, "429 queue_full"),
        ([b'{"error": {"message": "m", "type": "bad"}}'], 400, "400 bad"),
        ([b"<html>"], 502, "502"),
        ([], 500, "500"),
    ],
)
def test_each_failure_has_its_code(pieces, status, code):
    outcome = read(pieces, status=status)
    assert outcome.error_code == code
    assert outcome.error_message is not None
    assert outcome.end_s is None


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_streamed_request_is_timed_between_the_servers_own_times(server, endpoint, newline):
    server.newline = newline
    server.chunk_delay_s = 0.002
    outcome = send(server, endpoint=endpoint)
    assert outcome.error_code is None
    assert (outcome.num_output_tokens, outcome.is_counted_by_usage, outcome.num_cached_tokens) == (5, True, 3)
    (sent_s,) = server.chunk_times_s
    assert outcome.first_token_s >= sent_s[0]
    assert outcome.token_times_s[-1] >= sent_s[-1]
    assert all(seen >= sent for seen, sent in zip(outcome.token_times_s, sent_s, strict=False))
    assert outcome.sent_s < sent_s[0]
    assert outcome.end_s - outcome.first_token_s >= sent_s[-1] - outcome.first_token_s


def test_the_body_says_what_was_asked_and_extra_fields_win(server):
    send(server, extra_body={"temperature": 0.7, "cache_salt": "s"}, ignore_eos=True)
    (body,) = server.completions
    assert body == {
        "model": "fake",
        "prompt": "one two three",
        "max_tokens": 5,
        "temperature": 0.7,
        "cache_salt": "s",
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_without_streaming_there_is_an_end_but_no_first_token(server, endpoint):
    outcome = send(server, is_streaming=False, endpoint=endpoint)
    assert outcome.error_code is None
    assert outcome.first_token_s is None
    assert outcome.end_s is not None
    assert (outcome.num_output_tokens, outcome.finish_reason) == (5, "length")


def test_a_cut_stream_is_a_failure(server):
    server.cut_after_chunks = 2
    outcome = send(server)
    assert outcome.error_code == "connection_lost"
    assert outcome.end_s is None


def test_an_error_in_a_stream_is_a_failure_with_its_code(server):
    server.error_after_chunks = 2
    assert send(server).error_code == "engine_died"


def test_a_stream_that_just_ends_is_a_failure(server):
    server.has_done = False
    assert send(server).error_code == "incomplete_stream"


def test_a_reply_that_takes_too_long_is_a_failure(server):
    server.chunk_delay_s = 30.0
    outcome = send(server, timeout_s=0.05)
    assert outcome.error_code == "timeout"
    assert "0.05 s" in outcome.error_message


def send_twice(server):
    async def work(client):
        outcomes = [Outcome(index=index, intended_s=0.0) for index in range(2)]
        for outcome in outcomes:
            shape = RequestShape(model="fake", endpoint="completions")
            await client.send(shape, Prompt(2, text="a"), outcome, origin_s=0.0)
        return outcomes

    return with_client(server.url, work)


def test_connections_are_used_again(server):
    assert all(outcome.is_ok for outcome in send_twice(server))
    assert server.num_connections == 1


def test_a_connection_that_the_server_closed_while_idle_is_replaced(server):
    server.closes_after_reply = True
    assert all(outcome.is_ok for outcome in send_twice(server))
    assert server.num_connections == 2


def test_one_model_is_found_and_several_must_be_chosen_from(server):
    assert with_client(server.url, lambda client: find_model(client, None)) == "fake"
    server.models = ["a", "b"]
    assert with_client(server.url, lambda client: find_model(client, "b")) == "b"
    with pytest.raises(WorkloadError, match="a, b"):
        with_client(server.url, lambda client: find_model(client, None))
    with pytest.raises(ModelNotFoundError, match="it has: a, b"):
        with_client(server.url, lambda client: find_model(client, "c"))


def test_a_wrong_key_is_named_and_a_right_one_works(server):
    server.key = "secret"
    with pytest.raises(InvalidKeyError, match="401"):
        with_client(server.url, lambda client: find_model(client, None), key="other")
    assert with_client(server.url, lambda client: find_model(client, None), key="secret") == "fake"


def test_a_closed_port_is_unreachable():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ServerUnreachableError, match=url):
        with_client(url, lambda client: find_model(client, None))


def test_something_else_that_listens_is_named():
    async def main():
        async def shout(reader, writer):
            writer.write(b"SSH-2.0-OpenSSH_9\r\n\r\n")
            await writer.drain()
            writer.close()

        other = await asyncio.start_server(shout, "127.0.0.1", 0)
        pool = ConnectionPool(Endpoint.parse(f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}"), api_key=None)
        try:
            with pytest.raises(UnexpectedReplyError, match="does not speak HTTP"):
                await find_model(OpenAIClient(pool, timeout_s=20), None)
        finally:
            pool.close()
            other.close()
            await other.wait_closed()

    asyncio.run(main())


@pytest.mark.parametrize("field", ["prompt", "content"])
def test_the_servers_tokenizer_is_asked_in_its_own_dialect(server, field):
    server.tokenize_field = field

    async def work(client):
        counter = await TokenCounter.find(client, model="fake", is_chat=False)
        return await counter.count("ab cdef g")

    assert with_client(server.url, work) == 4


def test_a_chats_template_is_counted_too(server):
    server.tokenize_field = "messages"

    async def work(client):
        counter = await TokenCounter.find(client, model="fake", is_chat=True)
        return await counter.count("ab cdef g")

    assert with_client(server.url, work) == 9


def test_a_server_without_tokenizer_is_counted_by_usage(server):
    server.has_tokenize = False

    async def work(client):
        assert await TokenCounter.find(client, model="fake", is_chat=False) is None
        counter = await UsageCounter.find(client, RequestShape(model="fake", endpoint="completions"))
        return await counter.count("ab cdef g")

    assert with_client(server.url, work) == 4
    assert all(body["max_tokens"] == 1 for body in server.completions)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a", "http://", "http://a:b", "http://a?x=1", "http://u:p@a"]
)
def test_wrong_urls_are_named(url):
    with pytest.raises(WorkloadError, match="URL"):
        Endpoint.parse(url)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h", "http://h:80"),
        ("https://h", "https://h:443"),
        ("http://h:8000/v1/", "http://h:8000"),
        ("http://h:8000/models/a/v1", "http://h:8000/models/a"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_urls_are_taken_with_and_without_their_last_part(url, address):
    assert Endpoint.parse(url).address == address
