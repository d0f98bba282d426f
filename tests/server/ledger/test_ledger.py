from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from vashista.engine.errors import (
    InvalidReceiptError,
    LedgerClosedError,
    LedgerDamagedError,
    LedgerFullError,
    LedgerKeyError,
    LedgerLockedError,
    LedgerNewerError,
    LedgerOverloadedError,
    LedgerReadOnlyError,
)
from vashista.server.ledger import signing, writer
from vashista.server.ledger.ledger import Ledger
from vashista.server.ledger.reader import reading, rows
from vashista.server.ledger.receipt import Receipt

Make = Callable[..., Receipt]
Check = Callable[..., dict[str, Any]]
DEADLINE_S = 60.0


def wait(futures: list[Future[int]]) -> list[int]:
    return [future.result(DEADLINE_S) for future in futures]


def stored(folder: Path) -> list[str]:
    with reading(folder / "ledger.db") as connection:
        return [receipt.request_id for *_, receipt in rows(connection)]


@pytest.fixture
def locker(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Opens the ledger's file as a stranger would; begin with `begin immediate` to lock it."""
    connection = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    yield connection
    connection.close()


def test_receipts_get_numbers_without_gaps_in_the_order_of_append(tmp_path: Path, receipt: Make, check: Check) -> None:
    with Ledger(tmp_path, checkpoint_rows=100, batch_rows=64) as ledger:
        futures = [ledger.append(receipt(number)) for number in range(1, 301)]
        assert wait(futures) == list(range(1, 301))
    assert stored(tmp_path) == [f"request-{number}" for number in range(1, 301)]
    verdict = check(tmp_path / "ledger.db")
    assert verdict["is_intact"]
    assert verdict["num_checkpoints"] >= 3


def test_receipts_of_many_threads_are_all_there(tmp_path: Path, receipt: Make, check: Check) -> None:
    with Ledger(tmp_path) as ledger:

        def work(base: int) -> None:
            wait([ledger.append(receipt(base + number)) for number in range(50)])

        threads = [threading.Thread(target=work, args=(1000 * index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(stored(tmp_path))) == 200
    assert check(tmp_path / "ledger.db")["is_intact"]


def test_a_ledger_opened_again_goes_on_with_the_same_key(filled: Path, receipt: Make, check: Check) -> None:
    with Ledger(filled) as ledger:
        fingerprint = ledger.public_key.fingerprint
        assert ledger.append(receipt(26)).result(DEADLINE_S) == 26
    verdict = check(filled / "ledger.db")
    assert verdict["is_intact"]
    assert verdict["fingerprint"] == fingerprint


def test_only_the_owner_can_read_ledger_and_key(filled: Path) -> None:
    assert (filled / "ledger.db").stat().st_mode & 0o777 == 0o600
    assert (filled / "ledger.key").stat().st_mode & 0o777 == 0o600


def test_a_checkpoint_is_signed_after_its_seconds_too(tmp_path: Path, receipt: Make, check: Check) -> None:
    with Ledger(tmp_path, checkpoint_s=0.0) as ledger:
        for number in range(3):
            ledger.append(receipt(number)).result(DEADLINE_S)
    assert check(tmp_path / "ledger.db")["num_checkpoints"] == 3


def test_an_invalid_receipt_is_refused_at_once_and_the_others_are_written(tmp_path: Path, receipt: Make) -> None:
    with Ledger(tmp_path) as ledger:
        with pytest.raises(InvalidReceiptError):
            ledger.append(receipt(1, time="today"))
        assert ledger.append(receipt(2)).result(DEADLINE_S) == 1


def test_a_closed_ledger_takes_no_receipt_and_closes_twice(tmp_path: Path, receipt: Make) -> None:
    ledger = Ledger(tmp_path)
    waiting = ledger.append(receipt(1))
    ledger.close()
    ledger.close()
    assert waiting.result(0) == 1
    with pytest.raises(LedgerClosedError):
        ledger.append(receipt(2))
    with pytest.raises(LedgerClosedError):
        ledger.check()


def test_a_locked_ledger_fails_its_receipts_and_recovers_by_itself(
    tmp_path: Path, receipt: Make, check: Check, request: pytest.FixtureRequest
) -> None:
    with Ledger(tmp_path, busy_timeout_s=0.05, retry_s=0.01) as ledger:
        wait([ledger.append(receipt(1))])
        locker = request.getfixturevalue("locker")
        locker.execute("begin immediate")
        with pytest.raises(LedgerLockedError):
            ledger.append(receipt(2)).result(DEADLINE_S)
        with pytest.raises(LedgerLockedError):
            ledger.check()
        assert ledger.num_failed_total == 1
        locker.execute("rollback")
        done = threading.Event()
        while ledger.failure is not None:
            done.wait(0.01)
        ledger.check()
        assert wait([ledger.append(receipt(3))]) == [2]
    assert stored(tmp_path) == ["request-1", "request-3"]
    assert check(tmp_path / "ledger.db")["is_intact"]


def test_a_full_queue_refuses_at_once(tmp_path: Path, receipt: Make, request: pytest.FixtureRequest) -> None:
    with Ledger(tmp_path, busy_timeout_s=30.0, queue_rows=3, batch_rows=1) as ledger:
        locker = request.getfixturevalue("locker")
        locker.execute("begin immediate")
        futures: list[Future[int]] = []

        def append_six() -> None:  # one is being written, three wait
            futures.extend(ledger.append(receipt(number)) for number in range(6))

        with pytest.raises(LedgerOverloadedError):
            append_six()
        with pytest.raises(LedgerOverloadedError):
            ledger.check()
        locker.execute("rollback")
        wait(futures)


def test_a_removed_database_is_no_place_for_receipts(tmp_path: Path, receipt: Make) -> None:
    ledger = Ledger(tmp_path, retry_s=30.0)
    wait([ledger.append(receipt(1))])
    (tmp_path / "ledger.db").rename(tmp_path / "away.db")
    with pytest.raises(LedgerDamagedError, match="removed or replaced"):
        ledger.append(receipt(2)).result(DEADLINE_S)
    with pytest.raises(LedgerDamagedError):
        ledger.close()


@pytest.mark.parametrize(
    "change",
    ["update edges set signature = zeroblob(64)", "delete from receipts where seq = 25", "delete from edges"],
)
def test_a_ledger_with_a_damaged_end_is_not_opened(filled: Path, change: str) -> None:
    connection = sqlite3.connect(filled / "ledger.db")
    connection.execute(change)
    connection.commit()
    connection.close()
    with pytest.raises(LedgerDamagedError):
        Ledger(filled)


def test_a_head_forged_while_the_server_runs_is_not_built_on(tmp_path: Path, receipt: Make) -> None:
    ledger = Ledger(tmp_path, retry_s=30.0)
    wait([ledger.append(receipt(1))])
    forger = sqlite3.connect(tmp_path / "ledger.db")
    forger.execute("update edges set seq = 7")
    forger.commit()
    forger.close()
    with pytest.raises(LedgerDamagedError, match="signature"):
        ledger.append(receipt(2)).result(DEADLINE_S)
    with pytest.raises(LedgerDamagedError):
        ledger.close()


def test_two_processes_with_the_key_write_one_chain(tmp_path: Path, receipt: Make, check: Check) -> None:
    with Ledger(tmp_path) as one, Ledger(tmp_path) as other:
        for number in range(10):
            wait([(one if number % 2 else other).append(receipt(number))])
    verdict = check(tmp_path / "ledger.db")
    assert verdict["is_intact"]
    assert verdict["num_receipts"] == 10


def test_a_ledger_is_begun_and_checked_under_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two servers would each make a key, and one that writes would look like damage to one that opens."""
    seen = []

    def spied(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            other = sqlite3.connect(tmp_path / "ledger.db", timeout=0)
            with contextlib.closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("begin immediate")
            seen.append(name)
            return original(*arguments)

        return call

    monkeypatch.setattr(signing, "make_signing", spied("make", signing.make_signing))
    monkeypatch.setattr(writer, "read_meta", spied("meta", writer.read_meta))
    monkeypatch.setattr(writer, "read_mark", spied("mark", writer.read_mark))
    Ledger(tmp_path).close()
    assert seen[:4] == ["meta", "make", "mark", "mark"]


@pytest.mark.parametrize("known", [None, "another's"])
def test_the_public_key_is_written_anew_where_it_is_missing_or_wrong(
    filled: Path, known: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = filled / "ledger.pub"
    good = path.read_bytes()
    path.unlink()
    if known is not None:
        path.write_text(known)
    Ledger(filled).close()
    assert path.read_bytes() == good
    assert len(caplog.records) == (known is not None)


def test_a_key_that_is_lost_exchanged_damaged_or_open_to_others_is_named(filled: Path, tmp_path: Path) -> None:
    key = filled / "ledger.key"
    good = key.read_bytes()
    key.unlink()
    with pytest.raises(LedgerKeyError, match="cannot be read"):
        Ledger(filled)
    key.write_bytes(b"nothing")
    key.chmod(0o600)
    with pytest.raises(LedgerKeyError, match="not a private key"):
        Ledger(filled)
    Ledger(tmp_path / "other").close()
    key.write_bytes((tmp_path / "other" / "ledger.key").read_bytes())
    with pytest.raises(LedgerKeyError, match="not the one"):
        Ledger(filled)
    key.write_bytes(good)
    key.chmod(0o640)
    with pytest.raises(LedgerKeyError, match="0640"):
        Ledger(filled)
    key.chmod(0o600)
    Ledger(filled).close()


def test_a_file_that_is_no_database_and_a_newer_layout_are_named(tmp_path: Path, filled: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"no database" * 100)
    with pytest.raises(LedgerDamagedError):
        Ledger(tmp_path)
    connection = sqlite3.connect(filled / "ledger.db")
    connection.execute("insert into migrations values (99, 'later', '')")
    connection.commit()
    connection.close()
    with pytest.raises(LedgerNewerError, match="newer version"):
        Ledger(filled)


@pytest.mark.parametrize(("found", "error"), [("2", LedgerNewerError), ("x", LedgerDamagedError)])
def test_nothing_is_written_into_a_chain_of_another_format(filled: Path, found: str, error: type[Exception]) -> None:
    """The server did, and both verifiers refused what it wrote."""
    connection = sqlite3.connect(filled / "ledger.db")
    connection.execute("update meta set value = ? where name = 'format'", (found,))
    connection.commit()
    before = connection.execute("select count(*), max(hash) from receipts").fetchone()
    with pytest.raises(error, match="format"):
        Ledger(filled)
    assert connection.execute("select count(*), max(hash) from receipts").fetchone() == before
    connection.close()


def test_readers_see_whole_ledgers_while_it_is_written(tmp_path: Path, receipt: Make, check: Check) -> None:
    with Ledger(tmp_path, checkpoint_rows=50) as ledger:
        is_over = threading.Event()

        def write() -> None:
            number = 0
            while not is_over.is_set():
                wait([ledger.append(receipt(number + index)) for index in range(20)])
                number += 20

        writer = threading.Thread(target=write)
        writer.start()
        try:
            seen = [check_running(tmp_path / "ledger.db")]
            while len(seen) < 20 or seen[-1] == seen[0]:  # on a busy machine 20 readings may precede the first receipt
                seen.append(check_running(tmp_path / "ledger.db"))
        finally:
            is_over.set()
            writer.join()
    assert seen == sorted(seen)
    assert check(tmp_path / "ledger.db")["is_intact"]


def check_running(path: Path) -> int:
    from vashista.server.ledger.verify import verify

    verdict = verify(path)
    assert verdict.damage is None
    return verdict.num_receipts


CHILD = """
import json, resource, sys
from pathlib import Path
from vashista.engine.errors import LedgerError
from vashista.engine.messages import DENSE
from vashista.server.ledger.ledger import Ledger
from vashista.server.ledger.receipt import Outcome, Receipt, utc_text

assert "torch" not in sys.modules
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
ledger = Ledger(folder, retry_s=60.0, batch_rows=8)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for number in range(100000):
    receipt = Receipt(
        time=utc_text(1.79e9 + number), request_id=str(number), key_id=None, client="::1", endpoint="/v1/completions",
        model="m", model_digest=None, parameters={"filler": "x" * 2000}, num_prompt_tokens=1, num_cached_tokens=0,
        num_output_tokens=1, attention=DENSE, outcome=Outcome(), error_code="draining",
    )
    try:
        seq = ledger.append(receipt).result()
    except LedgerError as error:
        print(json.dumps([number, error.code]), flush=True)
        break
    print(number, flush=True)
sys.stdout.flush()
import os
os._exit(0)
"""


def write_until_it_fails(folder: Path, limit: int) -> tuple[int, str]:
    """(receipts that were acknowledged, code of the error after them)."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(limit)], capture_output=True, text=True, check=True
    )
    *_, last = child.stdout.splitlines()
    number, code = json.loads(last)
    return number, code


def test_a_file_that_may_not_grow_loses_no_acknowledged_receipt(tmp_path: Path, check: Check) -> None:
    num_acknowledged, code = write_until_it_fails(tmp_path, 400_000)
    assert code in ("ledger_full", "ledger_unavailable")
    assert num_acknowledged > 10
    assert len(stored(tmp_path)) == num_acknowledged
    assert check(tmp_path / "ledger.db")["is_intact"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_has_its_name_and_loses_no_acknowledged_receipt(tmp_path: Path, check: Check) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a file system")
    try:
        num_acknowledged, code = write_until_it_fails(folder, 0)
        assert code == LedgerFullError.code
        assert num_acknowledged > 10
        assert len(stored(folder)) == num_acknowledged
        assert check(folder / "ledger.db")["is_intact"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")
def test_a_ledger_on_a_read_only_disk_is_named_and_can_be_verified(tmp_path: Path, filled: Path, check: Check) -> None:
    mounted = subprocess.run(["mount", "--bind", str(filled), str(filled)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a file system")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(filled)], check=True)
        with pytest.raises(LedgerReadOnlyError):
            Ledger(filled)
        assert check(filled / "ledger.db")["is_intact"]
    finally:
        subprocess.run(["umount", str(filled)], check=True)
