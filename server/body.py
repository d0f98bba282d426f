"""Reads a request's body: bounded, UTF-8, one JSON object, of sane depth. Every route with a body asks `Bodies` for it.

The server reads bodies itself so that a hostile one costs little: nothing beyond `max_body_bytes` is kept of one, nor
sixteen times that of all; what has more than `max_body_values` is not decoded, and parsing never raises anything but a
`VashistaError`. The decoded object becomes a request
in `server/schemas/fields.py`; what a request for a completion asks goes into its account, for the receipt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope

from vashista.engine.errors import BodyTooDeepError, BodyTooLargeError, InvalidBodyError, QueueFullError
from vashista.server.account import account_of
from vashista.server.body_values import NUMBERS, has_more_values, most_values
from vashista.server.schemas.fields import Model, parse
from vashista.server.schemas.sampling import CommonFields
from vashista.server.term_headers import with_terms
from vashista.server.turns import Turns

MAX_DEPTH = 64
BODIES_HELD = 16
"""So many of the largest bodies may be in memory at a time; a client alone could send thousands, each a byte short."""
FREE_BYTES = 64 << 10
"""Of each body that do not count, so that usual requests are answered whatever others send."""
RETRY_S = 5.0
HELD = "held_body_bytes"
"""The name in a request's state."""
BIG_BODY_BYTES = 256 << 10
MANY_VALUES = 4096
"""From either on the body is parsed in a thread, so that other streams do not halt: 256 KiB of text take about 1 ms,
4,096 values 2 to 3 (two cores, AMD EPYC)."""


class Bodies:
    """Reads bodies and counts the bytes of those that are not answered yet. One for a server, on its event loop."""

    def __init__(self, max_body_bytes: int, max_values: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._max_values = max_values
        self._max_held_bytes = BODIES_HELD * max_body_bytes
        self._turn = asyncio.Lock()
        self._big = Turns()
        self.num_held_bytes = 0
        """Of all bodies, beyond the FREE_BYTES that each may have."""

    async def read(self, request: Request, model: type[Model]) -> Model:
        """The body as `model`. BodyTooLargeError, QueueFullError, InvalidBodyError, BodyTooDeepError, or what `parse`
        raises."""
        return await self.read_as(request, lambda value: model)

    async def read_as(self, request: Request, choose: Callable[[dict[str, Any]], type[Model]]) -> Model:
        """The same for a route that takes more than one kind: `choose` sees the JSON object and says which it is."""
        _check_content_type(request.headers.get("content-type"))
        body = await self._read(request)
        async with self._turn:
            await asyncio.sleep(0)  # one request a round of the loop: of thousands at once, each lets others through

        def parse_body() -> Model:
            if has_more_values(body, self._max_values):
                raise BodyTooLargeError(
                    f"The body has more than {self._max_values} strings, lists and objects, or than "
                    f"{NUMBERS * self._max_values} values in all; no more are accepted (max_body_values)."
                )
            value = decode_object(body)
            chosen = choose(value)
            return parse(chosen, with_terms(value, request.headers) if "vashista" in chosen.model_fields else value)

        if len(body) < BIG_BODY_BYTES and most_values(body) < MANY_VALUES:
            await _check_client(request)
            parsed = parse_body()
        else:
            async with self._big.of(len(body)):  # threads that parse keep the interpreter to themselves
                await _check_client(request)
                parsed = await asyncio.to_thread(parse_body)
        if isinstance(parsed, CommonFields):
            await account_of(request).ask(parsed, body)
        return parsed

    def release(self, scope: Scope) -> None:
        """The request has its reply."""
        self.num_held_bytes -= scope["state"].pop(HELD, 0)

    async def _read(self, request: Request) -> bytearray:
        length, most = request.headers.get("content-length"), self._max_body_bytes
        # The HTTP parser has checked that the length is a number.
        if length is not None and int(length) > most:
            raise BodyTooLargeError(f"The body has {length} bytes; at most {most} are accepted (max_body_bytes).")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise BodyTooLargeError(f"The body has more than {most} bytes; no more are accepted (max_body_bytes).")
            self._hold(request.scope["state"], len(body) - FREE_BYTES)
        return body

    def _hold(self, state: dict[str, Any], num_bytes: int) -> None:
        num_new = num_bytes - state.get(HELD, 0)
        if num_new <= 0:
            return
        if self.num_held_bytes + num_new > self._max_held_bytes:
            raise QueueFullError(
                f"The server holds {self.num_held_bytes >> 20} MiB of other requests' bodies; until some are answered "
                "it takes small ones alone.",
                retry_after_s=RETRY_S,
            )
        self.num_held_bytes += num_new
        state[HELD] = num_bytes


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


async def _check_client(request: Request) -> None:
    """ClientDisconnect if nobody waits any more: thousands that have left, or a dozen large ones, cost nothing more."""
    if await request.is_disconnected():
        raise ClientDisconnect


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
