"""Turns errors into Anthropic bodies: `{"type": "error", "error": {type, message, ...}, "request_id"}`.

`server/openai_errors.py` calls it for the paths of that protocol, and so does the stream of /v1/messages. What OpenAI
bodies have besides (param, code, remedy) stands in `error` here too.
"""

from __future__ import annotations

import msgspec

from vashista.engine.errors import VashistaError
from vashista.server.schemas.responses import AnthropicErrorBody, AnthropicErrorResponse

MESSAGES_PATH = "/v1/messages"
_TYPES = {413: "request_too_large", 500: "api_error", 503: "overloaded_error"}
"""Statuses for which the two protocols have different words."""


def speaks_anthropic(path: str) -> bool:
    """Whether a client of this path expects Anthropic's protocol, be there such a path or not."""
    return path == MESSAGES_PATH or path.startswith(MESSAGES_PATH + "/")


def encode_anthropic_error(error: VashistaError, request_id: str | None) -> bytes:
    """The JSON body."""
    body = AnthropicErrorBody(
        type=_TYPES.get(error.http_status, error.kind),
        message=error.message,
        param=error.param,
        code=error.code,
        remedy=error.remedy,
        prediction=error.prediction or msgspec.UNSET,
    )
    return msgspec.json.encode(AnthropicErrorResponse(error=body, request_id=request_id))
