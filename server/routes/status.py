"""GET /health, /ready, /version and /metrics: for operators, load balancers and Prometheus."""

from __future__ import annotations

from importlib.metadata import version

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response

from vashista.engine.errors import DrainingError, EngineFailedError, EngineNotReadyError
from vashista.server.endpoint import LEDGER, Endpoint, json_response
from vashista.server.keys import Role
from vashista.server.schemas.responses import Health, Readiness, Version
from vashista.server.services import Services


def endpoints() -> list[Endpoint]:
    """The endpoints of this file."""
    return [
        Endpoint(
            method="GET",
            path="/health",
            handler=health,
            summary="Whether the server process answers",
            response=Health,
            is_accounted=False,
            roles=tuple(Role),
        ),
        Endpoint(
            method="GET",
            path="/ready",
            handler=ready,
            summary="Whether requests can be answered now",
            response=Readiness,
            errors=(EngineNotReadyError, EngineFailedError, DrainingError, *LEDGER),
            is_accounted=False,
            roles=tuple(Role),
        ),
        Endpoint(
            method="GET",
            path="/version",
            handler=show_version,
            summary="The server's version",
            response=Version,
            is_accounted=False,
            roles=tuple(Role),
        ),
        Endpoint(
            method="GET",
            path="/metrics",
            handler=metrics,
            summary="Metrics in the text format of Prometheus",
            media_type="text/plain",
            is_accounted=False,
            roles=(Role.METRICS,),
        ),
    ]


async def health(services: Services, request: Request) -> Response:
    """Always 200 while the process lives, with or without an engine, and without a key."""
    return json_response(Health())


async def ready(services: Services, request: Request) -> Response:
    """What runs, or the error that a completion would get now."""
    services.room.check_open()
    services.books.check()
    engine = services.engine.check_ready()
    return json_response(
        Readiness(
            model=services.model.name,
            architecture=engine.architecture,
            num_parameters=engine.num_parameters,
            dtype=engine.dtype,
            device=engine.device,
            device_name=engine.device_name,
            attention=engine.attention,
            max_context=engine.max_context,
            page_size=engine.page_size,
            num_pages=engine.num_pages,
            kv_bytes=engine.kv_bytes,
            load_s=engine.load_s,
        )
    )


async def show_version(services: Services, request: Request) -> Response:
    """The version of the installed package."""
    return json_response(Version(version=version("vashista")))


async def metrics(services: Services, request: Request) -> Response:
    """All metrics."""
    return Response(services.metrics.exposition(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})
