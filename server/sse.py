"""Server-sent events to one client: chunks as they come, errors as events, an end at once when the client leaves.

The completion routes return a `StreamResponse` for `stream: true`. It sends nothing before the engine's first event, so
that a request which fails until then still gets a proper status. `run_until_disconnect` serves the other replies too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vashista.engine.errors import VashistaError
from vashista.engine.messages import TokenEvent
from vashista.server.account import account_of
from vashista.server.endpoint import request_id_of
from vashista.server.generation import Generation
from vashista.server.metrics import Metrics
from vashista.server.openai_errors import internal_error
from vashista.server.reply import written

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class Chunks(Protocol):
    """How a route writes its stream."""

    def encode(self, index: int, event: TokenEvent) -> bytes:
        """The SSE events for one event of the engine; b"" when there is nothing to tell."""

    def end(self, generation: Generation) -> bytes:
        """What follows the last event, `[DONE]` included."""

    def error(self, error: VashistaError, request_id: str | None) -> bytes:
        """The SSE event of an error in the middle of the stream, and what follows it."""


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes away; then ClientDisconnect."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamResponse(Response):
    """Streams a generation and closes it, whatever happens."""

    def __init__(self, generation: Generation, chunks: Chunks, metrics: Metrics, request: Request) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._generation = generation
        self._chunks = chunks
        self._metrics = metrics
        self._account = account_of(request)
        self._request_id = request_id_of(request)
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what fails before the first event; afterwards errors go into the stream."""
        with self._generation:
            try:
                await run_until_disconnect(receive, self._stream(send, scope["state"]["send"]))
            except ClientDisconnect:
                self._account.leave()
                # Once the reply has begun there is nothing to answer any more, and nobody to read it.
                if not self._has_begun:
                    raise

    async def _stream(self, send: Send, send_chunk: Send) -> None:
        """send_chunk: the server's own `send`; a token's way through the middleware was a third of its cost."""
        news = await self._generation.next_events()
        self._has_begun = self._account.is_streamed = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            while news:
                data = await written(partial(self._encode, news), [event for _, event in news])
                if data:
                    await send_chunk({"type": "http.response.body", "body": data, "more_body": True})
                news = await self._generation.next_events()
            last = await self._end(None)
        except VashistaError as error:
            last = await self._end(error)
        except OSError:
            raise
        except Exception:
            logger.exception("unexpected error in a stream")
            last = await self._end(internal_error(self._request_id))
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _encode(self, news: Sequence[tuple[int, TokenEvent]]) -> bytes:
        return b"".join([self._chunks.encode(index, event) for index, event in news])

    async def _end(self, error: VashistaError | None) -> bytes:
        """The last bytes, once the receipt is on disk. Without one the stream ends with the ledger's error."""
        last = self._chunks.end(self._generation) if error is None else b""
        self._generation.close()
        if error is not None:
            self._account.fail(error)
        error = await self._account.settle() or error
        if error is None:
            return last
        self._metrics.count_refusal(error)
        return self._chunks.error(error, self._request_id)
