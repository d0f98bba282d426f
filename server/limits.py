"""Limits of API keys: how many requests, tokens and how much money in a minute, a day, a month.

`vashista keys limit` sets them, `server/keys.py` stores them, `server/quotas.py` holds requests to them. Windows are
those of the calendar in UTC, so that what was used can be counted again from the ledger after a restart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from enum import StrEnum

from vashista.engine.errors import KeyOptionError
from vashista.server.prices import NANO

MAX_AMOUNT, MAX_MONEY = 10**15, 10**9


class Window(StrEnum):
    """A stretch of the calendar."""

    MINUTE = "minute"
    DAY = "day"
    MONTH = "month"

    def span(self, unix_s: float) -> tuple[float, float]:
        """Begin and end of the one that holds this moment, in seconds since 1970."""
        now = datetime.fromtimestamp(unix_s, UTC)
        if self is Window.MINUTE:
            begin = now.replace(second=0, microsecond=0)
            return begin.timestamp(), begin.timestamp() + 60
        day = now.replace(hour=0, minute=0, second=0, microsecond=0)
        if self is Window.DAY:
            return day.timestamp(), (day + timedelta(days=1)).timestamp()
        begin = day.replace(day=1)
        return begin.timestamp(), (begin + timedelta(days=32)).replace(day=1).timestamp()


class Resource(StrEnum):
    """What is limited. Tokens are those of prompts and outputs; money is in billionths of the currency."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    MONEY = "money"


@dataclass(frozen=True, order=True)
class Limit:
    """At most `amount` of a resource in a window."""

    resource: Resource
    window: Window
    amount: int

    @property
    def text(self) -> str:
        """As `vashista keys` prints it: `60 requests/minute`."""
        return f"{amount_text(self.resource, self.amount)} {self.resource}/{self.window}"


def amount_text(resource: Resource, amount: int) -> str:
    """Money in the currency, the others as they are."""
    if resource is not Resource.MONEY:
        return str(amount)
    text = f"{Decimal(amount) / NANO:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def parse_limit(resource: Resource, text: str) -> tuple[Window, int | None]:
    """(window, amount) of `60/minute`; the amount of `none/minute` is None and lifts the limit. KeyOptionError."""
    match = re.fullmatch(r"([^/]+)/(minute|day|month)", text.strip())
    if match is None:
        raise _bad(resource, text, "give an amount and a window, such as 60/minute, or none/minute")
    window = Window(match[2])
    if match[1] == "none":
        return window, None
    is_money = resource is Resource.MONEY
    most = MAX_MONEY if is_money else MAX_AMOUNT
    try:
        value = Decimal(match[1])
    except InvalidOperation:
        raise _bad(resource, text, f"{match[1]!r} is not a number") from None
    if not value.is_finite() or not 0 <= value <= most:
        raise _bad(resource, text, f"the amount should be from 0 to {most}")
    amount = value * NANO if is_money else value
    if amount != amount.to_integral_value():
        raise _bad(resource, text, f"the amount has {'more than nine decimals' if is_money else 'a fraction'}")
    return window, int(amount)


def limits_text(limits: Iterable[Limit]) -> str:
    """All of them in one line; `-` for none."""
    return ", ".join(limit.text for limit in sorted(limits)) or "-"


def _bad(resource: Resource, text: str, reason: str) -> KeyOptionError:
    return KeyOptionError(f"--{resource} is {text!r}: {reason}.", param=resource)
