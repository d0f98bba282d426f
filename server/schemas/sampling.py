"""The fields by which requests choose tokens and end: `CommonFields` in every protocol, `SamplingFields` in OpenAI's.

None always means "not given": the value then comes from the model's generation_config.json where that has one, and
else from the OpenAI default. `server/admission.py` turns these fields into the engine's `SamplingParams`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vashista.engine.model_config import MIN_REPETITION_PENALTY
from vashista.server.schemas.fields import INT64_MAX, INT64_MIN, RequestModel, Stops, VashistaOptions, no_op

Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class StreamOptions(RequestModel):
    """What a stream carries besides the text."""

    include_usage: bool | None = Field(default=None, description="Send `usage` in a last chunk without choices.")
    include_obfuscation: Literal[False] | None = Field(default=None, description="Padding is not supported.")


class TextFormat(RequestModel):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaSpec(RequestModel):
    """A named JSON schema."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(default=None, description="The schema is always enforced, whatever this says.")


class JsonSchemaFormat(RequestModel):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaSpec


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class CommonFields(RequestModel):
    """What every request for a completion may have, in whichever protocol."""

    model: str = Field(min_length=1, max_length=512, description="A name that GET /v1/models lists.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy. Default 1.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Default 1.")
    top_k: int | None = Field(default=None, ge=-1, le=INT64_MAX, description="0 and -1 are off. Default off.")
    seed: int | None = Field(
        default=None, ge=INT64_MIN, le=INT64_MAX, description="Random unless given; choice i of n uses seed + i."
    )
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    cache_salt: str | None = Field(
        default=None, min_length=1, max_length=256, description="Share cached prefixes with requests of this salt only."
    )
    priority: int | None = Field(default=None, ge=-1000, le=1000, description="Lower runs first. Default 0.")
    vashista: VashistaOptions | None = None


class SamplingFields(CommonFields):
    """Sampling, ends, reports and streaming; common to both kinds of OpenAI's completion."""

    stop_name: ClassVar[str] = "stop"
    """What the client calls `stop`, for messages about it."""

    min_p: float | None = Field(default=None, ge=0, le=1, description="Default 0.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description="Default 0.")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description="Default 0.")
    repetition_penalty: float | None = Field(
        default=None, ge=MIN_REPETITION_PENALTY, le=10, description="1 is off. Default 1."
    )
    logit_bias: dict[TokenId, Bias] | None = Field(default=None, description="Added to the logits of token ids.")
    stop: Stops | None = Field(default=None, description="The text ends before the first of these strings.")
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = Field(
        default=None, description="Generation ends after one of these."
    )
    min_tokens: int | None = Field(default=None, ge=0, le=INT64_MAX, description="No end before so many tokens.")
    ignore_eos: bool | None = Field(default=None, description="Go on after an end-of-sequence token.")
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=INT64_MAX,
        description="Report log probabilities of the prompt's tokens, with so many alternatives.",
    )
    n: int | None = Field(default=None, ge=1, le=INT64_MAX, description="Choices for each prompt. Default 1.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with stream.")
    response_format: ResponseFormat | None = None
    user: str | None = Field(default=None, description="Accepted and not used.")

    @property
    def num_choices(self) -> int:
        """`n`, or 1."""
        return 1 if self.n is None else self.n

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


__all__ = ["CommonFields", "JsonSchemaFormat", "ResponseFormat", "SamplingFields", "StreamOptions", "no_op"]
