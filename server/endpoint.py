"""One path and method of the API: what serves it and what it may answer.

Each file in `server/routes/` gives a list of these; `server/app.py` makes routes of them and `server/openapi.py` the
document, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from vashista.engine.errors import (
    BodyTooDeepError,
    BodyTooLargeError,
    ChatTemplateError,
    ChatTemplateFileError,
    CostLimitError,
    DeadlineError,
    DeadlineImpossibleError,
    DrainingError,
    EngineDiedError,
    EngineFailedError,
    EngineNotReadyError,
    InvalidBodyError,
    InvalidKeyError,
    InvalidReceiptError,
    InvalidRequestError,
    KeyLimitError,
    KeysUnreadableError,
    LedgerClosedError,
    LedgerDamagedError,
    LedgerError,
    LedgerFullError,
    LedgerLockedError,
    LedgerOverloadedError,
    LedgerReadOnlyError,
    ModelNotFoundError,
    PredictionMissingError,
    QueueFullError,
    QuotaExceededError,
    RateLimitError,
    RoleError,
    StepMemoryError,
    VashistaError,
)
from vashista.server.keys import Role
from vashista.server.schemas.responses import ErrorResponse
from vashista.server.services import Services

Handler = Callable[[Services, Request], Awaitable[Response]]
ErrorTypes = tuple[type[VashistaError], ...]

KEYS: ErrorTypes = (InvalidKeyError, RoleError, KeysUnreadableError)
"""Of every path that needs a key once there is one."""
BODY: ErrorTypes = (InvalidBodyError, BodyTooDeepError, BodyTooLargeError, InvalidRequestError, QueueFullError)
ENGINE: ErrorTypes = (EngineNotReadyError, EngineFailedError, EngineDiedError, StepMemoryError)
LEDGER: ErrorTypes = (
    *(LedgerError, LedgerFullError, LedgerLockedError, LedgerReadOnlyError, LedgerDamagedError),
    *(LedgerOverloadedError, LedgerClosedError, InvalidReceiptError),
)
"""What any reply that is accounted for may turn into."""
LIMITS: ErrorTypes = (KeyLimitError, RateLimitError, QuotaExceededError)
TERMS: ErrorTypes = (DeadlineError, DeadlineImpossibleError, CostLimitError, PredictionMissingError)
COMPLETION: ErrorTypes = (
    *BODY,
    *(ChatTemplateError, ChatTemplateFileError, ModelNotFoundError, QueueFullError, DrainingError),
    *LIMITS,
    *TERMS,
    *ENGINE,
)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A route with its documentation."""

    method: str
    path: str
    handler: Handler
    summary: str
    request: type[BaseModel] | None = None
    response: type[msgspec.Struct] | None = None
    """The JSON body of a 200; None where it is of `media_type`."""
    media_type: str = "application/json"
    streams: bool = False
    """Whether a 200 may be server-sent events instead."""
    errors: ErrorTypes = ()
    error_body: type[msgspec.Struct] = ErrorResponse
    is_documented: bool = True
    is_accounted: bool = True
    """Whether its requests leave receipts when they are admitted or refused."""
    roles: tuple[Role, ...] = (Role.INFER,)
    """A key needs one of them; admin opens everything."""


def json_response(body: msgspec.Struct) -> Response:
    """A 200 with the body."""
    return Response(msgspec.json.encode(body), media_type="application/json")


def request_id_of(request: Request) -> str | None:
    """The id that the gate gave to the request."""
    request_id: str | None = request.scope["state"].get("request_id")
    return request_id
