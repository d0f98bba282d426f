from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable

import pytest

from vashista.engine.messages import FinishReason
from vashista.server.ledger.receipt import Outcome, Receipt
from vashista.server.ledger.report import as_csv, as_json, as_table, money_text, report

Make = Callable[..., Receipt]


@pytest.fixture
def receipts(receipt: Make) -> list[Receipt]:
    return [
        receipt(0),
        receipt(1),
        receipt(2, key_id=None, finish_reasons=(), error_code="queue_full", outcome=Outcome()),
        receipt(3, finish_reasons=(FinishReason.STOP, FinishReason.ABORT)),
        receipt(24 * 30, model="=other"),
    ]


def test_sums_by_key_are_right_and_apart_by_currency(receipts: list[Receipt]) -> None:
    other, own = report(receipts, ("key",))
    assert (other.group, other.currency, other.num_requests, other.num_refused) == (("-",), "-", 1, 1)
    assert (own.group, own.currency, own.num_requests, own.num_refused, own.num_failed) == (
        ("4f0c2a9be1d7",),
        "EUR",
        4,
        0,
        1,
    )
    assert (own.num_prompt_tokens, own.num_cached_tokens, own.num_output_tokens) == (48, 16, 12)
    assert (own.busy_s, own.cost_nano) == (2.0, 6000)


def test_groups_may_be_combined_and_every_request_is_in_one_line(receipts: list[Receipt]) -> None:
    for by in ((), ("day",), ("month", "key"), ("model", "endpoint", "key")):
        assert sum(line.num_requests for line in report(receipts, by)) == len(receipts)
    assert {line.group for line in report(receipts, ("month",))} == {("2026-09",), ("2026-10",)}
    assert report([], ("key",)) == []


def test_json_csv_and_table_say_the_same(receipts: list[Receipt]) -> None:
    by = ("model", "day")
    lines = report(receipts, by)
    rows = json.loads(as_json(lines, by))
    table = [line.split() for line in as_table(lines, by).splitlines()]
    assert [row["num_requests"] for row in rows] == [line.num_requests for line in lines]
    for row, cells, written in zip(rows, table[1:], csv.DictReader(io.StringIO(as_csv(lines, by))), strict=True):
        assert written["cost"] == row["cost"] == cells[-1]
        assert int(written["num_requests"]) == row["num_requests"] == int(cells[3])


def test_a_spreadsheet_gets_no_formula_from_a_name(receipts: list[Receipt]) -> None:
    assert "\r\n'=other," in as_csv(report(receipts, ("model",)), ("model",))


def test_money_is_exact() -> None:
    assert [money_text(value) for value in (0, 1, 12_300_000_000, -1)] == [
        "0.000000000",
        "0.000000001",
        "12.300000000",
        "-0.000000001",
    ]
