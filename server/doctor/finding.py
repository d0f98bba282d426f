"""One line of `vashista doctor`: what was looked at, how it is, and what would help.

The checks in this folder return findings; `server/commands/doctor.py` prints them, `server/doctor/attestation.py` signs
them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import msgspec


class State(StrEnum):
    """How it is."""

    OK = "ok"
    NOT_OK = "not ok"
    NOT_CHECKED = "not checked"
    """There is nothing to check here, or it cannot be checked; the detail says why."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check found."""

    name: str
    state: State
    detail: str
    remedy: str | None = None
    """What to do; there for every NOT_OK."""


Check = Callable[[], Finding]


def ok(name: str, detail: str) -> Finding:
    """Looked at, and as it should be."""
    return Finding(name=name, state=State.OK, detail=detail)


def not_ok(name: str, detail: str, remedy: str) -> Finding:
    """Looked at, and not as it should be."""
    return Finding(name=name, state=State.NOT_OK, detail=detail, remedy=remedy)


def not_checked(name: str, detail: str) -> Finding:
    """Not looked at, and why."""
    return Finding(name=name, state=State.NOT_CHECKED, detail=detail)
