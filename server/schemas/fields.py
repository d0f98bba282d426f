"""What the request schemas share: the base model, and how a failed check becomes a named error.

Every schema in this folder derives from `RequestModel`; the routes call `parse` with the decoded JSON object and get
a frozen, valid object, or a `VashistaError` that says which field was wrong, what was sent and what is possible.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from vashista.engine.errors import (
    ChatTemplateError,
    EmptyPromptError,
    InvalidRequestError,
    UnknownFieldError,
    UnsupportedFieldError,
    VashistaError,
)

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
MAX_SHOWN = 80
"""Characters of a wrong value that a message repeats."""
MAX_ERRORS = 5000
"""Errors whose words are made to name the first one; more take longer than other streams should wait."""
_PYDANTIC_WORDS = re.compile(r"^(Input|String|List|Dictionary) (?=should)| after validation, not \d+$")
"""What the field's name before and its value behind say as well."""
_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)


class RequestModel(BaseModel):
    """Strict types, no unknown fields, frozen."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def no_op(description: str) -> Any:
    """A field of the protocol that is accepted only with a value that changes nothing."""
    return Field(default=None, description=description, json_schema_extra={"x-no-op": True})


class AttentionOptions(RequestModel):
    """How the tokens that the request generates attend to its context; the prompt always attends to all of it."""

    mode: Literal["dense", "sparse"] | None = Field(
        default=None,
        description="dense attends to every token; sparse keeps the best ones of each KV head, within one of the two "
        "limits below or the server's own. Default: sparse where a limit is given, else the server's attention_mode.",
    )
    token_budget: int | None = Field(
        default=None, ge=96, le=INT64_MAX, description="Sparse: tokens that each KV head keeps."
    )
    max_dropped_mass: float | None = Field(
        default=None,
        ge=0.001,
        lt=1,
        description="Sparse: the share of the attention mass that may be left out on average; budgets follow from the "
        "model's support profile and are corrected by what its steps are estimated to drop and by audits.",
    )


class VashistaOptions(RequestModel):
    """What goes beyond the OpenAI protocol (`extra_body` of the OpenAI clients)."""

    attention: AttentionOptions | None = None
    deadline_s: float | None = Field(
        default=None,
        gt=0,
        le=86400,
        description="Seconds from the arrival until the whole reply is to be there. A request whose prediction for all "
        "of its max_tokens does not keep it, in nine of ten cases, is refused at once.",
    )
    max_cost: float | None = Field(
        default=None,
        ge=0,
        description="The most that the reply may cost, in the server's currency, by the upper end of its prediction.",
    )
    adapt: bool = Field(
        default=False,
        description="Rather than refuse, attend to fewer tokens, as far as the request's or the server's limit of "
        "dropped mass allows; the reply says so.",
    )
    stop_at_deadline: bool = Field(
        default=False,
        description="End the reply with the reason `deadline`, and what there is of it, as soon as it cannot be "
        "complete by deadline_s any more.",
    )

    @model_validator(mode="after")
    def _need_a_limit(self) -> Self:
        if self.stop_at_deadline and self.deadline_s is None:
            raise PydanticCustomError("no_limit", "stop_at_deadline needs deadline_s")
        if self.adapt and self.deadline_s is None and self.max_cost is None:
            raise PydanticCustomError("no_limit", "adapt needs deadline_s or max_cost")
        return self


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompt(value: Any) -> Any:
    """A string, token ids, or a list of either, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
            return value
    if isinstance(value, list) and not value:
        raise PydanticCustomError("empty_prompt", "the list of prompts is empty")
    raise PydanticCustomError(
        "prompt_type", "must be a string, a list of strings, a list of token ids or a list of lists of token ids"
    )


_TOKEN_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_STRING = {"type": "string", "minLength": 1}

Prompt = Annotated[
    list[Any],
    BeforeValidator(_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                _STRING,
                {"type": "array", "items": _STRING, "minItems": 1},
                _TOKEN_IDS,
                {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
            ]
        }
    ),
]
"""One or many prompts, each a string or a list of token ids."""

Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(fail_fast=True),
    BeforeValidator(_stop_list),
    WithJsonSchema({"anyOf": [_STRING, {"type": "array", "items": _STRING}]}),
]

Model = TypeVar("Model", bound=RequestModel)


def parse(model: type[Model], body: dict[str, Any]) -> Model:
    """The body as `model`; a named error for the first thing that is wrong with it."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:
            raise InvalidRequestError(
                f"{error.error_count()} fields of the body are unknown, mistyped or out of range, too many to name one "
                f"(at most {MAX_ERRORS})."
            ) from None
        raise named_error(model, error.errors(include_url=False)) from None


def named_error(model: type[RequestModel], errors: list[ErrorDetails]) -> VashistaError:
    """The error of ours for pydantic's; unknown fields first, because they often explain the others."""
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    path = [str(part) for part in first["loc"]]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return UnknownFieldError(f"Unknown field {param!r}.{_did_you_mean(model, path)}", param=param)
    if first["type"] == "missing":
        return InvalidRequestError(f"The field {param!r} is required.", param=param)
    error_type = _error_type(model, path, first["type"])
    message = f"{param}: " if param else ""
    message += _PYDANTIC_WORDS.sub("", first["msg"])
    if path:
        message += f", got {_shown(first['input'])}"
    more = f" ({len(errors) - 1} more fields are wrong.)" if len(errors) > 1 else ""
    return error_type(f"{message}.{_reason(model, path)}{more}", param=param)


def _reason(model: type[RequestModel], path: list[str]) -> str:
    """Why a field of the protocol that is accepted without effect alone cannot be honoured."""
    field = model.model_fields.get(path[0]) if path else None
    return f" {field.description}" if field is not None and _is_no_op(field) else ""


def _error_type(model: type[RequestModel], path: list[str], kind: str) -> type[VashistaError]:
    field = model.model_fields.get(path[0]) if path else None
    if kind == "unsupported_content" or (field is not None and _is_no_op(field)):
        return UnsupportedFieldError
    if kind == "empty_prompt":
        return EmptyPromptError
    if path[:1] == ["messages"] and path[-1] in {"role", "messages"}:
        return ChatTemplateError
    return InvalidRequestError


def _is_no_op(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("x-no-op"))


def _did_you_mean(model: type[RequestModel], path: list[str]) -> str:
    names = list(model.model_fields) if len(path) == 1 else []
    near = difflib.get_close_matches(path[-1], names, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _shown(value: Any) -> str:
    text = ""
    for part in _ENCODER.iterencode(value[: MAX_SHOWN + 1] if isinstance(value, str) else value):
        text += part
        if len(text) > MAX_SHOWN:
            return text[:MAX_SHOWN] + "…"
    return text
