"""The outermost layer of the application: request id, account, key, metrics, one log line, no exception beyond it.

uvicorn calls the gate for each request; the gate calls the Starlette application of `server/app.py`. It is plain ASGI
and adds about 20 microseconds. A reply whose request is accounted for leaves when its receipt is on disk.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vashista.engine.errors import DrainingError, VashistaError
from vashista.server.account import Account, ReceiptFirst
from vashista.server.anthropic_errors import speaks_anthropic
from vashista.server.auth import Authenticator, check_role
from vashista.server.body import Bodies
from vashista.server.books import Books
from vashista.server.endpoint import Endpoint
from vashista.server.http_protocol import STALLED
from vashista.server.keys import Role
from vashista.server.logs import request_id as current_request_id
from vashista.server.metrics import Metrics
from vashista.server.openai_errors import error_response, internal_error
from vashista.server.quotas import Quotas

logger = logging.getLogger(__name__)
_VALID_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
DEFAULT_ROLES = (Role.INFER,)
"""For paths with a name in them, and for those that are not there."""
CLIENT_GONE = 499
"""The status that logs and metrics give to a request whose client left before the reply began (as nginx does)."""


class Gate:
    """Wraps the application, whose endpoints are given by path."""

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        metrics: Metrics,
        books: Books,
        quotas: Quotas,
        bodies: Bodies,
        endpoints: Mapping[str, Endpoint],
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._metrics = metrics
        self._books = books
        self._quotas = quotas
        self._bodies = bodies
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request from its first header to its last byte."""
        assert scope["type"] == "http", f"a {scope['type']} scope although websockets and lifespan are off"
        start_s = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _VALID_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["send"] = send
        account = state["account"] = self._account(scope, request_id)
        status = CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                reply_headers = MutableHeaders(scope=message)
                reply_headers["x-request-id"] = request_id
                reply_headers.update(self._quotas.headers(account.key))
                if speaks_anthropic(scope["path"]):
                    reply_headers["request-id"] = request_id
            await send(message)

        token = current_request_id.set(request_id)
        receipt_first = ReceiptFirst(account, scope, receive, send_with_id, request_id)
        try:
            await self._answer(scope, receive, receipt_first, headers, request_id)
        except ClientDisconnect:
            account.leave()
        except asyncio.CancelledError:
            account.fail(DrainingError("The server ended before this request was finished."))
            raise
        except Exception:
            logger.exception("unexpected error")
            account.fail(internal_error(request_id))
            if status == CLIENT_GONE:
                reply = error_response(internal_error(request_id), request_id, scope["path"])
                await reply(scope, receive, receipt_first)
        finally:
            account.finish()
            self._bodies.release(scope)
            self._record(scope, status, time.monotonic() - start_s)
            current_request_id.reset(token)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers, request_id: str) -> None:
        account: Account = scope["state"]["account"]
        try:
            key = account.key = self._authenticator.check(scope["path"], headers)
            endpoint = self._endpoints.get(scope["path"])
            check_role(key, DEFAULT_ROLES if endpoint is None else endpoint.roles, scope["path"])
        except VashistaError as error:
            self._metrics.count_refusal(error)
            account.fail(error)
            await error_response(error, request_id, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _account(self, scope: Scope, request_id: str) -> Account:
        endpoint = self._endpoints.get(scope["path"])
        if endpoint is not None:
            scope["state"]["route"] = endpoint.path
        return Account(self._books, scope, request_id, is_kept=endpoint is None or endpoint.is_accounted)

    def _record(self, scope: Scope, status: int, duration_s: float) -> None:
        route = scope["state"].get("route", "other")
        self._metrics.http_responses.labels(route, str(status)).inc()
        if STALLED in scope["state"]:
            self._metrics.clients_stalled.inc()
        level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
        if logger.isEnabledFor(level):
            fields = {"status": status, "duration_ms": round(duration_s * 1000, 1)}
            logger.log(level, "%s %s", scope["method"], scope["path"][:200], extra={"fields": fields})
