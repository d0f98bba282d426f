"""Reads a request's body: bounded, UTF-8, one JSON object, of sane depth. Every route with a body calls `read_body`.

The server reads bodies itself so that a hostile one costs little: nothing beyond `max_body_bytes` is kept, and parsing
never raises anything but a `VashistaError`. The decoded object becomes a request in `server/schemas/fields.py`; what a
request for a completion asks goes into its account, for the receipt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import Request

from vashista.engine.errors import BodyTooDeepError, BodyTooLargeError, InvalidBodyError
from vashista.server.account import account_of
from vashista.server.schemas.fields import Model, parse
from vashista.server.schemas.sampling import CommonFields

MAX_DEPTH = 64
BIG_BODY_BYTES = 256 << 10
"""From this size on the body is parsed in a thread, so that other streams do not halt (about 1 ms a 256 KiB)."""


async def read_body(request: Request, model: type[Model], max_body_bytes: int) -> Model:
    """The body as `model`. BodyTooLargeError, InvalidBodyError, BodyTooDeepError, or what `parse` raises."""
    return await read_body_as(request, lambda value: model, max_body_bytes)


async def read_body_as(request: Request, choose: Callable[[dict[str, Any]], type[Model]], max_body_bytes: int) -> Model:
    """The same for a route that takes more than one kind: `choose` sees the JSON object and says which it is."""
    _check_content_type(request.headers.get("content-type"))
    body = await _read(request, max_body_bytes)

    def parse_body() -> Model:
        value = decode_object(body)
        return parse(choose(value), value)

    parsed = parse_body() if len(body) < BIG_BODY_BYTES else await asyncio.to_thread(parse_body)
    if isinstance(parsed, CommonFields):
        await account_of(request).ask(parsed, body)
    return parsed


def decode_object(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object in `body`; InvalidBodyError or BodyTooDeepError."""
    if not body:
        raise InvalidBodyError("The body is empty; it must be a JSON object.")
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise BodyTooDeepError(f"The JSON is nested deeper than {MAX_DEPTH} levels.") from None
    except (msgspec.DecodeError, ValueError, OverflowError) as error:
        raise InvalidBodyError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidBodyError(f"The body is a JSON {_json_name(value)}; it must be an object.")
    _check_depth(value)
    return value


async def _read(request: Request, max_body_bytes: int) -> bytearray:
    length = request.headers.get("content-length")
    # The HTTP parser has checked that the length is a number.
    if length is not None and int(length) > max_body_bytes:
        raise BodyTooLargeError(f"The body has {length} bytes; at most {max_body_bytes} are accepted.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_body_bytes:
            raise BodyTooLargeError(f"The body has more than {max_body_bytes} bytes; no more are accepted.")
    return body


def _check_content_type(value: str | None) -> None:
    """Browsers may send other types, or none, across sites without asking, so accepting them invites forgery."""
    if value is None:
        raise InvalidBodyError("There is no Content-Type; it must be application/json.", param="Content-Type")
    kind = value.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise InvalidBodyError(f"The Content-Type is {kind[:80]!r}; it must be application/json.", param="Content-Type")


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for item in level:
            members = item.values() if isinstance(item, dict) else item
            children += [member for member in members if isinstance(member, dict | list)]
        if not children:
            return
        level = children
    raise BodyTooDeepError(f"The JSON is nested deeper than {MAX_DEPTH} levels.")


def _json_name(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
