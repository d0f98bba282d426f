"""What one request took, and its canonical bytes: the row of the ledger.

`server/account.py` fills in a `Receipt` when a request ends or is refused and hands it to `Ledger.append`; the bytes
that `encode` makes are what is hashed, signed and stored. Reports and exports read them back with `decode`. Prompts and
outputs are never part of a receipt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from vashista.engine.errors import InvalidReceiptError, LedgerDamagedError
from vashista.engine.messages import AttentionMode, FinishReason, SupportReport

MAX_BYTES = 256 << 10
"""Longest canonical form of a receipt. A usual one has about 1 KB."""
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


class Outcome(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the request took. None where it did not come so far, or where nothing measures it."""

    queue_s: float | None = None
    """Arrival until the engine first ran it."""
    ttft_s: float | None = None
    """Arrival until the first token."""
    total_s: float | None = None
    """Arrival until the end."""
    busy_s: float | None = None
    """Its share of the engine's busy time."""
    energy_j: float | None = None
    energy_source: Literal["nvml", "rapl", "model"] | None = None
    cost_nano: int | None = None
    """Money in billionths of `currency`: whole numbers, so that sums are exact."""
    currency: str | None = None


class Receipt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One HTTP request that was admitted or refused. The order of the fields is the order of the canonical form."""

    v: Literal[1] = 1
    """Version of this form."""
    time: str
    """Arrival in UTC, as `utc_text` writes it."""
    request_id: str
    key_id: str | None
    """Id of the API key; None where the server asks for none."""
    client: str
    """Address of the client, as the server saw it."""
    endpoint: str
    model: str
    model_digest: str | None
    parameters: dict[str, Any]
    """As the request ran, defaults filled in; without the prompt and any other text of the client."""
    prompt_hash: str | None = None
    """SHA-256 of the sealed body of the request, where prompts are kept."""
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    attention: AttentionMode
    support: SupportReport | None = None
    prediction: dict[str, Any] | None = None
    """What was said before it ran."""
    outcome: Outcome
    finish_reasons: tuple[FinishReason, ...] = ()
    """One a choice; none if it was refused."""
    error_code: str | None = None
    """Why it was refused, or failed while it ran."""

    @property
    def num_requests(self) -> int:
        """1, but for a receipt that counts refused requests (`server/strangers.py`)."""
        number = self.parameters.get("num_requests")
        return number if isinstance(number, int) and not self.finish_reasons else 1

    @property
    def day(self) -> str:
        """The UTC day of arrival, as 2026-11-24."""
        return self.time[:10]

    @property
    def month(self) -> str:
        """The UTC month of arrival, as 2026-11."""
        return self.time[:7]


_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(Receipt)


def utc_text(unix_s: float) -> str:
    """Seconds since 1970 as `2026-11-24T00:53:49.123456Z`: always 27 characters, so that texts sort as times do."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def encode(receipt: Receipt) -> bytes:
    """The canonical bytes; InvalidReceiptError says what cannot be written."""
    if not _TIME.fullmatch(receipt.time):
        raise InvalidReceiptError(f"The time {receipt.time!r} is not like 2026-11-24T00:53:49.123456Z.", param="time")
    if not receipt.finish_reasons and receipt.error_code is None:
        raise InvalidReceiptError("A receipt needs a finish reason or an error code.", param="finish_reasons")
    if min(receipt.num_prompt_tokens, receipt.num_cached_tokens, receipt.num_output_tokens) < 0:
        raise InvalidReceiptError("Counts of tokens cannot be negative.", param="num_prompt_tokens")
    # msgspec would write null for NaN and infinity.
    for name in ("outcome", "support", "prediction", "attention", "parameters"):
        if not _is_finite(getattr(receipt, name)):
            raise InvalidReceiptError(f"{name} holds a number that is not finite.", param=name)
    try:
        body = _encoder.encode(receipt)
    except (UnicodeEncodeError, OverflowError, TypeError) as error:
        raise InvalidReceiptError(f"The receipt cannot be written as JSON: {error}.") from error
    if len(body) > MAX_BYTES:
        raise InvalidReceiptError(f"The receipt has {len(body)} bytes; at most {MAX_BYTES} are possible.")
    return body


def decode(body: bytes, seq: int) -> Receipt:
    """The receipt of row `seq`; LedgerDamagedError if the bytes are none."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LedgerDamagedError(f"Receipt {seq} cannot be read: {error}.") from error


def _is_finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    if isinstance(value, msgspec.Struct):
        return all(_is_finite(getattr(value, name)) for name in value.__struct_fields__)
    return True
