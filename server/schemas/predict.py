"""The body of POST /v1/predict: that of a completion or of a chat, or just the size of one."""

from __future__ import annotations

from typing import Any

from pydantic import Field, RootModel

from vashista.server.schemas.chat import ChatRequest
from vashista.server.schemas.completions import CompletionRequest
from vashista.server.schemas.fields import INT64_MAX, RequestModel, VashistaOptions


class SizeRequest(RequestModel):
    """A request of which only the size is known."""

    model: str | None = Field(default=None, min_length=1, max_length=512, description="The served model unless given.")
    prompt_tokens: int = Field(ge=1, le=INT64_MAX, description="Tokens of the prompt, none of them in the cache.")
    max_tokens: int = Field(ge=1, le=INT64_MAX, description="Tokens to generate.")
    n: int | None = Field(default=None, ge=1, le=INT64_MAX, description="Choices. Default 1.")
    priority: int | None = Field(default=None, ge=-1000, le=1000, description="Lower runs first. Default 0.")
    vashista: VashistaOptions | None = None


class PredictRequest(RootModel[ChatRequest | CompletionRequest | SizeRequest]):
    """A chat request, a completion request, or a size; told apart by `messages`, `prompt` and `prompt_tokens`."""


def kind_of(body: dict[str, Any]) -> type[ChatRequest | CompletionRequest | SizeRequest]:
    """Which of the three a body is."""
    if "messages" in body:
        return ChatRequest
    return SizeRequest if "prompt_tokens" in body else CompletionRequest
