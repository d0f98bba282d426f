"""HTTP/1.1 on one connection: uvicorn's parser, with bounds on what comes before a request's body.

`server/http.py` gives it to uvicorn. uvicorn itself would collect request lines and headers without end, before any
key is checked, would keep a connection that never sends a request for ever, and would lose the body of a request that
offers an upgrade (as Java's HTTP client does, for HTTP/2).
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vashista.engine.errors import InvalidRequestError
from vashista.server.openai_errors import encode_error

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers together. A little more may be read before it is noticed, never without end."""
HEAD_TIMEOUT_S = 60.0
"""From the first byte of a request, or the start of the connection, to the end of the headers."""
UPGRADE_HEADERS = frozenset({b"connection", b"upgrade", b"http2-settings"})


class HttpProtocol(HttpToolsProtocol):
    """One client's connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reads_head = False
        self._num_head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client has connected; it has a while to send its first request."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed, by whomever."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        self._unset_keepalive_if_required()
        was_in_head = self._reads_head
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(str(cause) if isinstance(cause, _HeadTooLargeError) else "The request is not valid HTTP/1.1.")
            return
        if was_in_head and self._reads_head:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refuse(str(_HeadTooLargeError()))

    def on_message_begin(self) -> None:
        """The parser saw the first byte of a request."""
        super().on_message_begin()
        self._reads_head = True
        self._num_head_bytes = 0
        self._await_head()

    def on_url(self, url: bytes) -> None:
        """The parser read the request line, or a part of it."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser read a header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The parser read the empty line behind the headers."""
        if self.parser.should_upgrade():
            return  # `_feed` starts over without the offer
        self._end_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The parser read the end of the body."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        """Give bytes to the parser. An offer to upgrade is taken out of the request, which a server may ignore."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            if method == b"CONNECT":
                self._refuse("CONNECT is not possible: this server is no proxy.")
                return
            head = [method + b" " + self.url + b" HTTP/" + version]
            head += [name + b": " + value for name, value in self.headers if name not in UPGRADE_HEADERS]
            self.parser = httptools.HttpRequestParser(self)
            self._feed(b"\r\n".join(head) + b"\r\n\r\n" + data[upgrade.args[0] :])

    def _count(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES:
            raise _HeadTooLargeError()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _end_head(self) -> None:
        self._reads_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, message: str) -> None:
        """Answer 400 and close."""
        self._end_head()
        body = encode_error(InvalidRequestError(message), None)
        head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()


class _HeadTooLargeError(Exception):
    def __str__(self) -> str:
        return f"Request line and headers are larger than {MAX_HEAD_BYTES} bytes; no more are accepted."
