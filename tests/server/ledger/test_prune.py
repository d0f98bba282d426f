from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vashista.engine.errors import LedgerError, LedgerOptionError
from vashista.server.cli import run
from vashista.server.ledger import prune as pruning
from vashista.server.ledger.ledger import Ledger
from vashista.server.ledger.prune import plan, prune
from vashista.server.ledger.receipt import Receipt

Make = Callable[..., Receipt]
Check = Callable[..., dict[str, Any]]


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 30), max_size=3, unique=True).map(sorted), num_later=st.integers(0, 12))
def test_what_stays_is_whole_and_the_chain_goes_on_wherever_it_was_cut(
    tmp_path_factory: pytest.TempPathFactory, receipt: Make, check: Check, cuts: list[int], num_later: int
) -> None:
    folder = tmp_path_factory.mktemp("state")
    with Ledger(folder, checkpoint_rows=10, batch_rows=1) as ledger:
        for number in range(30):
            ledger.append(receipt(number)).result()
    for cut in cuts:
        prune(folder, plan(folder / "ledger.db", through=cut))
        assert check(folder / "ledger.db")["is_intact"]
    with Ledger(folder, checkpoint_rows=10, batch_rows=1) as ledger:
        for number in range(num_later):
            ledger.append(receipt(number)).result()
    verdict = check(folder / "ledger.db")
    assert verdict["is_intact"]
    assert verdict["first"] == max(cuts, default=0) + 1
    assert verdict["last"] == 30 + num_later


def test_receipts_before_a_date_go_and_no_other(filled: Path, receipt: Make) -> None:
    path = filled / "ledger.db"
    planned = plan(path, before=receipt(8).time)
    assert (planned.first, planned.last, planned.next_time) == (1, 7, receipt(8).time)
    assert plan(path, before="2000-01-01").num_receipts == 0
    assert plan(path, before="2100-01-01") == pruning.Plan(1, 25, None)


def test_a_receipt_that_arrived_later_but_ended_earlier_is_kept(tmp_path: Path, receipt: Make) -> None:
    with Ledger(tmp_path) as ledger:
        for number in (1, 9, 2):
            ledger.append(receipt(number)).result()
    assert plan(tmp_path / "ledger.db", before=receipt(5).time).last == 1


def test_receipts_dated_in_the_future_stop_pruning_and_the_plan_says_what_is_behind_them(
    tmp_path: Path, receipt: Make
) -> None:
    path, future = tmp_path / "ledger.db", 9000
    with Ledger(tmp_path) as ledger:
        for number in (1, 2, future, 3, future, 4, future, 50, 5):
            ledger.append(receipt(number)).result()
    planned = plan(path, before=receipt(10).time, latest=receipt(100).time)
    assert planned == pruning.Plan(1, 2, receipt(future).time, 6)
    assert plan(path, before=receipt(10).time, latest=receipt(future).time) == pruning.Plan(1, 2, receipt(future).time)
    assert plan(path, before=receipt(51).time, latest=receipt(100).time).last_behind == 9
    assert plan(path, through=6, latest=receipt(100).time) == pruning.Plan(1, 6, receipt(future).time)


def test_a_misdated_first_receipt_is_an_error_with_the_command_that_helps(
    tmp_path: Path, receipt: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    with Ledger(tmp_path) as ledger:
        for time in ("9999-01-01T00:00:00.000000Z", "2020-01-01T00:00:00.000000Z", "2020-01-02T00:00:00.000000Z"):
            ledger.append(receipt(1, time=time)).result()
    state = ["--yes", "--state-dir", str(tmp_path)]
    assert run(["ledger", "prune", "--keep-days", "30", *state]) == 1
    error = capfd.readouterr().err
    assert "error[ledger_misdated]: Receipt 1 is dated 9999" in error
    assert "prune --through 3" in error
    assert run(["ledger", "prune", "--through", "3", *state]) == 0


def test_pruned_contents_are_gone_from_the_file(tmp_path: Path, receipt: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "CHUNK_ROWS", 7)
    with Ledger(tmp_path) as ledger:
        for number in range(200):
            ledger.append(receipt(number, client="secret-address" if number < 150 else "other")).result()
    size = (tmp_path / "ledger.db").stat().st_size
    prune(tmp_path, plan(tmp_path / "ledger.db", through=150))
    files = b"".join(path.read_bytes() for path in tmp_path.glob("ledger.db*"))
    assert b"secret-address" not in files
    assert (tmp_path / "ledger.db").stat().st_size < size / 2


def test_a_running_server_goes_on_writing_while_it_is_pruned(tmp_path: Path, receipt: Make, check: Check) -> None:
    with Ledger(tmp_path, checkpoint_rows=10) as ledger:
        for number in range(30):
            ledger.append(receipt(number)).result()
        waiting = [ledger.append(receipt(number)) for number in range(200)]
        prune(tmp_path, plan(tmp_path / "ledger.db", through=25))
        assert [future.result() for future in waiting] == list(range(31, 231))
    verdict = check(tmp_path / "ledger.db")
    assert verdict["is_intact"]
    assert (verdict["first"], verdict["last"]) == (26, 230)


def test_rows_deleted_by_someone_without_the_key_are_no_pruning(filled: Path, check: Check) -> None:
    connection = sqlite3.connect(filled / "ledger.db")
    row = connection.execute("select * from checkpoints where seq = 10").fetchone()
    connection.execute("insert into edges values ('anchor', ?, ?, ?, ?, ?)", row)
    connection.execute("delete from receipts where seq <= 10")
    connection.execute("delete from checkpoints where seq <= 10")
    connection.commit()
    connection.close()
    assert check(filled / "ledger.db")["damage"]["kind"] == "anchor"


def test_a_number_that_is_not_there_and_a_folder_without_a_ledger_are_named(filled: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerOptionError, match="holds the receipts 1 to 25"):
        plan(filled / "ledger.db", through=26)
    with pytest.raises(LedgerError, match="no ledger"):
        prune(tmp_path / "none", pruning.Plan(1, 1, None))
