"""HTTP/1.1 on one connection: uvicorn's parser, with bounds on how, and how slowly, a request may come.

`server/http.py` gives it to uvicorn. uvicorn itself would collect request lines and headers without end, before any
key is checked, would keep a connection that never sends a request, never ends its body or never reads its reply for
ever, and would lose the body of a request that offers an upgrade (as Java's HTTP client does, for HTTP/2).
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from vashista.engine.errors import InvalidRequestError
from vashista.server.openai_errors import encode_error
from vashista.server.visitors import Visitors

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers together. A little more may be read before it is noticed, never without end."""
HEAD_TIMEOUT_S = 60.0
"""From the first byte of a request, or the start of the connection, to the end of the headers."""
BODY_TIMEOUT_S = 60.0
MIN_BODY_BYTES = 64 << 10
"""So much of a body that is not complete has to come in each BODY_TIMEOUT_S: 1 KiB a second."""
MAX_CHUNK_RATIO = 8
"""Bytes of chunk sizes and extensions for each byte of body, besides MAX_HEAD_BYTES: a byte a chunk has five."""
WRITE_TIMEOUT_S = 60.0
STALLED = "stalled_s"
"""The name in a request's state under which stand the seconds in which its client read nothing, before it was cut."""
UPGRADE_HEADERS = frozenset({b"connection", b"upgrade", b"http2-settings"})


class HttpProtocol(HttpToolsProtocol):
    """One client's connection."""

    def __init__(
        self, *args: Any, write_timeout_s: float = WRITE_TIMEOUT_S, visitors: Visitors | None = None, **kwargs: Any
    ) -> None:
        """`write_timeout_s`: so long the client may read nothing while bytes wait for it. `visitors`: who may come."""
        super().__init__(*args, **kwargs)
        self._visitors = visitors
        self._write_timeout_s = write_timeout_s
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_unread = 0
        self._reads_head = False
        self._num_head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._reads_body = False
        self._num_body_bytes = 0
        self._num_wire_bytes = 0
        self._num_body_before = 0
        self._body_timer: asyncio.TimerHandle | None = None
        self._is_retired = False
        self._running: RequestResponseCycle | None = None
        """The request that is answered, or was last; `cycle` is the one that came last, which may wait behind it."""

    @property
    def is_new(self) -> bool:
        """Whether the client has not asked anything yet."""
        return self.cycle is None

    @property
    def is_answering(self) -> bool:
        """Whether a request has begun whose reply is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def retire(self) -> None:
        """Give one more reply at most: idle connections close now, others behind the reply that is due or next."""
        self._is_retired = True
        if self.is_new or self._reads_head:
            return
        self.shutdown()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client has connected; it has a while to send its first request."""
        super().connection_made(transport)
        if self._visitors is not None and not self._visitors.may_come(transport.get_extra_info("peername")):
            transport.abort()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed, by whomever."""
        self._end_head()
        self._end_body()
        self._end_write_watch()
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn tells the request that came last alone
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        self._unset_keepalive_if_required()
        was_in_head, was_in_body = self._reads_head, self._reads_body
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

        if was_in_body and self._reads_body:
            self._num_wire_bytes += len(data)
            if self._num_wire_bytes > MAX_HEAD_BYTES + (1 + MAX_CHUNK_RATIO) * self._num_body_bytes:
                self._refuse("The sizes and extensions of the chunks are too long for what they hold.")

    def pause_writing(self) -> None:
        """More than 64 KiB wait for the client: `send` waits with them."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """The client has read most of it."""
        super().resume_writing()
        self._end_write_watch()

    def on_response_complete(self) -> None:
        """The application has written its reply; some of it may still wait for the client."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._watch_writing()

    def on_message_begin(self) -> None:
        """The parser saw the first byte of a request."""
        super().on_message_begin()
        if self._write_timer is not None:
            self._watch_writing()  # who sends the next request is alive
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
        self._reads_body = True
        self._num_body_bytes = self._num_wire_bytes = self._num_body_before = 0
        self._watch_body()
        super().on_headers_complete()
        if self._is_retired:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """The parser read a part of the body."""
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The parser read the end of the body."""
        if not self.parser.should_upgrade():
            self._end_body()
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

    def _watch_writing(self) -> None:
        """Look again after a while whether the client has read anything."""
        self._end_write_watch()
        self._num_unread = self._count_unread()
        self._write_timer = self.loop.call_later(self._write_timeout_s, self._check_writing)

    def _check_writing(self) -> None:
        """Cut the client off if it has read nothing."""
        self._write_timer = None
        is_complete = self._running is None or self._running.response_complete
        if not is_complete and not self.flow.write_paused:
            return  # a reply is being written again: `pause_writing` watches it
        # Nothing was written meanwhile, so that fewer waiting bytes are bytes that were read.
        if not self.transport.get_write_buffer_size():
            return
        if self._count_unread() < self._num_unread:
            self._watch_writing()
            return
        if self._running is not None and not is_complete:
            self._running.scope["state"][STALLED] = self._write_timeout_s
        self.transport.abort()

    def _count_unread(self) -> int:
        """Bytes that the client has not taken, those in the kernel's queue too: it holds megabytes, and our buffer
        shrinks only when a good part of that has gone."""
        sock = self.transport.get_extra_info("socket")
        in_kernel = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(in_kernel, sys.byteorder)

    def _end_write_watch(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _end_head(self) -> None:
        self._reads_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _watch_body(self) -> None:
        self._body_timer = self.loop.call_later(BODY_TIMEOUT_S, self._check_body)

    def _check_body(self) -> None:
        """Cut off a client that sends next to nothing; not one that has to wait for us."""
        num_new = self._num_body_bytes - self._num_body_before
        if num_new < MIN_BODY_BYTES and not self.flow.read_paused:
            self._body_timer = None
            self.transport.abort()
            return
        self._num_body_before = self._num_body_bytes
        self._watch_body()

    def _end_body(self) -> None:
        self._reads_body = False
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _refuse(self, message: str) -> None:
        """Answer 400 and close; where an answer has begun, or a request before this one has none yet, close alone."""
        running = self._running
        is_behind = self._reads_head or running is not self.cycle
        self._end_head()
        self._end_body()
        if running is not None and not running.response_complete and (running.response_started or is_behind):
            self.transport.abort()
            return
        body = encode_error(InvalidRequestError(message), None)
        head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()


class _HeadTooLargeError(Exception):
    def __str__(self) -> str:
        return f"Request line and headers are larger than {MAX_HEAD_BYTES} bytes; no more are accepted."
