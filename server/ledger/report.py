"""Sums of the ledger by key, model, endpoint, day or month, for `vashista ledger report`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import msgspec

from vashista.server.ledger.receipt import Receipt

Group = Literal["key", "model", "endpoint", "day", "month"]

_GROUPS: dict[Group, Callable[[Receipt], str]] = {
    "key": lambda receipt: receipt.key_id or "-",
    "model": lambda receipt: receipt.model,
    "endpoint": lambda receipt: receipt.endpoint,
    "day": lambda receipt: receipt.day,
    "month": lambda receipt: receipt.month,
}


class Line(msgspec.Struct):
    """One group. Money is in billionths of its currency; a group has one line for each currency in it."""

    group: tuple[str, ...]
    currency: str
    num_requests: int = 0
    num_refused: int = 0
    num_failed: int = 0
    """Began, but ended with an error or because the client left."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    busy_s: float = 0.0
    energy_j: float = 0.0
    cost_nano: int = 0

    def add(self, receipt: Receipt) -> None:
        """Count one receipt."""
        outcome = receipt.outcome
        self.num_requests += receipt.num_requests
        if not receipt.finish_reasons:
            self.num_refused += receipt.num_requests
        elif receipt.error_code is not None or not {"abort", "error"}.isdisjoint(receipt.finish_reasons):
            self.num_failed += 1
        self.num_prompt_tokens += receipt.num_prompt_tokens
        self.num_cached_tokens += receipt.num_cached_tokens
        self.num_output_tokens += receipt.num_output_tokens
        self.busy_s += outcome.busy_s or 0.0
        self.energy_j += outcome.energy_j or 0.0
        self.cost_nano += outcome.cost_nano or 0


def report(receipts: Iterable[Receipt], by: Sequence[Group]) -> list[Line]:
    """The lines, sorted by group; a single line over everything if `by` is empty and there are receipts."""
    keys = [_GROUPS[group] for group in by]
    lines: dict[tuple[str, ...], Line] = {}
    for receipt in receipts:
        group = tuple(key(receipt) for key in keys)
        currency = receipt.outcome.currency or "-"
        line = lines.get((*group, currency))
        if line is None:
            line = lines[(*group, currency)] = Line(group, currency)
        line.add(receipt)
    return [lines[group] for group in sorted(lines)]


def money_text(cost_nano: int) -> str:
    """12300000000 as 12.300000000."""
    sign = "-" if cost_nano < 0 else ""
    return f"{sign}{abs(cost_nano) // 10**9}.{abs(cost_nano) % 10**9:09d}"


def as_json(lines: Sequence[Line], by: Sequence[Group]) -> str:
    """A list of objects, one a line."""
    return json.dumps([_row(line, by) for line in lines], indent=2)


def as_csv(lines: Sequence[Line], by: Sequence[Group]) -> str:
    """With a line of headings, as RFC 4180."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=_headings(by))
    writer.writeheader()
    for line in lines:
        writer.writerow({name: _safe_cell(value) for name, value in _row(line, by).items()})
    return text.getvalue()


def as_table(lines: Sequence[Line], by: Sequence[Group]) -> str:
    """Columns for a terminal, numbers to the right."""
    headings = _headings(by)
    cells = [[name.removeprefix("num_") for name in headings]]
    for line in lines:
        row = _row(line, by)
        cells.append([f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in headings])
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    num_left = len(by) + 1
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < num_left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _headings(by: Sequence[Group]) -> list[str]:
    return [*by, "currency", *Line.__struct_fields__[2:-1], "cost"]


def _row(line: Line, by: Sequence[Group]) -> dict[str, Any]:
    values: dict[str, Any] = dict(zip(by, line.group, strict=True))
    values |= {name: getattr(line, name) for name in ("currency", *Line.__struct_fields__[2:-1])}
    return values | {"cost": money_text(line.cost_nano)}


def _safe_cell(value: object) -> object:
    """A spreadsheet would run a text that begins like a formula."""
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "@", "\t", "\r") else value
