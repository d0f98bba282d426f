"""GET /docs and /openapi.json: the reference of this API, from this server alone.

The page in `server/static/` reads /openapi.json and draws it; nothing comes from another host, and the page's
Content-Security-Policy forbids it.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from vashista.server.endpoint import Endpoint
from vashista.server.keys import Role
from vashista.server.services import Services

ASSETS = {"docs.html": "text/html", "docs.css": "text/css", "docs.js": "text/javascript"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}


def endpoints() -> list[Endpoint]:
    """The page and its two files. /openapi.json is added by `server/app.py`, which knows all endpoints."""
    return [
        Endpoint(
            method="GET",
            path="/docs",
            handler=page,
            summary="This reference as a page",
            media_type="text/html",
            is_accounted=False,
            roles=tuple(Role),
        ),
        *(
            Endpoint(
                method="GET",
                path=f"/docs/{name}",
                handler=asset,
                summary="A part of the page",
                media_type=ASSETS[name],
                is_documented=False,
                is_accounted=False,
                roles=tuple(Role),
            )
            for name in ("docs.css", "docs.js")
        ),
    ]


async def page(services: Services, request: Request) -> Response:
    """The page."""
    return _asset_response("docs.html")


async def asset(services: Services, request: Request) -> Response:
    """Its style or its script."""
    return _asset_response(request.url.path.rpartition("/")[2])


def _asset_response(name: str) -> Response:
    return Response(_read_asset(name), media_type=ASSETS[name], headers=HEADERS)


@cache
def _read_asset(name: str) -> bytes:
    return files("vashista.server").joinpath("static", name).read_bytes()
