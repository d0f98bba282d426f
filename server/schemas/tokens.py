"""The bodies of POST /tokenize and POST /detokenize, in the shapes that other open servers use."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from vashista.server.schemas.chat import ChatMessage, TemplateKwargs
from vashista.server.schemas.fields import RequestModel


class TokenizeRequest(RequestModel):
    """A text, or the messages of a chat, to be turned into token ids."""

    model: str | None = Field(default=None, description="The served model unless given.")
    prompt: str | None = Field(default=None, description="The text; or give messages.")
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = Field(
        default=None, min_length=1, description="A chat; or give prompt."
    )
    add_special_tokens: bool | None = Field(default=None, description="Default true for a prompt, false for messages.")
    add_generation_prompt: bool | None = Field(default=None, description="Only with messages. Default true.")
    chat_template_kwargs: TemplateKwargs | None = None
    return_token_strs: bool | None = Field(default=None, description="Also give each token as text.")

    @model_validator(mode="after")
    def _check_one_of(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of", "give either prompt or messages")
        return self


class DetokenizeRequest(RequestModel):
    """Token ids to be turned into text."""

    model: str | None = Field(default=None, description="The served model unless given.")
    tokens: Annotated[list[int], Field(fail_fast=True)]
