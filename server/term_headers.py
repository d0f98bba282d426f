"""What a request demands of its run, said in headers: for clients that cannot add fields to a body.

`server/body.py` asks `with_terms` for every body whose request has the field `vashista`; `x-vashista-deadline-s: 20`
becomes `vashista.deadline_s` there, and is then checked as if it had stood in the body. A header of this beginning that
is not known, or says what the body says too, is an error: nothing of it is dropped or outvoted.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.datastructures import Headers

from vashista.engine.errors import InvalidRequestError

PREFIX = "x-vashista-"
FIELDS = {
    "deadline-s": "deadline_s",
    "max-cost": "max_cost",
    "adapt": "adapt",
    "stop-at-deadline": "stop_at_deadline",
}
"""Fields of `VashistaOptions` by what follows the prefix; the values are written as in JSON."""


def with_terms(value: dict[str, Any], headers: Headers) -> dict[str, Any]:
    """A body with what the headers add to it. InvalidRequestError for a header that is unknown, no JSON, or given
    twice."""
    found: dict[str, Any] = {}
    for name, text in headers.items():
        if not name.startswith(PREFIX):
            continue
        field = FIELDS.get(name.removeprefix(PREFIX))
        if field is None:
            known = ", ".join(PREFIX + suffix for suffix in FIELDS)
            raise InvalidRequestError(f"Unknown header {name[:80]!r}; there are {known}.", param=name[:80])
        if field in found:
            raise InvalidRequestError(f"The header {name} is there twice.", param=name)
        found[field] = _read(name, text)
    if not found:
        return value
    options = value.get("vashista")
    if options is None:
        options = {}
    if not isinstance(options, dict):
        return value  # wrong, as its schema will say
    twice = [field for field in found if field in options]
    if twice:
        raise InvalidRequestError(
            f"{twice[0]} stands both in the header {_header_of(twice[0])} and in vashista.{twice[0]}; leave one out.",
            param=_header_of(twice[0]),
        )
    return value | {"vashista": options | found}


def _read(name: str, text: str) -> Any:
    try:
        value = msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, ValueError, RecursionError):
        value = None
    if not isinstance(value, int | float):  # a bool is one
        raise InvalidRequestError(
            f"The header {name} is {text[:80]!r}; it must be a number, or true or false.", param=name
        )
    return value


def _header_of(field: str) -> str:
    return next(PREFIX + suffix for suffix, name in FIELDS.items() if name == field)
