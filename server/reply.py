"""What the completion routes share in answering: the header of a reply, and a choice put together from events.

A `Reply` is made once a request is admitted; the files in `server/routes/` shape it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from vashista.engine.messages import FinishReason, TokenEvent, TokenLogprobs
from vashista.server.generation import Generation
from vashista.server.schemas.responses import Reason

Written = TypeVar("Written")
encode_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """Identity of a reply."""

    id: str
    created: int
    """Unix seconds."""
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> Reply:
        """A reply with a fresh id."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)

    def chunk_prefix(self, object_name: str) -> bytes:
        """The start of every chunk of a stream, up to and with `"choices":`."""
        head = {"id": self.id, "object": object_name, "created": self.created, "model": self.model}
        return b"data: " + encode_json(head)[:-1] + b',"choices":'


@dataclass
class ChoiceParts:
    """What the events of one choice add up to."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[msgspec.Raw] | None = None
    """As `engine/prompt_logprobs.py` packs them."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, event: TokenEvent) -> None:
        """One more event."""
        self.text.append(event.text)
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or []
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.finish_reason = event.finish_reason
        self.stop_reason = event.stop_reason

    @property
    def reason(self) -> Reason:
        """Why the finished choice ended."""
        match self.finish_reason:
            case FinishReason.STOP:
                return "stop"
            case FinishReason.DEADLINE:
                return "deadline"
        return "length"


async def collect(generation: Generation) -> list[ChoiceParts]:
    """All choices, once all of them are finished. Raises VashistaError."""
    choices = [ChoiceParts() for _ in generation.admitted.submits]
    while news := await generation.next_events():
        for index, event in news:
            choices[index].add(event)
    return choices


async def written(write: Callable[[], Written], parts: Iterable[TokenEvent | ChoiceParts]) -> Written:
    """What `write` makes of the parts.

    In a thread where one reports log probabilities of its prompt, which are hundreds of thousands of numbers for a long
    one: other streams do not halt.
    """
    if any(part.prompt_logprobs is not None for part in parts):
        return await asyncio.to_thread(write)
    return write()


def error_event(body: bytes) -> bytes:
    """An error in the middle of a stream; the stream ends after it, without [DONE]."""
    return b"event: error\ndata: " + body + b"\n\n"


def usage_chunk(prefix: bytes, generation: Generation) -> bytes:
    """The last chunk of a stream that includes usage: no choices."""
    return prefix + b'[],"usage":' + encode_json(generation.usage()) + b"}\n\n"
