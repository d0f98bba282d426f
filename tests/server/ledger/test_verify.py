from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from vashista.engine.errors import LedgerError, LedgerLogUnreadError
from vashista.server.ledger.chain import genesis, link
from vashista.server.ledger.ledger import Ledger
from vashista.server.ledger.prune import plan, prune
from vashista.server.ledger.receipt import Receipt
from vashista.server.ledger.signing import PublicKey, load_public
from vashista.server.ledger.verify import verify

Make = Callable[..., Receipt]
Check = Callable[..., dict[str, Any]]
NUM = 25


@pytest.fixture(scope="module")
def original(receipt: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    with Ledger(folder, checkpoint_rows=10, batch_rows=1) as ledger:
        for number in range(1, NUM + 1):
            ledger.append(receipt(number)).result()
    return folder / "ledger.db"


def tampered(original: Path, folder: str, change: Callable[[sqlite3.Connection], object]) -> Path:
    path = Path(folder) / "ledger.db"
    shutil.copy(original, path)
    connection = sqlite3.connect(path)
    change(connection)
    connection.commit()
    connection.close()
    return path


def statement(*parts: Any) -> Callable[[sqlite3.Connection], object]:
    return lambda connection: connection.execute(*parts)


def rechain(connection: sqlite3.Connection, begin: int) -> None:
    """What a forger without the key can do: make every hash fit again."""
    (ledger_id,) = connection.execute("select value from meta where name = 'ledger_id'").fetchone()
    end = genesis(ledger_id)
    for seq, body, stored in connection.execute("select seq, body, hash from receipts order by seq").fetchall():
        end = link(end, seq, body) if seq >= begin else stored
        connection.execute("update receipts set hash = ? where seq = ?", (end, seq))


def test_a_whole_ledger_is_intact(original: Path, check: Check) -> None:
    verdict = check(original, load_public(original.with_name("ledger.pub")))
    assert verdict["is_intact"]
    assert (verdict["first"], verdict["last"], verdict["num_checkpoints"]) == (1, NUM, 3)


seqs = st.integers(1, NUM)


@settings(max_examples=60, deadline=None)
@given(seq=seqs, column=st.sampled_from(["body", "hash"]), place=st.integers(0, 31), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_receipt_is_found(
    original: Path, check: Check, seq: int, column: str, place: int, bit: int
) -> None:
    def flip(connection: sqlite3.Connection) -> None:
        (old,) = connection.execute(f"select {column} from receipts where seq = ?", (seq,)).fetchone()
        new = bytearray(old)
        new[place] ^= 1 << bit
        connection.execute(f"update receipts set {column} = ? where seq = ?", (bytes(new), seq))

    with tempfile.TemporaryDirectory() as folder:
        damage = check(tampered(original, folder, flip))["damage"]
    assert (damage["kind"], damage["seq"]) == ("changed", seq)


@settings(max_examples=25, deadline=None)
@given(seq=seqs)
def test_every_deleted_receipt_is_found(original: Path, check: Check, seq: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = tampered(original, folder, statement("delete from receipts where seq = ?", (seq,)))
        damage = check(path)["damage"]
    assert (damage["kind"], damage["seq"]) == ("missing", seq)


@settings(max_examples=25, deadline=None)
@given(last=st.integers(0, NUM - 1), with_checkpoints=st.booleans())
def test_every_truncation_is_found(original: Path, check: Check, last: int, with_checkpoints: bool) -> None:
    def cut(connection: sqlite3.Connection) -> None:
        connection.execute("delete from receipts where seq > ?", (last,))
        if with_checkpoints:
            connection.execute("delete from checkpoints where seq > ?", (last,))

    with tempfile.TemporaryDirectory() as folder:
        damage = check(tampered(original, folder, cut))["damage"]
    assert (damage["kind"], damage["seq"]) == ("missing", last + 1)


@settings(max_examples=25, deadline=None)
@given(pair=st.tuples(seqs, seqs).filter(lambda pair: pair[0] < pair[1]), with_hash=st.booleans())
def test_every_swap_of_two_receipts_is_found(
    original: Path, check: Check, pair: tuple[int, int], with_hash: bool
) -> None:
    def swap(connection: sqlite3.Connection) -> None:
        columns = "body, hash" if with_hash else "body"
        rows = [connection.execute(f"select {columns} from receipts where seq = ?", (seq,)).fetchone() for seq in pair]
        for seq, row in zip(pair, reversed(rows), strict=True):
            assigned = "body = ?, hash = ?" if with_hash else "body = ?"
            connection.execute(f"update receipts set {assigned} where seq = ?", (*row, seq))

    with tempfile.TemporaryDirectory() as folder:
        damage = check(tampered(original, folder, swap))["damage"]
    assert (damage["kind"], damage["seq"]) == ("changed", pair[0])


@settings(max_examples=25, deadline=None)
@given(seq=st.integers(1, NUM + 1), rehash=st.booleans())
def test_every_inserted_receipt_is_found(original: Path, check: Check, seq: int, rehash: bool) -> None:
    def insert(connection: sqlite3.Connection) -> None:
        connection.execute("update receipts set seq = -seq where seq >= ?", (seq,))
        connection.execute("update receipts set seq = 1 - seq where seq < 0")
        connection.execute("insert into receipts values (?, '{}', zeroblob(32))", (seq,))
        if rehash:
            connection.execute("update receipts set body = cast(body as blob)")
            rechain(connection, seq)

    with tempfile.TemporaryDirectory() as folder:
        damage = check(tampered(original, folder, insert))["damage"]
    if not rehash:
        assert (damage["kind"], damage["seq"]) == ("changed", seq)
    elif seq == NUM + 1:
        assert (damage["kind"], damage["seq"]) == ("surplus", seq)
    else:
        assert (damage["kind"], damage["seq"]) == ("rewritten", (seq - 1) // 10 * 10 + 1)


@settings(max_examples=25, deadline=None)
@given(seq=seqs)
def test_an_edit_with_all_hashes_made_anew_is_found_by_the_next_signature(
    original: Path, check: Check, seq: int
) -> None:
    def forge(connection: sqlite3.Connection) -> None:
        connection.execute("update receipts set body = cast('{}' as blob) where seq = ?", (seq,))
        rechain(connection, seq)

    with tempfile.TemporaryDirectory() as folder:
        damage = check(tampered(original, folder, forge))["damage"]
    assert (damage["kind"], damage["seq"]) == ("rewritten", (seq - 1) // 10 * 10 + 1)


marks = st.sampled_from([("checkpoints", "seq = 10"), ("checkpoints", "seq = 25"), ("edges", "kind = 'head'")])


@settings(max_examples=60, deadline=None)
@given(
    mark=marks,
    column=st.sampled_from(["seq", "hash", "previous", "time", "signature"]),
    value=st.integers(-3, 40) | st.binary(max_size=70) | st.text(max_size=5) | st.floats(allow_nan=False),
)
def test_every_changed_signature_is_found(
    original: Path, check: Check, mark: tuple[str, str], column: str, value: Any
) -> None:
    table, row = mark

    def change(connection: sqlite3.Connection) -> None:
        try:
            connection.execute(f"update {table} set {column} = ? where {row}", (value,))
        except sqlite3.IntegrityError:  # the number is taken, or no whole number
            connection.execute(f"delete from {table} where {row}")

    with tempfile.TemporaryDirectory() as folder:
        path = tampered(original, folder, change)
        before, after = (dump(file, table) for file in (original, path))
        verdict = check(path)
    assert verdict["is_intact"] == (before == after)


def dump(path: Path, table: str) -> list[Any]:
    connection = sqlite3.connect(path)
    rows = connection.execute(f"select * from {table} order by 1").fetchall()
    connection.close()
    return rows


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (("delete from checkpoints where seq = 10",), "checkpoint"),
        (("delete from checkpoints where seq = 25",), "checkpoint"),
        (("delete from edges",), "head"),
        (("update meta set value = '2' where name = 'format'",), "format"),
        (("update meta set value = 'ff' where name = 'public_key'",), "key"),
        (("update meta set value = 'ff' where name = 'ledger_id'",), "changed"),
        (("update receipts set body = cast(body as text) where seq = 3",), "changed"),
        (("update receipts set seq = 99 where seq = 25",), "missing"),
        (("update receipts set seq = -1 where seq = 25",), "surplus"),
        (("drop table receipts",), "unreadable"),
        (("insert into checkpoints values (-5, zeroblob(32), 0, 'x', zeroblob(64))",), "checkpoint"),
        (("insert into edges values ('anchor', 5, zeroblob(32), 0, 'x', zeroblob(64))",), "anchor"),
    ],
)
def test_other_damage_has_a_name(
    original: Path, check: Check, tmp_path: Path, change: tuple[Any, ...], kind: str
) -> None:
    assert check(tampered(original, str(tmp_path), statement(*change)))["damage"]["kind"] == kind


def test_rows_of_a_table_without_its_key_are_checked_for_their_numbers(
    original: Path, check: Check, tmp_path: Path
) -> None:
    def loosen(connection: sqlite3.Connection) -> None:
        connection.execute("create table other as select * from receipts")
        connection.execute("drop table receipts")
        connection.execute("alter table other rename to receipts")
        connection.execute("insert into receipts select * from receipts where seq = 4")

    damage = check(tampered(original, str(tmp_path), loosen))["damage"]
    assert (damage["kind"], damage["seq"]) == ("surplus", 4)


def test_a_ledger_signed_anew_with_another_key_needs_the_right_key_to_be_found(
    original: Path, check: Check, tmp_path: Path, receipt: Make
) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append(receipt(1)).result()
    assert check(tmp_path / "ledger.db")["is_intact"]
    key = load_public(original.with_name("ledger.pub"))
    assert check(tmp_path / "ledger.db", key)["damage"]["kind"] == "key"
    stranger = PublicKey(Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    assert check(original, stranger)["damage"]["kind"] == "key"


def test_a_ledger_set_back_to_an_older_state_is_found_by_a_noted_hash(
    filled: Path, check: Check, receipt: Make
) -> None:
    older = filled.with_name("older.db")
    shutil.copy(filled / "ledger.db", older)
    with Ledger(filled) as ledger:
        ledger.append(receipt(26)).result()
    last = check(filled / "ledger.db")
    assert check(older)["is_intact"]
    noted = {last["last"]: last["hash"]}
    assert check(filled / "ledger.db", None, noted)["is_intact"]
    assert check(older, None, noted)["damage"]["kind"] == "noted"
    assert check(older, None, {7: "00" * 32})["damage"] == {
        "kind": "noted",
        "seq": 7,
        "message": "Receipt 7 or one before it is not what was noted.",
    }
    prune(filled, plan(filled / "ledger.db", through=9))
    assert check(filled / "ledger.db", None, {3: "00" * 32})["damage"]["kind"] == "noted"


def test_garbage_in_the_file_is_damage_and_no_file_is_an_error(original: Path, check: Check, tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"no database at all" * 100)
    assert check(path)["damage"]["kind"] == "unreadable"
    data = bytearray(original.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    path.write_bytes(data)
    assert not check(path)["is_intact"]
    with pytest.raises(LedgerError, match="There is no ledger"):
        verify(tmp_path / "none.db")


def test_a_log_that_cannot_be_read_is_no_damage(receipt: Make, standalone: ModuleType, tmp_path: Path) -> None:
    """As on a medium that cannot be written: there is no place for the index of the log."""
    copy = tmp_path / "copy"
    copy.mkdir()
    with Ledger(tmp_path / "state", batch_rows=1) as ledger:
        ledger.append(receipt(1)).result()
        for name in ("ledger.db", "ledger.db-wal"):
            shutil.copy(tmp_path / "state" / name, copy)
    (copy / "ledger.db-shm").symlink_to("nowhere")
    with pytest.raises(LedgerLogUnreadError, match=r"in ledger\.db-wal alone"):
        verify(copy / "ledger.db")
    with pytest.raises(standalone.UnreadLogError, match=r"ledger\.db-wal can be read only where"):
        standalone.verify(copy / "ledger.db")
    (copy / "ledger.db-shm").unlink()
    assert verify(copy / "ledger.db").num_receipts == 1
    assert standalone.verify(copy / "ledger.db")["num_receipts"] == 1


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_file_never_changes_what_is_read_unseen(
    original: Path, check: Check, place: int, bit: int
) -> None:
    data = bytearray(original.read_bytes())
    place %= len(data)
    data[place] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        path.write_bytes(data)
        verdict = check(path)
        if verdict["is_intact"]:
            assert dump(path, "receipts") == dump(original, "receipts")
