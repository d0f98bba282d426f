"""What keys used since a moment, counted from the receipts: where `server/quotas.py` begins at a start.

Reads a few fields of each receipt, from the newest back: about six seconds a million, beside the engine's loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from vashista.engine.errors import ERRORS, LedgerDamagedError
from vashista.server.ledger.reader import reading
from vashista.server.ledger.receipt import utc_text

SLACK_S = 86400.0
"""Receipts stand in the order in which requests ended; none is thought to take longer than this."""
NUM_OLDER = 4096
"""So many older receipts without a younger one among them end the count: fewer may have come of a clock that was wrong
for a while, as a machine's is until its first answer from a time server."""


class Use(msgspec.Struct, frozen=True):
    """What one admitted request of a key used."""

    key_id: str
    time: str
    """Of arrival, as in the receipt."""
    num_tokens: int
    """Of prompt and output."""
    money_nano: int


SERVERS_FAULTS = frozenset(code for code, error in ERRORS.items() if error.http_status >= 500)
"""A request that ended so used nothing, as a dying engine's: `server/account.py` gives back what it held."""


class _Outcome(msgspec.Struct):
    cost_nano: int | None


class _Part(msgspec.Struct):
    time: str
    key_id: str | None
    num_prompt_tokens: int
    num_output_tokens: int
    outcome: _Outcome
    finish_reasons: tuple[str, ...]
    error_code: str | None


_decoder = msgspec.json.Decoder(_Part)


def uses_since(path: Path, since_s: float) -> Iterator[Use]:
    """Each request with a key that was admitted and arrived at this time or later; the newest first."""
    since, stop = utc_text(since_s), utc_text(max(0.0, since_s - SLACK_S))
    num_older = 0
    with reading(path) as connection:
        for seq, body in connection.execute("select seq, body from receipts order by seq desc"):
            try:
                part = _decoder.decode(body)
            except (msgspec.DecodeError, UnicodeDecodeError, TypeError) as error:
                raise LedgerDamagedError(f"Receipt {seq} cannot be read: {error}.") from error
            num_older = num_older + 1 if part.time < stop else 0
            if num_older >= NUM_OLDER:
                return
            if part.error_code in SERVERS_FAULTS:
                continue
            if part.key_id is not None and part.finish_reasons and part.time >= since:
                num_tokens = part.num_prompt_tokens + part.num_output_tokens
                yield Use(part.key_id, part.time, num_tokens, part.outcome.cost_nano or 0)
