"""One check of `vashista selftest`: what it is called, how it ends, and what to do when it fails.

`engine/selftest.py` lists the checks, the command runs one after the other and prints each result as it comes. A check
is a function that returns a line of what it saw, or raises: `CheckFailed` with what is wrong, `CheckSkipped` with why
it cannot be made here. Anything else that it raises is a failure too: a kernel that crashes is what is looked for. No
torch here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from vashista.engine.errors import VashistaError


class Status(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """It does not apply to this machine or model; nothing is wrong."""


class CheckFailed(Exception):  # noqa: N818 - it says what happened to a check, not an error of the caller's
    """What was checked is wrong; the text says what was seen and what should have been."""


class CheckSkipped(Exception):  # noqa: N818
    """The check does not apply here; the text says why."""


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table."""

    name: str
    status: Status
    detail: str
    """What was seen; for a failure what is wrong, for a check that was skipped why."""
    remedy: str | None
    """Of a failure."""
    took_s: float


@dataclass(frozen=True)
class Check:
    """One thing to look at."""

    name: str
    look: Callable[[], str]
    remedy: str
    """What to do if it fails with no remedy of its own."""

    def run(self, clock: Callable[[], float] = time.monotonic) -> CheckResult:
        """Look, and say how it ended; raises nothing but what ends the process."""
        started_s = clock()
        status, remedy = Status.PASSED, None
        try:
            detail = self.look()
        except CheckSkipped as reason:
            status, detail = Status.SKIPPED, str(reason)
        except CheckFailed as problem:
            status, detail, remedy = Status.FAILED, str(problem), self.remedy
        except VashistaError as error:
            status, detail, remedy = Status.FAILED, f"{error.code}: {error.message}", error.remedy
        except Exception as error:  # whatever breaks here would break a request
            status, detail, remedy = Status.FAILED, f"{type(error).__name__}: {error}", self.remedy
        return CheckResult(name=self.name, status=status, detail=detail, remedy=remedy, took_s=clock() - started_s)
