"""Checks a ledger from its first row to its last and names the first damage.

`vashista ledger verify` calls it. `deploy/verify_ledger.py` does the same with the standard library alone and gives
the same answers; docs/ledger.md describes what both do. One pass in one read transaction, in constant memory but for
the checkpoints (one in 4096 receipts); a server may go on writing meanwhile.
"""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import msgspec

from vashista.engine.errors import LedgerError, LedgerLogUnreadError
from vashista.server.ledger.chain import RECEIPT_DOMAIN, Mark, genesis
from vashista.server.ledger.signing import PublicKey
from vashista.server.ledger.store import FORMAT, open_readable


class Damage(msgspec.Struct, frozen=True):
    """The first thing that is wrong."""

    kind: str
    """unreadable, format, key, anchor, missing, surplus, changed, rewritten, checkpoint, head or noted."""
    seq: int
    """The receipt where it shows; 0 where it is no matter of one receipt."""
    message: str


class Verdict(msgspec.Struct, frozen=True):
    """What was found. `hash` is the chain's at receipt `last`: worth noting elsewhere, for a later `--noted`."""

    is_intact: bool
    num_receipts: int
    first: int
    last: int
    hash: str
    num_checkpoints: int
    fingerprint: str
    damage: Damage | None


class _Found(Exception):  # noqa: N818  (a way out, not an error)
    def __init__(self, kind: str, seq: int, message: str) -> None:
        super().__init__(message)
        self.damage = Damage(kind, seq, message)


def verify(path: Path, *, key: PublicKey | None = None, noted: dict[int, str] | None = None) -> Verdict:
    """The verdict on the database `path`.

    `key` is the key that must have signed it; without it the ledger's own word is taken. `noted` are hashes by
    number of receipt, written down earlier, that must still be there. LedgerError only if there is no file to open,
    or a log that cannot be read.
    """
    try:
        connection = open_readable(path)
    except LedgerError as error:
        if not path.is_file() or isinstance(error, LedgerLogUnreadError):
            raise
        return Verdict(False, 0, 0, 0, "", 0, "", Damage("unreadable", 0, _unreadable(error.__cause__)))
    check = _Check(connection, dict(noted or {}))
    damage = None
    try:
        connection.execute("begin")
        check.run(key)
    except _Found as found:
        damage = found.damage
    except sqlite3.Error as error:
        damage = Damage("unreadable", check.last + 1, _unreadable(error))
    finally:
        connection.close()
    fingerprint = check.key.fingerprint if check.key else ""
    count = check.last - check.start
    return Verdict(
        damage is None, count, check.start + 1, check.last, check.end.hex(), check.num_checkpoints, fingerprint, damage
    )


class _Check:
    def __init__(self, connection: sqlite3.Connection, noted: dict[int, str]) -> None:
        self._connection = connection
        self._noted = noted
        self.key: PublicKey | None = None
        self.start = self.last = self.num_checkpoints = 0
        self._ledger_id = ""
        self._previous = 0
        self.end = b""

    def run(self, expected: PublicKey | None) -> None:
        """Raise _Found at the first damage."""
        self._read_meta(expected)
        self.end = genesis(self._ledger_id)
        self._begin_at_anchor()
        marks = self._marks("checkpoint", "select seq, hash, previous, time, signature from checkpoints order by seq")
        for mark in marks:
            if mark.seq <= self.last:
                raise _Found("checkpoint", mark.seq, f"There is a checkpoint at {mark.seq} that was never made there.")
        self._read_receipts(marks)
        self._compare_head()
        for seq in sorted(self._noted):
            raise _Found("noted", seq, f"Receipt {seq} was noted, but the ledger does not reach it.")

    def _read_meta(self, expected: PublicKey | None) -> None:
        rows = self._connection.execute("select name, value from meta").fetchall()
        meta = {bytes(name): bytes(value) for name, value in rows if type(name) is type(value) is bytearray}
        if meta.get(b"format") != FORMAT.encode():
            raise _Found("format", 0, "The format is not one that this verifier knows.")
        try:
            raw = bytes.fromhex(meta.get(b"public_key", b"").decode())
            self._ledger_id = meta.get(b"ledger_id", b"").decode()
        except ValueError:
            raw = b""
        if len(raw) != 32:
            raise _Found("key", 0, "The ledger names no public key.")
        self.key = PublicKey(raw)
        if expected is not None and expected.raw != raw:
            raise _Found("key", 0, f"The ledger is signed by another key, {self.key.fingerprint}.")

    def _begin_at_anchor(self) -> None:
        query = "select seq, hash, previous, time, signature from edges where kind = 'anchor'"
        for anchor in self._marks("anchor", query):
            if not self._is_signed(anchor) or anchor.seq < 1:
                raise _Found("anchor", anchor.seq, f"The mark of what was pruned, up to {anchor.seq}, is not signed.")
            self.start = self.last = anchor.seq
            self.end, self._previous = anchor.hash, anchor.previous
        for seq in sorted(self._noted):
            if seq < self.start:
                raise _Found("noted", seq, f"Receipt {seq} was noted, but it was pruned.")
        self._compare_noted()

    def _marks(self, kind: str, query: str) -> list[Mark]:
        marks = []
        for seq, end, previous, made_at, signature in self._connection.execute(query):
            types = (type(seq), type(end), type(previous), type(made_at), type(signature))
            if types != (int, bytes, int, bytearray, bytes) or len(end) != 32:
                raise _Found(kind, 0, f"A row of kind {kind} is not of the right form.")
            text = made_at.decode("utf-8", "replace")
            marks.append(Mark(kind, seq, end, previous, text, signature))  # type: ignore[arg-type]
        return marks

    def _read_receipts(self, marks: list[Mark]) -> None:
        """The hot loop: a million rows in a few seconds."""
        sha256, pending = hashlib.sha256, iter(marks)
        mark = next(pending, None)
        last, end, noted = self.last, self.end, self._noted
        stops = {mark.seq for mark in marks} | set(noted)
        try:
            for seq, body, stored in self._connection.execute("select seq, body, hash from receipts order by seq"):
                if seq != last + 1 or type(seq) is not int:
                    raise _out_of_order(seq, last + 1)
                if type(body) is not bytes or type(stored) is not bytes:
                    raise _Found("changed", seq, f"Receipt {seq} was changed.")
                link = sha256(RECEIPT_DOMAIN + end + seq.to_bytes(8, "big") + body).digest()
                if link != stored:
                    raise _Found("changed", seq, f"Receipt {seq} was changed, or another stands in its place.")
                last, end = seq, link
                if seq in stops:
                    self.last, self.end = last, end
                    if mark is not None and mark.seq == seq:
                        self._compare_checkpoint(mark)
                        mark = next(pending, None)
                    self._compare_noted()
        finally:
            self.last, self.end = last, end
        if mark is not None:
            if not self._is_signed(mark):
                raise _Found("checkpoint", mark.seq, f"The checkpoint at {mark.seq} was changed.")
            raise _Found("missing", last + 1, f"Receipts {last + 1} to {mark.seq} or more are missing.")

    def _compare_checkpoint(self, mark: Mark) -> None:
        if not self._is_signed(mark):
            raise _Found("checkpoint", mark.seq, f"The checkpoint at {mark.seq} was changed.")
        if mark.previous != self._previous:
            raise _Found("checkpoint", mark.seq, f"Checkpoints between {self._previous} and {mark.seq} do not follow.")
        if mark.hash != self.end:
            begin = max(self._previous, self.start) + 1
            raise _Found("rewritten", begin, f"Receipts between {begin} and {mark.seq} were rewritten.")
        self._previous = mark.seq
        self.num_checkpoints += 1

    def _compare_head(self) -> None:
        query = "select seq, hash, previous, time, signature from edges where kind = 'head'"
        heads = self._marks("head", query)
        if len(heads) != 1 or not self._is_signed(heads[0]):
            raise _Found("head", self.last, "The signature of the ledger's end is missing or was changed.")
        head, last = heads[0], self.last
        if head.seq > last:
            raise _Found("missing", last + 1, f"Receipts {last + 1} to {head.seq} are missing.")
        if head.seq < last:
            raise _Found("surplus", head.seq + 1, f"Receipts {head.seq + 1} to {last} were added without a signature.")
        if head.previous != self._previous:
            raise _Found("checkpoint", head.previous, f"Checkpoints after {self._previous} do not follow.")
        if head.hash != self.end:
            begin = max(self._previous, self.start) + 1
            raise _Found("rewritten", begin, f"Receipts between {begin} and {last} were rewritten.")

    def _compare_noted(self) -> None:
        seq = self.last
        if self._noted.pop(seq, self.end.hex()) != self.end.hex():
            raise _Found("noted", seq, f"Receipt {seq} or one before it is not what was noted.")

    def _is_signed(self, mark: Mark) -> bool:
        assert self.key is not None
        return self.key.is_signature(mark.signature, mark.statement(self._ledger_id))


def _unreadable(cause: BaseException | None) -> str:
    return f"The database cannot be read on: {cause}."


def _out_of_order(seq: object, expected: int) -> _Found:
    if type(seq) is not int:
        return _Found("surplus", expected, f"Where receipt {expected} should be stands one without a whole number.")
    if seq > expected:
        return _Found("missing", expected, f"Receipts {expected} to {seq - 1} are missing.")
    return _Found("surplus", seq, f"There is a receipt {seq} where the chain expects {expected}.")
