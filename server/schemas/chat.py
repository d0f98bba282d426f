"""The body of POST /v1/chat/completions; `server/routes/chat.py` parses it, `server/admission.py` admits it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from vashista.server.schemas.fields import INT64_MAX, RequestModel
from vashista.server.schemas.sampling import SamplingFields, no_op

_RESERVED_TEMPLATE_NAMES = frozenset({"messages", "add_generation_prompt", "tools", "documents"})


def join_text_parts(value: Any) -> Any:
    """A string, or text parts joined by line ends."""
    if not isinstance(value, list):
        return value
    if not value:
        raise PydanticCustomError("empty_content", "the list of parts is empty")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None or not isinstance(kind, str):
            raise PydanticCustomError("content_part", "each part must be an object with the fields type and text")
        if kind != "text":
            raise PydanticCustomError(
                "unsupported_content", "parts of type {kind} are not supported; text is", {"kind": repr(kind[:40])}
            )
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("content_part", "a text part has exactly the fields type and text, both strings")
        texts.append(part["text"])
    return "\n".join(texts)


_PART_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    str,
    BeforeValidator(join_text_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA, "minItems": 1}]}),
]


def _template_kwargs(value: Any) -> Any:
    reserved = sorted(_RESERVED_TEMPLATE_NAMES & set(value)) if isinstance(value, dict) else []
    if reserved:
        raise PydanticCustomError("reserved_name", "{names} may not be set here", {"names": ", ".join(reserved)})
    return value


class ChatMessage(RequestModel):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    refusal: Literal[""] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: only what was given."""
        given = {"role": self.role, "content": self.content, "name": self.name, "tool_call_id": self.tool_call_id}
        return {name: value for name, value in given.items() if value is not None}


TemplateKwargs = Annotated[
    dict[str, Any],
    BeforeValidator(_template_kwargs),
    WithJsonSchema(
        {"type": "object", "propertyNames": {"not": {"enum": sorted(_RESERVED_TEMPLATE_NAMES)}}},
    ),
]


class ChatRequest(SamplingFields):
    """OpenAI's chat request with the usual extensions of open servers."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=INT64_MAX, description="Older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(
        default=None,
        ge=1,
        le=INT64_MAX,
        description="Default: the server's default_max_tokens, or what the context leaves.",
    )
    logprobs: bool | None = Field(default=None, description="Report log probabilities.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=INT64_MAX, description="Alternatives a token; only with logprobs."
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="Whether the template opens the assistant's turn. Default true."
    )
    continue_final_message: bool | None = Field(
        default=None, description="The reply goes on with the last message, which is the assistant's. Default false."
    )
    chat_template_kwargs: TemplateKwargs | None = Field(
        default=None, description="More variables for the model's chat template."
    )

    store: Literal[False] | None = no_op("Replies are never stored.")
    metadata: dict[str, str] | None = Field(default=None, description="Accepted and not used.")
    parallel_tool_calls: bool | None = Field(default=None, description="Accepted and not used: there are no tools.")
    safety_identifier: str | None = Field(default=None, description="Accepted and not used.")
    prompt_cache_key: str | None = Field(default=None, description="Accepted and not used: prefixes are always cached.")
    service_tier: Literal["auto", "default"] | None = no_op("There is one tier.")
    modalities: list[Literal["text"]] | None = no_op("Only text is generated.")
    tools: Annotated[list[Any], Field(max_length=0)] | None = no_op("Tools are not supported.")
    tool_choice: Literal["none", "auto"] | None = no_op("Tools are not supported.")
    functions: Annotated[list[Any], Field(max_length=0)] | None = no_op("Functions are not supported.")
    function_call: Literal["none", "auto"] | None = no_op("Functions are not supported.")
    audio: None = no_op("Audio is not supported.")
    prediction: None = no_op("Predicted output is not supported.")
    web_search_options: None = no_op("Web search is not supported.")
    reasoning_effort: None = no_op("Reasoning effort is not supported; see chat_template_kwargs.")
    verbosity: Literal["medium"] | None = no_op("Verbosity is not supported.")
