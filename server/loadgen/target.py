"""A look at the server before the load: can it be reached, is the key right, which model, how does it count tokens.

`runner.py` calls `find_model` first, so that a wrong address, key or model is one clear error and not a hundred
failed requests. `TokenCounter` is what makes prompt lengths exact: it speaks the `/tokenize` of Vashista and vLLM
(`{"prompt"}` or `{"messages"}`) and that of llama-server (`{"content"}`, text alone). `UsageCounter` costs a short
completion a text; it serves to learn the tokens per word of a server that has no `/tokenize`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from vashista.engine.errors import (
    InvalidKeyError,
    ModelNotFoundError,
    ServerUnreachableError,
    UnexpectedReplyError,
    WorkloadError,
)
from vashista.server.loadgen.client import OpenAIClient, Prompt, RequestShape
from vashista.server.loadgen.outcome import Outcome

PROBE_TEXT = "the quick brown fox"


async def find_model(client: OpenAIClient, wanted: str | None) -> str:
    """The model to ask for: `wanted` when the server has it, or the only one the server has."""
    address = client.pool.endpoint.address
    status, reply = await client.fetch("GET", "/v1/models")
    if status in {401, 403}:
        raise InvalidKeyError(f"the server at {address} refuses the API key (status {status}); give one with --api-key")
    if status == 503:
        raise ServerUnreachableError(f"the server at {address} is not ready: {reply}")
    if status in {404, 405} and wanted is not None:
        return wanted  # it does not list its models; the first request will tell
    names = _model_names(reply) if status == 200 else None
    if names is None:
        raise UnexpectedReplyError(f"GET /v1/models of {address} answers status {status} and no list of models")
    listing = ", ".join(names) or "none"
    if wanted is not None:
        if wanted not in names:
            raise ModelNotFoundError(f"the server has no model {wanted!r}; it has: {listing}", param="model")
        return wanted
    if len(names) != 1:
        raise WorkloadError(f"choose one with --model; the server has: {listing}", param="model")
    return names[0]


def _model_names(reply: Any) -> list[str] | None:
    rows = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in rows):
        return None
    return [row["id"] for row in rows]


class TokenCounter:
    """Counts the prompt tokens that a text will have, by the server's own tokenizer."""

    def __init__(self, client: OpenAIClient, *, model: str, is_chat: bool, field: str) -> None:
        self._client = client
        self._model = model
        self._is_chat = is_chat
        self._field = field

    @classmethod
    async def find(cls, client: OpenAIClient, *, model: str, is_chat: bool) -> TokenCounter | None:
        """A counter in the dialect that the server understands; None when it has no /tokenize that fits."""
        for field in ("messages",) if is_chat else ("prompt", "content"):
            counter = cls(client, model=model, is_chat=is_chat, field=field)
            if await counter._ask(PROBE_TEXT):
                return counter
        return None

    async def count(self, text: str) -> int:
        """Tokens of the request whose prompt, or only message, is `text`."""
        count = await self._ask(text)
        if count is None:
            raise UnexpectedReplyError("/tokenize of the server answered the first text, but not a later one")
        return count

    async def _ask(self, text: str) -> int | None:
        if self._field == "messages":
            messages = [{"role": "user", "content": text}]
            body: dict[str, Any] = {"model": self._model, "messages": messages, "add_generation_prompt": True}
        elif self._field == "prompt":
            body = {"model": self._model, "prompt": text}
        else:
            body = {"content": text, "add_special": True}
        status, reply = await self._client.fetch("POST", "/tokenize", body)
        tokens = reply.get("tokens") if status == 200 and isinstance(reply, dict) else None
        return len(tokens) if isinstance(tokens, list) and tokens else None


class UsageCounter:
    """Counts prompt tokens by the usage of a request for one token."""

    def __init__(self, client: OpenAIClient, shape: RequestShape) -> None:
        self._client = client
        self._shape = msgspec.structs.replace(shape, is_streaming=False)

    @classmethod
    async def find(cls, client: OpenAIClient, shape: RequestShape) -> UsageCounter | None:
        """A counter, or None when the server tells no usage. Raises UnexpectedReplyError when it refuses."""
        counter = cls(client, shape)
        return None if await counter._ask(PROBE_TEXT) is None else counter

    async def count(self, text: str) -> int:
        """Tokens of the request whose prompt, or only message, is `text`."""
        count = await self._ask(text)
        if count is None:
            raise UnexpectedReplyError("the server told the usage of the first request, but not of a later one")
        return count

    async def _ask(self, text: str) -> int | None:
        outcome = Outcome(index=0, intended_s=0.0)
        await self._client.send(self._shape, Prompt(1, text=text), outcome, origin_s=0.0)
        if not outcome.is_ok:
            raise UnexpectedReplyError(
                f"the server refuses a plain request ({outcome.error_code}): {outcome.error_message}"
            )
        return outcome.num_prompt_tokens
