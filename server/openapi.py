"""Routes and the OpenAPI document: FastAPI's, request schemas by pydantic, replies by msgspec, errors by class.

Handlers take the raw request, because a hostile body must be refused before anything parses it as a whole
(`server/body.py`), and answer encoded bytes; so each route says in its `Endpoint` what FastAPI would otherwise infer.

Served as /openapi.json and drawn at /docs. Tests compare what the server does with what this says.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, get_args

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, RootModel

from vashista.engine.errors import InternalError, MethodNotAllowedError, NotFoundError, VashistaError
from vashista.server.auth import OPEN_PATHS
from vashista.server.endpoint import KEYS, LEDGER, Endpoint, ErrorTypes
from vashista.server.schemas.fields import VashistaOptions
from vashista.server.term_headers import FIELDS, PREFIX

REF = "#/components/schemas/"
DESCRIPTION = (
    "Completions in the protocols of OpenAI and Anthropic, from a model on this machine. Fields that this server "
    "cannot honour are refused, never ignored."
)
Json = dict[str, Any]


EVENT: Json = {
    "description": "Each event of the stream; its data is JSON, or [DONE].",
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


def add_route(app: FastAPI, endpoint: Endpoint, handle: Callable[..., Any]) -> None:
    """Give the application the endpoint's route, with all that the document says of it."""
    app.add_api_route(
        # Model names may have slashes.
        endpoint.path.replace("{model}", "{model:path}"),
        handle,
        methods=[endpoint.method],
        operation_id=endpoint.handler.__name__.strip("_"),
        summary=endpoint.summary,
        response_class=Response,
        responses=_failures(endpoint) | {200: _success(endpoint)},
        openapi_extra=_extra(endpoint),
        include_in_schema=endpoint.is_documented,
    )


def openapi_document(endpoints: list[Endpoint]) -> Json:
    """OpenAPI 3.1 of the documented endpoints."""
    documented = [endpoint for endpoint in endpoints if endpoint.is_documented]
    app = FastAPI()
    for endpoint in documented:
        add_route(app, endpoint, _undescribed)
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    document = get_openapi(title="Vashista", version=version("vashista"), description=DESCRIPTION, routes=routes)
    bodies = [endpoint.response for endpoint in documented if endpoint.response is not None]
    bodies += [endpoint.error_body for endpoint in documented]
    schemas: Json = msgspec.json.schema_components(dict.fromkeys(bodies), ref_template=REF + "{name}")[1]
    for endpoint in documented:
        if endpoint.request is not None:
            schema = endpoint.request.model_json_schema(ref_template=REF + "{model}")
            schemas |= schema.pop("$defs", {})
            schemas[endpoint.request.__name__] = schema
    document["components"] = {
        "schemas": dict(sorted(schemas.items())),
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Once API keys exist."}},
    }
    return document


async def _undescribed() -> None:
    """Stands for a handler where only the description of its route is wanted."""


def _extra(endpoint: Endpoint) -> Json:
    """What FastAPI cannot read off a handler that takes the raw request: body, path parameter, key."""
    extra: Json = {}
    if endpoint.path not in OPEN_PATHS:
        extra["security"] = [{"key": []}, {}]
    if "{model}" in endpoint.path:
        name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        extra["parameters"] = [name]
    if endpoint.request is not None and "vashista" in _fields_of(endpoint.request):
        extra["parameters"] = [_term_header(suffix, field) for suffix, field in FIELDS.items()]
    if endpoint.request is not None:
        content = {"application/json": {"schema": {"$ref": REF + endpoint.request.__name__}}}
        extra["requestBody"] = {"required": True, "content": content}
    return extra


def _fields_of(request: type[BaseModel]) -> set[str]:
    """Of a request, or of any of those it is one of."""
    if issubclass(request, RootModel):
        return {name for one in get_args(request.model_fields["root"].annotation) for name in one.model_fields}
    return set(request.model_fields)


def _term_header(suffix: str, field: str) -> Json:
    """A header that stands for a field of `vashista`."""
    schema = dict(VashistaOptions.model_json_schema()["properties"][field])
    schema = {name: part for name, part in schema.items() if name not in {"title", "default", "description"}}
    if "anyOf" in schema:  # null is for bodies
        (schema,) = [part for part in schema["anyOf"] if part.get("type") != "null"]
    text = f"The same as `vashista.{field}`, for clients that cannot add to the body; not both."
    return {"name": PREFIX + suffix, "in": "header", "required": False, "description": text, "schema": schema}


def _success(endpoint: Endpoint) -> Json:
    schema: Json = {"type": "string"}
    if endpoint.response is not None:
        schema = {"$ref": REF + endpoint.response.__name__}
    elif endpoint.media_type == "application/json":
        schema = {"type": "object"}
    content: Json = {endpoint.media_type: {"schema": schema}}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": EVENT}
    return {"description": "Done.", "content": content}


def _failures(endpoint: Endpoint) -> dict[int | str, Json]:
    """One entry a status, with the codes and explanations of its errors."""
    always = KEYS if endpoint.path not in OPEN_PATHS else ()
    by_status: dict[int, list[type[VashistaError]]] = {}
    ledger = LEDGER if endpoint.is_accounted else ()
    errors: ErrorTypes = (*endpoint.errors, *always, InternalError, NotFoundError, MethodNotAllowedError, *ledger)
    for error in dict.fromkeys(errors):
        by_status.setdefault(error.http_status, []).append(error)
    return {
        status: {
            "description": " ".join(f"`{error.code}`: {error.__doc__}" for error in errors),
            "content": {"application/json": {"schema": {"$ref": REF + endpoint.error_body.__name__}}},
        }
        for status, errors in sorted(by_status.items())
    }
