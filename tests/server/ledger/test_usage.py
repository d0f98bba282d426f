from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vashista.engine.errors import LedgerDamagedError
from vashista.engine.messages import FinishReason
from vashista.server.ledger import usage
from vashista.server.ledger.ledger import Ledger
from vashista.server.ledger.receipt import Outcome, Receipt, utc_text
from vashista.server.ledger.usage import SLACK_S, Use, uses_since

NOW_S = 1_790_000_000.0


def test_admitted_requests_of_keys_are_counted_from_the_newest_back(
    tmp_path: Path, receipt: Callable[..., Receipt]
) -> None:
    with Ledger(tmp_path) as ledger:
        for changes in (
            {"time": utc_text(NOW_S - SLACK_S - 1), "key_id": "never read"},
            {"time": utc_text(NOW_S - 1), "key_id": "before"},
            {"time": utc_text(NOW_S), "key_id": "a"},
            {"key_id": None},
            {"finish_reasons": (), "error_code": "queue_full"},
            {"finish_reasons": (FinishReason.ABORT,), "error_code": "client_gone", "num_output_tokens": 1},
            {"finish_reasons": (FinishReason.ERROR,), "error_code": "engine_died"},
            {"finish_reasons": (FinishReason.ERROR,), "error_code": "draining"},
            {"time": utc_text(NOW_S + 5), "outcome": Outcome()},
        ):
            ledger.append(receipt(1, **{"time": utc_text(NOW_S + 1), **changes})).result()
    assert list(uses_since(tmp_path / "ledger.db", NOW_S)) == [
        Use("4f0c2a9be1d7", utc_text(NOW_S + 5), 15, 0),
        Use("4f0c2a9be1d7", utc_text(NOW_S + 1), 13, 1500),
        Use("a", utc_text(NOW_S), 15, 1500),
    ]


def test_receipts_written_while_the_clock_was_wrong_do_not_end_the_count(
    tmp_path: Path, receipt: Callable[..., Receipt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "NUM_OLDER", 3)
    days = {"old": -40, "now": 0, "wrong": -400, "counted": 0}
    with Ledger(tmp_path) as ledger:
        for key_id in ("now", "old", "old", "old", "counted", "wrong", "wrong", "now"):
            time = utc_text(NOW_S + 86400 * days[key_id])
            ledger.append(receipt(1, time=time, key_id=key_id)).result()
    assert [use.key_id for use in uses_since(tmp_path / "ledger.db", NOW_S)] == ["now", "counted"]


def test_an_empty_ledger_has_no_uses_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert list(uses_since(ledger.path, NOW_S)) == []
    ledger._writer.write([b'{"time":5}'])
    with pytest.raises(LedgerDamagedError, match="Receipt 1"):
        list(uses_since(ledger.path, NOW_S))
    ledger.close()
