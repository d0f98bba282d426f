"""Requests without a valid key: the first of an address in a minute has a receipt, the others are counted in one more.

`server/books.py` asks before it writes. Who has no key can send thousands of requests a second, and each receipt takes
about 0.6 KB of the ledger for good; so a minute and address has two receipts at most, and a minute those of
`MAX_ADDRESSES` addresses and one for all others. Addresses of IPv6 are taken by their /64, which is what one machine
has to choose from.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

import msgspec

from vashista.engine.errors import InvalidKeyError
from vashista.server.ledger.receipt import Outcome, Receipt

MAX_ADDRESSES = 64
MINUTE_CHARS = len("2026-11-24T00:53")
OTHERS = "others"
"""The client of the receipt that counts all beyond MAX_ADDRESSES."""


@dataclass
class _Count:
    """Of one address in the minute, without its first request."""

    first: Receipt | None = None
    num_requests: int = 0
    endpoints: set[str] = field(default_factory=set)


class Strangers:
    """The counts of this minute. For use on the event loop."""

    def __init__(self) -> None:
        self._minute = ""
        self._counts: dict[str, _Count] = {}

    @staticmethod
    def concerns(receipt: Receipt) -> bool:
        """Whether it is of a request without a valid key."""
        return receipt.key_id is None and receipt.error_code == InvalidKeyError.code

    @property
    def num_counted(self) -> int:
        """Requests that wait for their common receipt."""
        return sum(count.num_requests for count in self._counts.values())

    def take(self, receipt: Receipt) -> list[Receipt]:
        """Receipts to write now: those of the last minute when another one has begun, and this one if it is a first."""
        due = []
        minute = receipt.time[:MINUTE_CHARS]
        if minute != self._minute:
            due = self.flush()
            self._minute = minute
        address = _network(receipt.client)
        if address not in self._counts and len(self._counts) < MAX_ADDRESSES:
            self._counts[address] = _Count()
            return [*due, receipt]
        count = self._counts.setdefault(address if address in self._counts else OTHERS, _Count())
        count.first = count.first or msgspec.structs.replace(receipt, client=address)
        count.num_requests += 1
        count.endpoints.add(receipt.endpoint)
        return due

    def flush(self) -> list[Receipt]:
        """The receipts that count the others, and forget them."""
        receipts = [
            msgspec.structs.replace(
                count.first,
                client=OTHERS if address == OTHERS else count.first.client,
                endpoint=count.first.endpoint if len(count.endpoints) == 1 else "other",
                parameters={"num_requests": count.num_requests},
                outcome=Outcome(),
            )
            for address, count in self._counts.items()
            if count.first is not None
        ]
        self._counts.clear()
        self._minute = ""
        return receipts


def _network(client: str) -> str:
    """The address, of IPv6 its /64."""
    if ":" not in client:
        return client
    try:
        return str(ipaddress.ip_network((client.partition("%")[0], 64), strict=False))
    except ValueError:
        return client
