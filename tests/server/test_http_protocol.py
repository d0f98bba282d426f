"""What a client may do before its request has a body: all of it costs the server a bounded time and memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from vashista.server import http_protocol
from vashista.server.http_protocol import MAX_HEAD_BYTES, STALLED, HttpProtocol

BODY = b'{"a": "b"}'
POST = b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n"
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(scope, receive, send) -> None:
    """Answers with the path and the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    reply = json.dumps([scope["path"], body.decode()]).encode()
    headers = [(b"content-length", str(len(reply)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": reply})


class Endless:
    """Answers without end until its client is gone; then `ended` has the request's state."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()

    async def __call__(self, scope, receive, send) -> None:
        gone = asyncio.ensure_future(self._wait(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
        self.ended.set_result(scope["state"])

    @staticmethod
    async def _wait(receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


async def connect_slowly(address) -> socket.socket:
    """A client whose kernel takes little for it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, address)
    return client


@contextlib.asynccontextmanager
async def serving(app, **options) -> AsyncIterator[tuple[str, int]]:
    """Serve an application on a free port; its address."""
    config = uvicorn.Config(app, http=HttpProtocol, ws="none", lifespan="off", log_config=None)
    config.load()
    state, loop = ServerState(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: HttpProtocol(config, state, {}, **options), "127.0.0.1", 0)
    async with asyncio.timeout(30):
        yield server.sockets[0].getsockname()
        server.close()
        while state.connections:
            await asyncio.sleep(0.01)


def run_with(talk: Talk) -> None:
    """Serve `echo` on a free port while `talk` is a client."""

    async def run() -> None:
        async with serving(echo) as address:
            reader, writer = await asyncio.open_connection(*address)
            await talk(reader, writer)
            writer.close()

    asyncio.run(run())


async def reply_of(reader: asyncio.StreamReader) -> tuple[int, object]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


def test_requests_one_after_the_other_and_in_one_piece_are_answered():
    async def talk(reader, writer):
        for _ in range(2):
            writer.write(POST + b"\r\n" + BODY)
            assert await reply_of(reader) == (200, ["/x", BODY.decode()])
        writer.write((POST + b"\r\n" + BODY) * 3)
        for _ in range(3):
            assert await reply_of(reader) == (200, ["/x", BODY.decode()])
        for byte in POST + b"\r\n" + BODY:
            writer.write(bytes([byte]))
            await writer.drain()
        assert await reply_of(reader) == (200, ["/x", BODY.decode()])

    run_with(talk)


@pytest.mark.parametrize(
    "endless",
    [
        pytest.param((b"GET /", b"a" * 4096), id="path"),
        pytest.param((b"GET / HTTP/1.1\r\nX: ", b"a" * 4096), id="one header"),
        pytest.param((b"GET / HTTP/1.1\r\n", b"X: " + b"a" * 1000 + b"\r\n"), id="many headers"),
        pytest.param((b"GET / HTTP/1.1\r\n" + b"X", b"y" * 4096), id="header name"),
    ],
)
def test_a_head_without_end_is_refused_soon(endless):
    async def talk(reader, writer):
        start, part = endless
        writer.write(start)
        num_bytes, refusal = 0, asyncio.create_task(reply_of(reader))
        while not refusal.done():
            assert num_bytes < 4 << 20, "it still listens"
            writer.write(part)
            num_bytes += len(part)
            await asyncio.sleep(0)
        status, body = refusal.result()
        assert (status, body["error"]["code"]) == (400, "invalid_request")
        assert str(MAX_HEAD_BYTES) in body["error"]["message"]

    run_with(talk)


@pytest.mark.parametrize("pieces", [1, 2, 99])
@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_the_body_of_a_request_that_offers_an_upgrade_is_read(protocol, pieces):
    async def talk(reader, writer):
        offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + protocol + b"\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
        request = POST + offer + b"\r\n" + BODY
        step = -(-len(request) // pieces)
        for _ in range(2):
            for start in range(0, len(request), step):
                writer.write(request[start : start + step])
                await writer.drain()
            assert await reply_of(reader) == (200, ["/x", BODY.decode()])

    run_with(talk)


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02", b"GET /\xff HTTP/1.1\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n"])
def test_what_is_not_a_request_gets_an_error_in_the_form_of_all_others(data):
    async def talk(reader, writer):
        writer.write(data)
        status, body = await reply_of(reader)
        assert (status, body["error"]["code"]) == (400, "invalid_request")
        assert await reader.read() == b""

    run_with(talk)


CHUNKED = b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_chunks_with_more_around_them_than_in_them_are_refused_soon():
    async def talk(reader, writer):
        writer.write(CHUNKED + b"2;")
        num_bytes, refusal = 0, asyncio.create_task(reply_of(reader))
        while not refusal.done():
            assert num_bytes < 4 << 20, "it still listens"
            writer.write(b"a" * 4096)
            num_bytes += 4096
            await asyncio.sleep(0)
        status, body = refusal.result()
        assert (status, body["error"]["code"]) == (400, "invalid_request")
        assert "chunks" in body["error"]["message"]

    run_with(talk)


def test_a_body_in_chunks_of_one_byte_is_read():
    async def talk(reader, writer):
        for _ in range(2):
            writer.write(CHUNKED)
            for _ in range(200):
                writer.write(b"1\r\na\r\n" * 200)
                await asyncio.sleep(0)
            writer.write(b"0\r\n\r\n")
            assert await reply_of(reader) == (200, ["/x", "a" * 40_000])

    run_with(talk)


@pytest.mark.parametrize("head", [POST + b"\r\n", CHUNKED], ids=["length", "chunks"])
def test_a_body_that_trickles_is_cut_off(head, monkeypatch):
    monkeypatch.setattr(http_protocol, "BODY_TIMEOUT_S", 0.2)

    async def talk(reader, writer):
        writer.write(head)
        end = asyncio.create_task(reader.read())
        part = b"{" if head != CHUNKED else b"1\r\n \r\n"
        for _ in range(8):
            writer.write(part)
            await asyncio.sleep(0.1)
            if end.done():
                break
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(end, 5) == b""

    run_with(talk)


def test_a_large_body_may_take_longer_than_a_trickling_one(monkeypatch):
    monkeypatch.setattr(http_protocol, "BODY_TIMEOUT_S", 0.2)
    monkeypatch.setattr(http_protocol, "MIN_BODY_BYTES", 1000)

    async def talk(reader, writer):
        writer.write(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 20000\r\n\r\n")
        for _ in range(10):
            writer.write(b"a" * 2000)
            await asyncio.sleep(0.1)
        assert await reply_of(reader) == (200, ["/x", "a" * 20_000])
        await asyncio.sleep(0.5)  # idle between two requests is no trickling
        writer.write(POST + b"\r\n" + BODY)
        assert await reply_of(reader) == (200, ["/x", BODY.decode()])

    run_with(talk)


@pytest.mark.parametrize("behind", [1, 20])
def test_a_client_that_leaves_is_noticed_by_the_request_that_runs_also_where_others_wait_behind_it(behind):
    """uvicorn tells the last one alone: the one that ran went on for nobody, and then wrote to a closed connection."""

    async def talk():
        app = Endless()
        async with serving(app) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write((POST + b"\r\n" + BODY) * (1 + behind))
            await reader.read(100)
            writer.close()
            await app.ended

    asyncio.run(talk())


def test_garbage_behind_a_request_is_not_answered_in_its_place():
    async def slow(scope, receive, send):
        await asyncio.sleep(0.1)
        await echo(scope, receive, send)

    async def talk():
        async with serving(slow) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(POST + b"\r\n" + BODY + b"\x16\x03\x01 nonsense\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()

    asyncio.run(talk())


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\nX: a"])
def test_a_connection_that_never_completes_a_head_is_closed(data, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.1)

    async def talk(reader, writer):
        writer.write(data)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""

    run_with(talk)


def test_a_connection_between_two_requests_may_be_idle_for_longer(monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.1)

    async def talk(reader, writer):
        for _ in range(2):
            writer.write(POST + b"\r\n" + BODY)
            assert await reply_of(reader) == (200, ["/x", BODY.decode()])
            await asyncio.sleep(0.3)

    run_with(talk)


LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


@LOOPS
def test_a_client_that_reads_nothing_of_an_endless_reply_is_cut_off(new_loop):
    async def run() -> None:
        app = Endless()
        async with serving(app, write_timeout_s=0.2) as address:
            client = await connect_slowly(address)
            client.send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
            assert (await asyncio.wait_for(app.ended, 10))[STALLED] == 0.2
            client.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


@LOOPS
def test_a_client_that_reads_slowly_but_reads_is_served(new_loop):
    async def run() -> None:
        loop, app = asyncio.get_running_loop(), Endless()
        async with serving(app, write_timeout_s=0.4) as address:
            client = await connect_slowly(address)
            client.send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
            end_s = loop.time() + 2.0
            while loop.time() < end_s:
                await asyncio.sleep(0.05)
                assert await asyncio.wait_for(loop.sock_recv(client, 1 << 18), 5)
            client.close()
            assert STALLED not in await asyncio.wait_for(app.ended, 10)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


@LOOPS
def test_a_reply_that_is_written_but_never_read_does_not_keep_its_connection(new_loop):
    async def run() -> None:
        written = asyncio.Event()

        async def whole(scope, receive, send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body", "body": b"x" * (32 << 20)})
            written.set()

        async with serving(whole, write_timeout_s=0.2) as address:  # waits at its end for the connection's
            client = await connect_slowly(address)
            client.send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
            await written.wait()
        client.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())
