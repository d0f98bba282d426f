"""POST /v1/messages: a chat in Anthropic's protocol, whole or as a stream.

The request becomes a chat request and takes its way: template, admission and generation are those of
`server/routes/chat.py`. Only the words of the reply differ.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from vashista.engine.errors import VashistaError
from vashista.engine.messages import TokenEvent
from vashista.server.account import account_of
from vashista.server.anthropic_errors import MESSAGES_PATH, encode_anthropic_error
from vashista.server.chat_prompts import INLINE_MESSAGES
from vashista.server.endpoint import COMPLETION, Endpoint, json_response
from vashista.server.generation import Generation
from vashista.server.reply import ChoiceParts, collect, encode_json, error_event
from vashista.server.schemas.messages import MessagesRequest
from vashista.server.schemas.responses import (
    AnthropicErrorResponse,
    Message,
    MessageUsage,
    Reason,
    StopReason,
    TextBlock,
)
from vashista.server.services import Services
from vashista.server.sse import StreamResponse, run_until_disconnect


def endpoints() -> list[Endpoint]:
    """The one endpoint of this file."""
    return [
        Endpoint(
            method="POST",
            path=MESSAGES_PATH,
            handler=create_message,
            summary="Continue a conversation, in Anthropic's protocol",
            request=MessagesRequest,
            response=Message,
            streams=True,
            errors=COMPLETION,
            error_body=AnthropicErrorResponse,
        )
    ]


async def create_message(services: Services, request: Request) -> Response:
    """Parse, admit, generate, answer."""
    arrival_s = time.monotonic()
    body = await services.bodies.read(request, MessagesRequest)
    is_short = len(body.messages) <= INLINE_MESSAGES
    chat = body.as_chat() if is_short else await asyncio.to_thread(body.as_chat)
    admitted = await services.admission.admit(chat, arrival_s, account_of(request).key)
    generation = Generation(admitted, services.engine, services.metrics, services.prices, services.forecaster)
    account_of(request).run(generation)
    writer = MessageWriter(generation, services.model.name)
    if body.stream:
        return StreamResponse(generation, MessageChunks(writer), services.metrics, request)
    with generation:
        (parts,) = await run_until_disconnect(request.receive, collect(generation))
        return json_response(writer.finish(parts))


REASONS: dict[Reason, StopReason] = {"stop": "end_turn", "length": "max_tokens", "deadline": "deadline"}


class MessageWriter:
    """The message, as far as it is known."""

    def __init__(self, generation: Generation, model: str) -> None:
        self._generation = generation
        self._id = f"msg_{uuid.uuid4().hex}"
        self._model = model

    def start(self) -> Message:
        """As a stream begins it: no content and no reason yet."""
        start = self._message([], None, None)
        return msgspec.structs.replace(start, usage=msgspec.structs.replace(start.usage, vashista=None))

    def finish(self, parts: ChoiceParts) -> Message:
        """The whole message."""
        sequence = parts.stop_reason if isinstance(parts.stop_reason, str) else None
        if sequence is not None:
            reason: StopReason = "stop_sequence"
        else:
            reason = REASONS[parts.reason]
        return self._message([TextBlock(text="".join(parts.text))], reason, sequence)

    def _message(self, content: list[TextBlock], reason: StopReason | None, sequence: str | None) -> Message:
        return Message(
            id=self._id,
            model=self._model,
            content=content,
            stop_reason=reason,
            stop_sequence=sequence,
            usage=self._usage(),
        )

    def _usage(self) -> MessageUsage:
        usage = self._generation.usage()
        num_cached = usage.prompt_tokens_details.cached_tokens
        return MessageUsage(
            input_tokens=usage.prompt_tokens - num_cached,
            cache_read_input_tokens=num_cached,
            output_tokens=usage.completion_tokens,
            vashista=usage.vashista,
        )


class MessageChunks:
    """The stream of /v1/messages: one message with one block of text."""

    _DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'

    def __init__(self, writer: MessageWriter) -> None:
        self._writer = writer
        self._parts = ChoiceParts()
        self._has_begun = False

    def encode(self, index: int, event: TokenEvent) -> bytes:
        """A delta if there is text; before the first, the start of the message and of its block."""
        first = b"" if self._has_begun else self._start()
        self._has_begun = True
        self._parts.finish_reason, self._parts.stop_reason = event.finish_reason, event.stop_reason
        if not event.text:
            return first
        return first + self._DELTA + b'{"type":"text_delta","text":' + encode_json(event.text) + b"}}\n\n"

    def end(self, generation: Generation) -> bytes:
        """The end of block and message, with reason and usage."""
        message = self._writer.finish(self._parts)
        delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        return b"".join(
            [
                _event("content_block_stop", index=0),
                _event("message_delta", delta=delta, usage=message.usage),
                _event("message_stop"),
            ]
        )

    def error(self, error: VashistaError, request_id: str | None) -> bytes:
        """The error as an event; the stream ends after it."""
        return error_event(encode_anthropic_error(error, request_id))

    def _start(self) -> bytes:
        start = _event("message_start", message=self._writer.start())
        return start + _event("content_block_start", index=0, content_block=TextBlock(text=""))


def _event(name: str, **fields: Any) -> bytes:
    """A server-sent event whose data repeat its name as `type`."""
    return f"event: {name}\ndata: ".encode() + encode_json({"type": name, **fields}) + b"\n\n"
