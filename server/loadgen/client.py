"""The OpenAI side of the load generator: builds request bodies, reads replies and streams, makes an Outcome of each.

`runner.py` calls `OpenAIClient.send` for every request of a load; `target.py` uses `fetch` to look at the server first.
The socket is read by `connection.py`. Cost per streamed chunk, this file included: see bench/loadgen_overhead.py.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from vashista.engine.errors import ServerUnreachableError, UnexpectedReplyError
from vashista.server.loadgen.connection import BrokenReplyError, ConnectionPool
from vashista.server.loadgen.outcome import Outcome


class Prompt(msgspec.Struct, frozen=True):
    """One prompt and how much it asks for. Exactly one of `text` and `messages` is set."""

    max_tokens: int
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    num_tokens_asked: int | None = None


class RequestShape(msgspec.Struct, frozen=True, kw_only=True):
    """What all requests of a run have in common."""

    model: str
    endpoint: str
    """completions or chat."""
    is_streaming: bool = True
    ignore_eos: bool = True
    has_usage: bool = True
    """Ask for usage in streams (stream_options)."""
    temperature: float = 0.0
    extra_body: dict[str, Any] = {}

    @property
    def path(self) -> str:
        """Path of the endpoint."""
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def body(self, prompt: Prompt) -> bytes:
        """The JSON body for one prompt; `extra_body` wins over the other fields."""
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": prompt.max_tokens,
            "temperature": self.temperature,
            "stream": self.is_streaming,
        }
        if self.endpoint == "chat":
            fields["messages"] = prompt.messages or [{"role": "user", "content": prompt.text}]
        else:
            fields["prompt"] = prompt.text
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.is_streaming and self.has_usage:
            fields["stream_options"] = {"include_usage": True}
        return msgspec.json.encode(fields | self.extra_body)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        """A token arrived: text of a completion, or content or reasoning of a chat."""
        delta = self.delta
        if delta is not None:
            return bool(delta.content or delta.reasoning_content or delta.reasoning)
        return bool(self.text)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class ReplyReader:
    """The sink of one request: turns body pieces into the times and counts of its Outcome."""

    def __init__(self, outcome: Outcome, *, is_streaming: bool, origin_s: float) -> None:
        self.outcome = outcome
        self._is_streaming = is_streaming
        self._origin_s = origin_s
        self._buffer = b""
        self._is_done = False
        self._last_s = 0.0

    def head(self, status: int) -> None:
        """Note the status; only a 200 can be a stream."""
        self.outcome.status = status
        if status != 200:
            self._is_streaming = False

    def data(self, piece: bytes, time_s: float) -> None:
        """Take the whole events out of what has arrived; keep the rest."""
        self._last_s = time_s - self._origin_s
        self._buffer += piece
        if not self._is_streaming or self.outcome.error_code is not None:
            return
        if b"\r\n" in self._buffer:
            self._buffer = self._buffer.replace(b"\r\n", b"\n")
        *events, self._buffer = self._buffer.split(b"\n\n")
        for event in events:
            self._read_event(event)

    def finish(self) -> None:
        """The reply is complete: decide whether it was a success."""
        outcome = self.outcome
        if outcome.error_code is not None:
            return
        if outcome.status != 200:
            self._read_error()
        elif self._is_streaming:
            if not self._is_done and outcome.finish_reason is None:
                tail = self._excerpt() or "nothing after the last event"
                self.fail("incomplete_stream", f"the stream ended without finish_reason and [DONE]; left over: {tail}")
        else:
            self._read_whole()
        if outcome.error_code is None:
            outcome.end_s = self._last_s
            if not outcome.is_counted_by_usage:
                outcome.num_output_tokens = len(outcome.token_times_s)

    def fail(self, code: str, message: str) -> None:
        """Record the failure; the first one stands."""
        if self.outcome.error_code is None:
            self.outcome.error_code, self.outcome.error_message = code, message[:500]

    def _read_event(self, event: bytes) -> None:
        for line in event.split(b"\n"):
            if not line.startswith(b"data:"):
                continue  # comments and event names carry nothing that data lines lack
            data = line[5:].strip()
            if data == b"[DONE]":
                self._is_done = True
            elif data:
                self._read_chunk(data)

    def _read_chunk(self, data: bytes) -> None:
        chunk = self._decode(data)
        if chunk is None:
            return
        if chunk.error is not None:
            code, message = _error_of(chunk.error)
            self.fail(code or "stream_error", message)
            return
        outcome = self.outcome
        has_text = False
        for choice in chunk.choices:
            has_text = has_text or choice.has_text
            outcome.finish_reason = choice.finish_reason or outcome.finish_reason
        if has_text:
            if outcome.first_token_s is None:
                outcome.first_token_s = self._last_s
            outcome.token_times_s.append(self._last_s)
        if chunk.usage is not None:
            self._read_usage(chunk.usage)

    def _read_whole(self) -> None:
        chunk = self._decode(self._buffer)
        if chunk is None:
            return
        if chunk.error is not None or not chunk.choices:
            self.fail("unexpected_reply", f"the reply has no choices: {self._excerpt()}")
            return
        self.outcome.finish_reason = chunk.choices[0].finish_reason
        if chunk.usage is not None:
            self._read_usage(chunk.usage)

    def _read_usage(self, usage: _Usage) -> None:
        outcome = self.outcome
        if usage.completion_tokens is not None:
            outcome.num_output_tokens = usage.completion_tokens
            outcome.is_counted_by_usage = True
        outcome.num_prompt_tokens = usage.prompt_tokens
        if usage.prompt_tokens_details is not None:
            outcome.num_cached_tokens = usage.prompt_tokens_details.cached_tokens

    def _read_error(self) -> None:
        try:
            reply = msgspec.json.decode(self._buffer)
        except msgspec.DecodeError:
            reply = None
        error = reply.get("error", reply) if isinstance(reply, dict) else self._excerpt()
        code, message = _error_of(error)
        self.fail(f"{self.outcome.status} {code}" if code else str(self.outcome.status), message)

    def _decode(self, data: bytes) -> _Chunk | None:
        try:
            return _decode_chunk(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.fail("unexpected_reply", f"not an OpenAI reply ({error}): {data[:200].decode(errors='replace')}")
            return None

    def _excerpt(self) -> str:
        return self._buffer[:200].decode(errors="replace")


def _error_of(error: Any) -> tuple[str | None, str]:
    """(code, message) of an OpenAI error object, or of whatever stands in its place."""
    if not isinstance(error, dict):
        return None, str(error)
    code = error.get("code") or error.get("type")
    return (None if code is None else str(code)), str(error.get("message", error))


class OpenAIClient:
    """Sends requests to one server. One client serves one event loop."""

    def __init__(self, pool: ConnectionPool, *, timeout_s: float) -> None:
        self.pool = pool
        self._timeout_s = timeout_s

    async def send(self, shape: RequestShape, prompt: Prompt, outcome: Outcome, *, origin_s: float) -> None:
        """Send one request now and complete `outcome`. Failures are recorded in it, never raised."""
        reader = ReplyReader(outcome, is_streaming=shape.is_streaming, origin_s=origin_s)
        outcome.max_tokens = prompt.max_tokens
        outcome.num_prompt_tokens_asked = prompt.num_tokens_asked
        body = shape.body(prompt)
        outcome.sent_s = time.perf_counter() - origin_s
        try:
            async with asyncio.timeout(self._timeout_s):
                await self.pool.request("POST", shape.path, body, reader)
        except TimeoutError:
            reader.fail("timeout", f"no complete reply within {self._timeout_s:g} s")
        except BrokenReplyError as error:
            reader.fail("connection_lost", str(error))
        except OSError as error:
            reader.fail("connection_failed", str(error))
        reader.finish()

    async def fetch(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """(status, decoded JSON or None) of a plain request. Raises ServerUnreachableError, UnexpectedReplyError."""
        sink = _WholeBody()
        address = self.pool.endpoint.address
        try:
            async with asyncio.timeout(self._timeout_s):
                await self.pool.request(method, path, None if body is None else msgspec.json.encode(body), sink)
        except TimeoutError as error:
            raise ServerUnreachableError(
                f"the server at {address} did not answer {method} {path} within {self._timeout_s:g} s"
            ) from error
        except BrokenReplyError as error:
            if "not HTTP" in str(error):
                raise UnexpectedReplyError(f"what listens at {address} does not speak HTTP: {error}") from error
            raise ServerUnreachableError(f"the server at {address} did not answer {method} {path}: {error}") from error
        except OSError as error:
            raise ServerUnreachableError(f"no connection to {address}: {error}") from error
        try:
            return sink.status, msgspec.json.decode(sink.body)
        except msgspec.DecodeError:
            return sink.status, None


class _WholeBody:
    """A sink that keeps the body."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""

    def head(self, status: int) -> None:
        self.status = status

    def data(self, piece: bytes, time_s: float) -> None:
        self.body += piece
