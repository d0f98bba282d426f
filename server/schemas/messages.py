"""The body of POST /v1/messages, Anthropic's protocol; `server/routes/messages.py` takes it as a chat request."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from vashista.server.schemas.chat import ChatMessage, ChatRequest, TemplateKwargs, join_text_parts
from vashista.server.schemas.fields import INT64_MAX, RequestModel
from vashista.server.schemas.sampling import CommonFields, no_op

_CACHE_CONTROLS: list[Any] = [None, {"type": "ephemeral"}, *({"type": "ephemeral", "ttl": ttl} for ttl in ("5m", "1h"))]


def _cache_control(value: Any) -> Any:
    if value not in _CACHE_CONTROLS:
        raise PydanticCustomError("cache_control", "cache_control must have the type ephemeral, and a ttl of 5m or 1h")
    return value


def _join_blocks(value: Any) -> Any:
    return join_text_parts([_plain_block(block) for block in value] if isinstance(value, list) else value)


def _plain_block(block: Any) -> Any:
    """The block without what only Anthropic's text blocks may have and what changes nothing here."""
    if not isinstance(block, dict) or block.get("type") != "text":
        return block
    _cache_control(block.get("cache_control"))
    if block.get("citations") is not None:
        raise PydanticCustomError("unsupported_content", "citations are not supported")
    return {name: value for name, value in block.items() if name not in {"cache_control", "citations"}}


_CACHE_CONTROL_SCHEMA: dict[str, Any] = {"enum": _CACHE_CONTROLS}
_BLOCK_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"const": "text"},
        "text": {"type": "string"},
        "cache_control": _CACHE_CONTROL_SCHEMA,
        "citations": {"type": "null"},
    },
    "required": ["type", "text"],
    "additionalProperties": False,
}
Blocks = Annotated[
    str,
    BeforeValidator(_join_blocks),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK_SCHEMA, "minItems": 1}]}),
]
"""A string, or text blocks joined by line ends."""
CacheControl = Annotated[Any, BeforeValidator(_cache_control), WithJsonSchema(_CACHE_CONTROL_SCHEMA)]
ThinkingOff = Annotated[dict[Literal["type"], Literal["disabled"]], Field(min_length=1)]


class InputMessage(RequestModel):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class Metadata(RequestModel):
    """About the request."""

    user_id: str | None = Field(default=None, description="Accepted and not used.")


class ChatOfMessages(ChatRequest):
    """A /v1/messages request as admission takes it."""

    stop_name: ClassVar[str] = "stop_sequences"


class MessagesRequest(CommonFields):
    """Anthropic's messages request, with the extensions that make sense in every protocol."""

    messages: Annotated[list[InputMessage], Field(fail_fast=True)] = Field(
        min_length=1,
        description="Neighbours of one role become one message. The reply goes on with a last one of the assistant.",
    )
    system: Blocks | None = Field(default=None, description="Stands before the messages, with the role system.")
    max_tokens: int = Field(ge=1, le=INT64_MAX)
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)] | None = Field(
        default=None, description="The text ends before the first of these strings."
    )
    chat_template_kwargs: TemplateKwargs | None = Field(
        default=None, description="More variables for the model's chat template."
    )

    metadata: Metadata | None = None
    cache_control: CacheControl = Field(
        default=None, description="Accepted and not used, also in blocks: prefixes are always cached."
    )
    service_tier: Literal["auto", "standard_only"] | None = no_op("There is one tier.")
    speed: Literal["standard"] | None = no_op("There is one speed.")
    thinking: ThinkingOff | None = no_op("Thinking is not supported; see chat_template_kwargs.")
    tools: Annotated[list[Any], Field(max_length=0)] | None = no_op("Tools are not supported.")
    tool_choice: None = no_op("Tools are not supported.")
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = no_op("Tools are not supported.")
    container: None = no_op("Containers are not supported.")
    context_management: None = no_op("Editing the context is not supported.")
    output_config: None = no_op("Output formats and effort are not supported; see /v1/chat/completions for formats.")
    output_format: None = no_op("Output formats are not supported; see /v1/chat/completions.")
    inference_geo: None = no_op("There is one place: this machine.")
    diagnostics: None = no_op("Cache diagnostics are not supported.")

    def as_chat(self) -> ChatOfMessages:
        """The same request in the words of /v1/chat/completions."""
        turns = [] if self.system is None else [ChatMessage(role="system", content=self.system)]
        parts: list[str] = []
        for index, message in enumerate(self.messages):
            parts.append(message.content)
            if index + 1 == len(self.messages) or self.messages[index + 1].role != message.role:
                turns.append(ChatMessage(role=message.role, content="\n".join(parts)))
                parts = []
        return ChatOfMessages(
            **{name: getattr(self, name) for name in CommonFields.model_fields},
            messages=turns,
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            continue_final_message=self.messages[-1].role == "assistant",
            chat_template_kwargs=self.chat_template_kwargs,
        )
