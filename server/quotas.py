"""Holds API keys to their limits: counts what each key used, reserves what its running requests may still use.

Admission takes a `Hold` for each request, and its account settles it when the receipt is written. At the start the
counts are read from the ledger (`server/ledger/usage.py`); from then on they are kept here, so that they are what
counting the receipts again would give.

Requests and tokens never exceed their limit: a request holds its prompt and the most that it may generate until it
ends. What money a request takes is known at its end alone: it holds the fixed price, and a key is refused once its
limit is reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vashista.engine.errors import KeyLimitError, QuotaExceededError, RateLimitError
from vashista.server.keys import Key
from vashista.server.ledger.receipt import utc_text
from vashista.server.ledger.usage import Use
from vashista.server.limits import Limit, Resource, Window, amount_text

BUSY_RETRY_S = 2.0
"""When only running requests stand in the way: they may end at any time."""


@dataclass
class Count:
    """What a key used in the window that began at `begin_s`, and what its running requests hold."""

    begin_s: float = -1.0
    end_s: float = -1.0
    used: dict[Resource, int] = field(default_factory=lambda: dict.fromkeys(Resource, 0))
    held: dict[Resource, int] = field(default_factory=lambda: dict.fromkeys(Resource, 0))


class Hold:
    """One request's entry. `settle` or `cancel` it once; later calls do nothing."""

    __slots__ = ("_amounts", "_counts", "_is_open")

    def __init__(self, counts: list[Count], amounts: dict[Resource, int]) -> None:
        self._counts = counts
        self._amounts = amounts
        self._is_open = True
        for count in counts:
            for resource, amount in amounts.items():
                count.held[resource] += amount

    def settle(self, *, num_tokens: int, money_nano: int) -> None:
        """The request ended; this is what it used."""
        used = {Resource.REQUESTS: 1, Resource.TOKENS: num_tokens, Resource.MONEY: money_nano}
        self._close(used)

    def cancel(self) -> None:
        """The request never ran."""
        self._close({})

    def _close(self, used: dict[Resource, int]) -> None:
        if not self._is_open:
            return
        self._is_open = False
        for count in self._counts:
            for resource, amount in self._amounts.items():
                count.held[resource] -= amount
            for resource, amount in used.items():
                count.used[resource] += amount


class Quotas:
    """The counts of all keys. For use on the event loop."""

    def __init__(self, *, price_per_request_nano: int = 0, clock: Callable[[], float] = time.time) -> None:
        self._price_nano = price_per_request_nano
        self._clock = clock
        self._counts: dict[tuple[str, Window], list[Count]] = {}

    def load(self, uses: Iterable[Use]) -> None:
        """Count what the ledger has of this month; before the first request."""
        now_s = self._clock()
        spans = {window: tuple(map(utc_text, window.span(now_s))) for window in Window}
        for use in uses:
            for window, (begin, end) in spans.items():
                if begin <= use.time < end:  # such texts sort as times do
                    count = self._count(use.key_id, window, now_s)
                    count.used[Resource.REQUESTS] += 1
                    count.used[Resource.TOKENS] += use.num_tokens
                    count.used[Resource.MONEY] += use.money_nano

    def check(self, key: Key | None) -> None:
        """What `admit` would raise even for a request without tokens: before work is done for it."""
        hold = self.admit(key, 0)
        if hold is not None:
            hold.cancel()

    def admit(self, key: Key | None, num_tokens: int) -> Hold | None:
        """Let a request of at most so many tokens in. KeyLimitError, RateLimitError or QuotaExceededError."""
        if key is None:
            return None
        now_s = self._clock()
        asked = {Resource.REQUESTS: 1, Resource.TOKENS: num_tokens, Resource.MONEY: self._price_nano}
        refusals = [
            refusal for limit in key.limits if (refusal := self._refusal(key, limit, asked[limit.resource], now_s))
        ]
        if refusals:
            raise max(refusals, key=lambda error: getattr(error, "retry_after_s", float("inf")))
        return Hold([self._count(key.id, window, now_s) for window in Window], asked)

    def headers(self, key: Key | None) -> dict[str, str]:
        """OpenAI's x-ratelimit headers, of the limit of each kind that is nearest to its end; {} without limits."""
        if key is None or not key.limits:
            return {}
        now_s = self._clock()
        headers = {}
        for resource in (Resource.REQUESTS, Resource.TOKENS):
            limits = [limit for limit in key.limits if limit.resource is resource]
            if not limits:
                continue
            left = {limit: self._left(key, limit, now_s) for limit in limits}
            nearest = min(limits, key=lambda limit: (left[limit] / max(limit.amount, 1), limit))
            reset_s = self._count(key.id, nearest.window, now_s).end_s - now_s
            headers[f"x-ratelimit-limit-{resource}"] = str(nearest.amount)
            headers[f"x-ratelimit-remaining-{resource}"] = str(left[nearest])
            headers[f"x-ratelimit-reset-{resource}"] = duration_text(reset_s)
        return headers

    def _left(self, key: Key, limit: Limit, now_s: float) -> int:
        count = self._count(key.id, limit.window, now_s)
        return max(0, limit.amount - count.used[limit.resource] - count.held[limit.resource])

    def _refusal(self, key: Key, limit: Limit, asked: int, now_s: float) -> KeyLimitError | RateLimitError | None:
        count = self._count(key.id, limit.window, now_s)
        used, held = count.used[limit.resource], count.held[limit.resource]
        # Money must not have run out; the others must suffice. Where nothing is allowed, no waiting helps.
        least = max(asked, 1) if limit.resource is Resource.MONEY or limit.amount == 0 else asked
        if used + held + least <= limit.amount:
            return None
        if least > limit.amount:
            amount = amount_text(limit.resource, least)
            return KeyLimitError(
                f"This request asks for {amount} {limit.resource}; the key {key.id} may use {limit.text}."
            )
        waits_for_others = used + least <= limit.amount
        retry_after_s = min(BUSY_RETRY_S, count.end_s - now_s) if waits_for_others else count.end_s - now_s
        running = f" and hold {amount_text(limit.resource, held)} for running ones" if held else ""
        kind = RateLimitError if limit.window is Window.MINUTE else QuotaExceededError
        return kind(
            f"The requests of the key {key.id} used {amount_text(limit.resource, used)}{running} of its {limit.text}; "
            f"this one asks for {amount_text(limit.resource, least)}.",
            retry_after_s=retry_after_s,
        )

    def _count(self, key_id: str, window: Window, now_s: float) -> Count:
        """Of the window that holds this moment. The last two are kept: a clock that is set forward by mistake, and
        back, must not wipe out what a key used."""
        counts = self._counts.setdefault((key_id, window), [])
        for count in counts:
            if count.begin_s <= now_s < count.end_s:
                return count
        counts.append(Count(*window.span(now_s)))
        del counts[:-2]
        return counts[-1]


def duration_text(seconds: float) -> str:
    """As OpenAI writes it: `59s`, `6m0s`, `3h0m5s`; whole seconds, rounded up."""
    whole = max(0, -int(-seconds // 1))
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
