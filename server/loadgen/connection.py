"""HTTP/1.1 connections of the load generator: one exchange at a time, body pieces handed over as they arrive.

Owned by `client.py`, which gives each exchange a sink. This client stamps each read of the socket before anything else
happens, and does nothing else but parse, since the client's own work would blur gaps of a few milliseconds. Measured by
bench/loadgen_overhead.py (64 streams, a chunk each 10 ms, sender on the same two cores; EPYC, 2026-11): 30 us of CPU a
chunk and gaps wrong by 0.17 ms at p50, 1.2 ms at p99; httpx 102 us, 0.55 ms and 4.2 ms. One stream: 0.02 and 0.10 ms.
Times are `time.perf_counter()`.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Protocol
from urllib.parse import urlsplit

import httptools
import msgspec

from vashista.engine.errors import WorkloadError


class Sink(Protocol):
    """Receives one reply. Called from the event loop; must not block or raise."""

    def head(self, status: int) -> None:
        """The status line and the headers are complete."""

    def data(self, piece: bytes, time_s: float) -> None:
        """A piece of the body, read from the socket at `time_s`."""


class Endpoint(msgspec.Struct, frozen=True):
    """Where the server is: a parsed base URL, and a Unix socket to use instead of its host and port."""

    host: str
    port: int
    is_tls: bool
    prefix: str
    uds: str | None = None
    ca_file: str | None = None

    @classmethod
    def parse(cls, url: str, *, uds: str | None = None, ca_file: str | None = None) -> Endpoint:
        """Parse a base URL such as http://127.0.0.1:8000; a path is kept, a final /v1 is dropped."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise WorkloadError(f"the URL {url!r} is not valid: {error}", param="url") from error
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise WorkloadError(
                f"the URL {url!r} is not of the form http://HOST:PORT or https://HOST:PORT", param="url"
            )
        if parts.query or parts.fragment or parts.username or parts.password:
            raise WorkloadError(f"the URL {url!r} must end after its path; give keys with --api-key", param="url")
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if is_tls else 80), is_tls, prefix, uds, ca_file)

    @property
    def address(self) -> str:
        """The address for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        url = f"{'https' if self.is_tls else 'http'}://{host}:{self.port}{self.prefix}"
        return f"{url} (socket {self.uds})" if self.uds else url

    def tls_context(self) -> ssl.SSLContext | None:
        """Verify the server's certificate by the system's authorities, or by `ca_file` alone."""
        if not self.is_tls:
            return None
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise WorkloadError(f"the CA file {self.ca_file!r} cannot be read: {error}", param="ca_file") from error


class BrokenReplyError(Exception):
    """The connection ended, or stopped being HTTP, before the reply was complete."""

    def __init__(self, message: str, *, is_untouched: bool) -> None:
        super().__init__(message)
        self.is_untouched = is_untouched
        """No byte of a reply had arrived: on a reused connection the server had merely closed it while idle."""


class Connection(asyncio.Protocol):
    """One connection. Used by one request at a time; `is_reusable` says whether another one may follow."""

    def __init__(self) -> None:
        self.num_exchanges = 0
        self.is_reusable = False
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._sink: Sink | None = None
        self._done: asyncio.Future[None] | None = None
        self._time_s = 0.0
        self._has_bytes = False
        self._has_head = False
        self._has_framing = False

    async def exchange(self, request: bytes, sink: Sink) -> None:
        """Send one request and feed the sink until its reply is complete. Raises BrokenReplyError."""
        assert self._done is None
        assert self._transport is not None
        self._sink, self._done = sink, asyncio.get_running_loop().create_future()
        self._has_bytes = self._has_head = self._has_framing = self.is_reusable = False
        self.num_exchanges += 1
        if self._transport.is_closing():
            raise BrokenReplyError("the server had closed the connection", is_untouched=True)
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._sink = self._done = None

    def close(self) -> None:
        """Close without waiting; the server sees the client go away."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._time_s = time.perf_counter()
        self._has_bytes = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the reply is not HTTP/1.1: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_reusable = False
        if self._has_head and not self._has_framing and exc is None:
            self._complete()  # a body without length or chunks ends with its connection
        else:
            self._fail(f"the connection was lost: {exc or 'closed by the server'}")

    # the parser's callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        """A reply with either header says itself where it ends."""
        if name.lower() in {b"content-length", b"transfer-encoding"}:
            self._has_framing = True

    def on_headers_complete(self) -> None:
        """Tell the sink the status."""
        status = self._parser.get_status_code()
        if status >= 200 and self._sink is not None:
            self._has_head = True
            self._sink.head(status)

    def on_body(self, piece: bytes) -> None:
        """Hand over a piece with the time its bytes were read."""
        if self._sink is not None:
            self._sink.data(piece, self._time_s)

    def on_message_complete(self) -> None:
        """The reply is whole; interim 1xx replies are passed over."""
        if self._has_head:
            self.is_reusable = self._parser.should_keep_alive()
            self._complete()

    def _complete(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, message: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(BrokenReplyError(message, is_untouched=not self._has_bytes))


class ConnectionPool:
    """Keeps idle connections for reuse, as OpenAI's own clients do. One pool serves one event loop."""

    def __init__(self, endpoint: Endpoint, *, api_key: str | None) -> None:
        self.endpoint = endpoint
        self._tls = endpoint.tls_context()
        self._idle: list[Connection] = []
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        lines = [f"Host: {host}:{endpoint.port}", "User-Agent: vashista-bench", "Accept: */*"]
        if api_key is not None:
            if not api_key.isascii() or not api_key.isprintable():
                raise WorkloadError("the API key has characters that a header cannot carry", param="api_key")
            lines.append(f"Authorization: Bearer {api_key}")
        self._headers = "\r\n".join(lines)

    async def request(self, method: str, path: str, body: bytes | None, sink: Sink) -> None:
        """One exchange. Raises OSError when no connection can be made, BrokenReplyError when it breaks."""
        head = f"{method} {self.endpoint.prefix}{path} HTTP/1.1\r\n{self._headers}\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        request = f"{head}\r\n".encode() + (body or b"")
        while True:
            connection = self._idle.pop() if self._idle else await self._connect()
            try:
                await connection.exchange(request, sink)
            except BrokenReplyError as error:
                if error.is_untouched and connection.num_exchanges > 1:
                    continue  # the server closed it while idle: nothing was processed
                raise
            finally:
                if connection.is_reusable:
                    self._idle.append(connection)
                else:
                    connection.close()
            return

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        if self.endpoint.uds is not None:
            _, connection = await loop.create_unix_connection(Connection, self.endpoint.uds)
            return connection
        _, connection = await loop.create_connection(Connection, self.endpoint.host, self.endpoint.port, ssl=self._tls)
        return connection
