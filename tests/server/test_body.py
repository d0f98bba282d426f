"""Reading bodies: whatever the bytes are, the result is an object or a named error."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from vashista.engine.errors import BodyTooDeepError, InvalidBodyError, UnknownFieldError
from vashista.server.body import BIG_BODY_BYTES, MANY_VALUES, MAX_DEPTH, Bodies, decode_object
from vashista.server.schemas.tokens import TokenizeRequest

MANY = 1 << 17


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_an_object_comes_out_as_it_went_in():
    assert decode_object(b'{"a": [1, -2.5, "\xc3\xa9", null, {"b": true}]}') == {"a": [1, -2.5, "é", None, {"b": True}]}


def test_64_levels_are_read_and_65_are_not():
    assert decode_object(nested(MAX_DEPTH))
    with pytest.raises(BodyTooDeepError):
        decode_object(nested(MAX_DEPTH + 1))


@pytest.mark.parametrize(
    "body", [b"", b" ", b"1", b'"x"', b"{}x", b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"{'a': 1}"]
)
def test_what_is_not_one_json_object_is_refused(body):
    with pytest.raises(InvalidBodyError):
        decode_object(body)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_random_bytes_never_raise_anything_else(body):
    with contextlib.suppress(InvalidBodyError, BodyTooDeepError):
        assert isinstance(decode_object(body), dict)


Value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=5), Value, max_size=4))
def test_any_object_survives(value):
    assert decode_object(json.dumps(value).encode()) == value


def test_of_requests_that_come_at_once_each_lets_everything_else_run_before_the_next():
    """Two thousand of them kept /health from answering for as long as all of theirs took together."""

    async def receive():
        return {"type": "http.request", "body": b'{"prompt": "It was"}', "more_body": False}

    def choose(value):
        seen.append(rounds)
        return TokenizeRequest

    async def others():
        nonlocal rounds
        while len(seen) < 50:
            rounds += 1
            await asyncio.sleep(0)

    async def play():
        bodies = Bodies(1024, MANY)
        headers = [(b"content-type", b"application/json")]
        requests = [
            Request({"type": "http", "method": "POST", "headers": headers, "state": {}}, receive) for _ in range(50)
        ]
        await asyncio.gather(*(bodies.read_as(request, choose) for request in requests), others())

    rounds, seen = 0, []
    asyncio.run(play())
    assert len(set(seen)) == len(seen) == 50


def test_large_bodies_are_parsed_one_at_a_time():
    """Parsing keeps the interpreter to itself: a dozen at once halted every stream for as long as all of them took."""
    inside, most = [], []
    body = b'{"prompt": "' + b"a" * BIG_BODY_BYTES + b'"}'

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    def choose(value):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return TokenizeRequest

    async def play():
        bodies = Bodies(1 << 20, MANY)
        headers = [(b"content-type", b"application/json")]
        requests = [
            Request({"type": "http", "method": "POST", "headers": headers, "state": {}}, receive) for _ in range(6)
        ]
        await asyncio.gather(*(bodies.read_as(request, choose) for request in requests))

    asyncio.run(play())
    assert most == [1] * 6


@pytest.mark.parametrize(("num_lists", "is_beside"), [(100, False), (MANY_VALUES, True)])
def test_bodies_of_many_values_are_parsed_beside_the_event_loop_however_small(num_lists, is_beside):
    threads = []
    body = json.dumps({"prompt": "It was", "lists": [[]] * num_lists}).encode()

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    def choose(value):
        threads.append(threading.current_thread())
        return TokenizeRequest

    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "method": "POST", "headers": headers, "state": {}}, receive)
    with pytest.raises(UnknownFieldError):
        asyncio.run(Bodies(1 << 20, MANY).read_as(request, choose))
    assert (threads[0] is not threading.main_thread()) == is_beside


def test_a_request_whose_client_has_left_while_others_had_their_turn_is_not_parsed():
    messages = [{"type": "http.request", "body": b'{"prompt": "It was"}', "more_body": False}]

    async def receive():
        return messages.pop() if messages else {"type": "http.disconnect"}

    def choose(value):
        raise AssertionError("nobody waits for it")

    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "method": "POST", "headers": headers, "state": {}}, receive)
    with pytest.raises(ClientDisconnect):
        asyncio.run(Bodies(1024, MANY).read_as(request, choose))


def test_a_large_body_whose_client_leaves_while_others_are_parsed_is_not():
    body = b'{"prompt": "' + b"a" * BIG_BODY_BYTES + b'"}'
    headers = [(b"content-type", b"application/json")]
    has_left = False

    def choose(value):
        nonlocal has_left
        has_left = True  # while the first one is parsed
        return TokenizeRequest

    def request(*, leaves):
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            while not (leaves and has_left):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        return Request({"type": "http", "method": "POST", "headers": headers, "state": {}}, receive)

    def refuse(value):
        raise AssertionError("nobody waits for it")

    async def play():
        bodies = Bodies(1 << 20, MANY)
        stays, left = (bodies.read_as(request(leaves=False), choose), bodies.read_as(request(leaves=True), refuse))
        return await asyncio.gather(stays, left, return_exceptions=True)

    parsed, error = asyncio.run(play())
    assert isinstance(parsed, TokenizeRequest)
    assert isinstance(error, ClientDisconnect)
