"""Turns errors into OpenAI bodies: `{"error": {message, type, param, code, remedy, request_id}}`.

The exception handlers of `server/app.py`, the gate and the streams call this; paths of Anthropic's protocol get the
bodies of `server/anthropic_errors.py` instead, and nothing else builds an error body. A client never sees a stack
trace: what is not a `VashistaError` becomes an `InternalError` that names the request id.
"""

from __future__ import annotations

import asyncio
import math

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vashista.engine.errors import (
    BodyTooLargeError,
    EngineDiedError,
    EngineNotReadyError,
    InternalError,
    InvalidKeyError,
    InvalidRequestError,
    LedgerError,
    MethodNotAllowedError,
    NotFoundError,
    RetryableError,
    VashistaError,
)
from vashista.server.anthropic_errors import encode_anthropic_error, speaks_anthropic
from vashista.server.schemas.responses import ErrorBody, ErrorResponse

NOT_READY_RETRY_S = 2
LINGER_BYTES = 64 << 20
LINGER_S = 2.0
"""How much of a refused body is read and thrown away, so that the client sees the reply and not a reset."""


def encode_error(error: VashistaError, request_id: str | None) -> bytes:
    """The JSON body."""
    return msgspec.json.encode(ErrorResponse(error=error_body(error, request_id)))


def error_body(error: VashistaError, request_id: str | None) -> ErrorBody:
    """What a client is told of an error."""
    return ErrorBody(
        message=error.message,
        type=error.kind,
        param=error.param,
        code=error.code,
        remedy=error.remedy,
        request_id=request_id,
        prediction=error.prediction or msgspec.UNSET,
    )


def error_response(error: VashistaError, request_id: str | None, path: str) -> Response:
    """The whole reply to a request for the path, with the headers that its status calls for."""
    headers: dict[str, str] = {}
    if isinstance(error, InvalidKeyError):
        headers["WWW-Authenticate"] = 'Bearer realm="vashista", Basic realm="vashista"'
    elif isinstance(error, RetryableError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, EngineNotReadyError | EngineDiedError | LedgerError):
        headers["Retry-After"] = str(NOT_READY_RETRY_S)
    kind = LingeringResponse if isinstance(error, BodyTooLargeError) else Response
    encode = encode_anthropic_error if speaks_anthropic(path) else encode_error
    return kind(
        encode(error, request_id), status_code=error.http_status, headers=headers, media_type="application/json"
    )


def error_from_http(error: HTTPException, request: Request) -> VashistaError:
    """Ours for what the router raises."""
    if error.status_code == 404:
        return NotFoundError(f"There is no path {request.url.path[:200]!r}.")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return MethodNotAllowedError(f"{request.method} is not allowed on {request.url.path[:200]!r}; {allowed} is.")
    return InvalidRequestError(str(error.detail)) if error.status_code < 500 else InternalError(str(error.detail))


def internal_error(request_id: str | None) -> InternalError:
    """What a client is told about a bug."""
    return InternalError(f"The server failed on this request; its id is {request_id}.")


class LingeringResponse(Response):
    """Sends the whole reply at once, then reads the rest of the body for a moment before the connection closes.

    Closing a socket that has unread data resets the connection, and the client may never see why.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, linger, close."""
        self.headers["Connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        num_bytes = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while num_bytes < LINGER_BYTES:
                    message = await receive()
                    num_bytes += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        break
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
