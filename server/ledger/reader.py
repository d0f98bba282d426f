"""Reads receipts in order, a span of time or all: what `report.py`, `prune.py` and the export go over."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from vashista.engine.errors import LedgerDamagedError, LedgerOptionError
from vashista.server.ledger.receipt import Receipt, decode
from vashista.server.ledger.store import from_sqlite, open_readable

MAX_DIGITS = 18
_DATE = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d:\d\d(:\d\d(\.\d{1,6})?)?Z?)?)?)?", re.ASCII)
_FIRST_MOMENT = "0001-01-01T00:00:00"


def find(connection: sqlite3.Connection, request: str) -> list[tuple[int, bytes, bytes | None]]:
    """(number, body, sealed prompt) of the receipts with this request id; else of the receipt with this number.

    Clients may choose ids, so that several requests may have one. Looks through all receipts, about 1 s a million.
    """
    query = "select r.seq, r.body, p.box from receipts r left join prompts p on p.seq = r.seq where "
    needle = b'"request_id":' + json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogateescape")
    rows = connection.execute(query + "instr(r.body, ?) order by r.seq", (needle,)).fetchall()
    matches = [row for row in rows if decode(row[1], row[0]).request_id == request]
    if not matches and request.isascii() and request.isdigit() and len(request) <= MAX_DIGITS:
        matches = connection.execute(query + "r.seq = ?", (int(request),)).fetchall()
    return matches


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees one moment of the ledger, whatever is written meanwhile. LedgerError when it fails.

    What fails where the rows go, such as a file on a full disk, is none of the ledger's errors.
    """
    connection = open_readable(path)
    try:
        connection.execute("begin")
        yield connection
    except sqlite3.Error as error:
        raise from_sqlite(error, path) from error
    finally:
        connection.close()


def check_date(text: str, name: str) -> str:
    """A UTC date or time, or the beginning of one, as 2026-11 or 2026-11-24T12:00.

    LedgerOptionError for other text, and for what no calendar and no clock has: receipts are compared as text, so that
    such a date would silently be before some of them, and prune would delete those.
    """
    date = text.removesuffix("Z")
    try:
        if not _DATE.fullmatch(text):
            raise ValueError("it is no date")
        datetime.fromisoformat(date + _FIRST_MOMENT[len(date) :])
    except ValueError as error:
        raise LedgerOptionError(
            f"{name} is {text!r}: give a UTC date such as 2026-11, 2026-11-24 or 2026-11-24T12:00."
        ) from error
    return date


def rows(
    connection: sqlite3.Connection, *, since: str | None = None, until: str | None = None
) -> Iterator[tuple[int, bytes, bytes, Receipt]]:
    """(number, body, hash, receipt) of the requests that arrived from `since` on and before `until`, as dates."""
    for seq, body, end in connection.execute("select seq, body, hash from receipts order by seq"):
        if type(body) is not bytes or type(end) is not bytes:
            raise LedgerDamagedError(f"Receipt {seq} cannot be read: it is of another type.")
        receipt = decode(body, seq)
        if (since is None or receipt.time >= since) and (until is None or receipt.time < until):
            yield seq, body, end, receipt
