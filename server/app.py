"""The ASGI application: routes from the endpoints, exceptions to error bodies, the gate around it all.

`server/serve.py` builds it once and gives it to uvicorn.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from vashista.engine.errors import VashistaError
from vashista.server.account import account_of
from vashista.server.endpoint import Endpoint, request_id_of
from vashista.server.gate import CLIENT_GONE, Gate
from vashista.server.keys import Role
from vashista.server.openai_errors import error_from_http, error_response, internal_error
from vashista.server.openapi import add_route, openapi_document
from vashista.server.routes import chat, completions, docs, messages, models, predict, status, tokens
from vashista.server.services import Services


def build_app(services: Services) -> ASGIApp:
    """The whole application over the services."""
    endpoints = all_endpoints(with_docs=services.settings.api_docs)

    async def on_error(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            account_of(request).leave()
            return Response(status_code=CLIENT_GONE)
        if isinstance(error, HTTPException):
            error = error_from_http(error, request)
        if not isinstance(error, VashistaError):
            error = internal_error(request_id_of(request))
        services.metrics.count_refusal(error)
        account_of(request).fail(error)
        return error_response(error, request_id_of(request), request.scope["path"])

    app = FastAPI(
        # The documents are endpoints of ours: /docs without a CDN, and both behind the key.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # FastAPI would give spans and errors, prompts in them, to whatever exporter it finds or is told to set up.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
        exception_handlers={kind: on_error for kind in (VashistaError, HTTPException, ClientDisconnect, Exception)},
    )
    for endpoint in endpoints:
        add_route(app, endpoint, _bind(services, endpoint))
        if endpoint.method == "GET":  # health checks of proxies ask so; uvicorn leaves the body out
            add_route(app, replace(endpoint, method="HEAD", is_documented=False), _bind(services, endpoint))
    by_path = {endpoint.path: endpoint for endpoint in endpoints}
    return Gate(
        app, services.authenticator, services.metrics, services.books, services.quotas, services.bodies, by_path
    )


def all_endpoints(*, with_docs: bool = True) -> list[Endpoint]:
    """Every endpoint, in the order of the documentation."""
    parts = [completions, chat, messages, predict, models, tokens, status]
    endpoints = [endpoint for part in parts for endpoint in part.endpoints()]
    if not with_docs:
        return endpoints
    endpoints += docs.endpoints()
    endpoints.append(
        Endpoint(
            method="GET",
            path="/openapi.json",
            handler=_describe,
            summary="This reference for programs",
            is_accounted=False,
            roles=tuple(Role),
        )
    )
    return endpoints


async def _describe(services: Services, request: Request) -> Response:
    return Response(_encoded_document(), media_type="application/json")


@cache
def _encoded_document() -> bytes:
    return msgspec.json.encode(openapi_document(all_endpoints()))


def _bind(services: Services, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        request.scope["state"]["route"] = endpoint.path
        return await endpoint.handler(services, request)

    return handle
