"""Verifies a ledger of Vashista with Python's standard library alone: copy this file and ledger.db anywhere.

    python3 verify_ledger.py ledger.db [--key ledger.pub | --fingerprint HEX] [--noted SEQ:HASH ...] [--json]

Exit status: 0 intact, 1 damaged, 2 wrong use. The format is in docs/ledger.md. It says the same as `vashista ledger
verify`, but shares no code with it: Ed25519 is below, after RFC 8032, section 5.1 (about 3 ms a signature).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import pathlib
import sqlite3
import sys
from typing import Any

# --- Ed25519 ----------------------------------------------------------------------------------------------------------

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
ROOT = pow(2, (P - 1) // 4, P)

Point = tuple[int, int, int, int]


def add(a: Point, b: Point) -> Point:
    """Sum of two points in extended coordinates (X, Y, Z, T)."""
    e = (a[1] - a[0]) * (b[1] - b[0]) % P
    f = (a[1] + a[0]) * (b[1] + b[0]) % P
    g = 2 * a[3] * b[3] * D % P
    h = 2 * a[2] * b[2] % P
    e, f, g, h = f - e, h - g, h + g, f + e
    return e * f % P, g * h % P, f * g % P, e * h % P


def decompress(data: bytes) -> Point | None:
    """The point of 32 bytes, or None."""
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & ((1 << 255) - 1)
    if y >= P:
        return None
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * ROOT % P
    if (x * x - square) % P or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = P - x
    return x, y, 1, x * y % P


BASE = decompress((4 * pow(5, P - 2, P) % P).to_bytes(32, "little"))


def is_signature(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the 64 bytes are the signature of the message: S*B - h*A must be R."""
    key = decompress(public)
    s = int.from_bytes(signature[32:], "little")
    if key is None or BASE is None or len(signature) != 64 or s >= L:
        return False
    h = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % L
    minus = (P - key[0], key[1], 1, P - key[3])
    # Both products at once, a bit of each a step (Shamir's trick).
    table = {(1, 0): BASE, (0, 1): minus, (1, 1): add(BASE, minus)}
    total: Point = (0, 1, 1, 0)
    for bit in range(max(s.bit_length(), h.bit_length()) - 1, -1, -1):
        total = add(total, total)
        bits = (s >> bit & 1, h >> bit & 1)
        if bits != (0, 0):
            total = add(total, table[bits])
    inverse = pow(total[2], P - 2, P)
    x, y = total[0] * inverse % P, total[1] * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little") == signature[:32]


# --- the ledger -------------------------------------------------------------------------------------------------------

COLUMNS = "seq, hash, previous, time, signature"


class Damage(Exception):  # noqa: N818
    """The first thing that is wrong: kind, number of the receipt, sentence."""


class Ledger:
    """One pass over one database."""

    def __init__(self, connection: sqlite3.Connection, noted: dict[int, str]) -> None:
        self.db = connection
        self.noted = noted
        self.key = b""
        self.ledger_id = ""
        self.start = self.last = self.previous = self.num_checkpoints = 0
        self.end = b""

    def check(self, fingerprint: str | None) -> None:
        """Raise Damage at the first one."""
        self.read_meta(fingerprint)
        self.end = hashlib.sha256(b"vashista-ledger-v1\n" + self.ledger_id.encode()).digest()
        self.read_anchor()
        checkpoints = self.marks("checkpoint", f"select {COLUMNS} from checkpoints order by seq")
        for mark in checkpoints:
            if mark[0] <= self.last:
                raise Damage("checkpoint", mark[0], f"There is a checkpoint at {mark[0]} that was never made there.")
        for seq, body, stored in self.db.execute("select seq, body, hash from receipts order by seq"):
            self.read_receipt(seq, body, stored)
            if checkpoints and checkpoints[0][0] == seq:
                self.compare_checkpoint(*checkpoints.pop(0))
            self.compare_noted()
        if checkpoints:
            seq = checkpoints[0][0]
            if not self.is_signed("checkpoint", *checkpoints[0]):
                raise Damage("checkpoint", seq, f"The checkpoint at {seq} was changed.")
            first = self.last + 1
            raise Damage("missing", first, f"Receipts {first} to {seq} or more are missing.")
        self.compare_head()
        for seq in sorted(self.noted):
            raise Damage("noted", seq, f"Receipt {seq} was noted, but the ledger does not reach it.")

    def read_meta(self, fingerprint: str | None) -> None:
        rows = self.db.execute("select name, value from meta").fetchall()
        meta = {bytes(name): bytes(value) for name, value in rows if type(name) is type(value) is bytearray}
        if meta.get(b"format") != b"1":
            raise Damage("format", 0, "The format is not one that this verifier knows.")
        try:
            key = bytes.fromhex(meta.get(b"public_key", b"").decode())
            self.ledger_id = meta.get(b"ledger_id", b"").decode()
        except ValueError:
            key = b""
        if len(key) != 32:
            raise Damage("key", 0, "The ledger names no public key.")
        self.key = key
        if fingerprint is not None and fingerprint != self.fingerprint():
            raise Damage("key", 0, f"The ledger is signed by another key, {self.fingerprint()}.")

    def fingerprint(self) -> str:
        return hashlib.sha256(self.key).hexdigest() if self.key else ""

    def read_anchor(self) -> None:
        for mark in self.marks("anchor", f"select {COLUMNS} from edges where kind = 'anchor'"):
            if not self.is_signed("anchor", *mark) or mark[0] < 1:
                raise Damage("anchor", mark[0], f"The mark of what was pruned, up to {mark[0]}, is not signed.")
            self.start = self.last = mark[0]
            self.end, self.previous = mark[1], mark[2]
        for seq in sorted(self.noted):
            if seq < self.start:
                raise Damage("noted", seq, f"Receipt {seq} was noted, but it was pruned.")
        self.compare_noted()

    def marks(self, kind: str, query: str) -> list[tuple[int, bytes, int, str, bytes]]:
        found = []
        for row in self.db.execute(query):
            if tuple(map(type, row)) != (int, bytes, int, bytearray, bytes) or len(row[1]) != 32:
                raise Damage(kind, 0, f"A row of kind {kind} is not of the right form.")
            found.append((*row[:3], row[3].decode("utf-8", "replace"), row[4]))
        return found

    def read_receipt(self, seq: object, body: object, stored: object) -> None:
        first = self.last + 1
        if type(seq) is not int:
            raise Damage("surplus", first, f"Where receipt {first} should be stands one without a whole number.")
        if seq > first:
            raise Damage("missing", first, f"Receipts {first} to {seq - 1} are missing.")
        if seq < first:
            raise Damage("surplus", seq, f"There is a receipt {seq} where the chain expects {first}.")
        if type(body) is not bytes or type(stored) is not bytes:
            raise Damage("changed", seq, f"Receipt {seq} was changed.")
        link = hashlib.sha256(b"vashista-receipt-v1\n" + self.end + seq.to_bytes(8, "big") + body).digest()
        if link != stored:
            raise Damage("changed", seq, f"Receipt {seq} was changed, or another stands in its place.")
        self.last, self.end = seq, link

    def compare_checkpoint(self, seq: int, end: bytes, previous: int, time: str, signature: bytes) -> None:
        if not self.is_signed("checkpoint", seq, end, previous, time, signature):
            raise Damage("checkpoint", seq, f"The checkpoint at {seq} was changed.")
        if previous != self.previous:
            raise Damage("checkpoint", seq, f"Checkpoints between {self.previous} and {seq} do not follow.")
        if end != self.end:
            first = max(self.previous, self.start) + 1
            raise Damage("rewritten", first, f"Receipts between {first} and {seq} were rewritten.")
        self.previous = seq
        self.num_checkpoints += 1

    def compare_head(self) -> None:
        heads = self.marks("head", f"select {COLUMNS} from edges where kind = 'head'")
        last = self.last
        if len(heads) != 1 or not self.is_signed("head", *heads[0]):
            raise Damage("head", last, "The signature of the ledger's end is missing or was changed.")
        seq, end, previous = heads[0][:3]
        if seq > last:
            raise Damage("missing", last + 1, f"Receipts {last + 1} to {seq} are missing.")
        if seq < last:
            raise Damage("surplus", seq + 1, f"Receipts {seq + 1} to {last} were added without a signature.")
        if previous != self.previous:
            raise Damage("checkpoint", previous, f"Checkpoints after {self.previous} do not follow.")
        if end != self.end:
            first = max(self.previous, self.start) + 1
            raise Damage("rewritten", first, f"Receipts between {first} and {last} were rewritten.")

    def compare_noted(self) -> None:
        if self.noted and self.noted.pop(self.last, self.end.hex()) != self.end.hex():
            raise Damage("noted", self.last, f"Receipt {self.last} or one before it is not what was noted.")

    def is_signed(self, kind: str, seq: int, end: bytes, previous: int, time: str, signature: bytes) -> bool:
        parts = ("vashista-mark-v1", self.ledger_id, kind, seq, end.hex(), previous, time)
        return is_signature(self.key, signature, "".join(f"{part}\n" for part in parts).encode())


class UnreadLogError(Exception):
    """Nothing can be said of a ledger whose newest receipts cannot be read."""


def connect(path: pathlib.Path) -> sqlite3.Connection:
    """Open for reading; a file on a medium that cannot be written is taken as it is if it has no log."""
    address = f"{path.resolve().as_uri()}?mode=ro"
    connection = sqlite3.connect(address, uri=True, isolation_level=None)
    try:
        connection.execute("select count(*) from sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        log = path.with_name(path.name + "-wal")
        if log.exists() and log.stat().st_size:
            if "unable to open" in str(error) and all(os.access(file, os.R_OK) for file in (path, log)):
                raise UnreadLogError(
                    f"{log.name} can be read only where something can be written beside it: copy it and {path.name} "
                    "together into such a folder, and verify the copy"
                ) from error
            raise
        connection = sqlite3.connect(f"{address}&immutable=1", uri=True, isolation_level=None)
    connection.text_factory = bytearray  # tells text from blobs
    return connection


def verify(path: pathlib.Path, fingerprint: str | None = None, noted: dict[int, str] | None = None) -> dict[str, Any]:
    """The verdict, as `vashista ledger verify --json` prints it."""
    damage = None
    ledger = None
    try:
        connection = connect(path)
        ledger = Ledger(connection, dict(noted or {}))
        connection.execute("begin")
        ledger.check(fingerprint)
    except Damage as found:
        damage = dict(zip(("kind", "seq", "message"), found.args, strict=True))
    except sqlite3.Error as error:
        seq = ledger.last + 1 if ledger else 0
        damage = {"kind": "unreadable", "seq": seq, "message": f"The database cannot be read on: {error}."}
    if ledger is None:
        facts = (False, 0, 0, 0, "", 0, "", damage)
    else:
        ledger.db.close()
        count = ledger.last - ledger.start
        ends = (ledger.start + 1, ledger.last, ledger.end.hex(), ledger.num_checkpoints, ledger.fingerprint())
        facts = (damage is None, count, *ends, damage)
    names = ("is_intact", "num_receipts", "first", "last", "hash", "num_checkpoints", "fingerprint", "damage")
    return dict(zip(names, facts, strict=True))


def key_fingerprint(path: pathlib.Path) -> str:
    """The fingerprint of an Ed25519 public key in PEM; ValueError if it is none."""
    lines = [line for line in path.read_text(encoding="ascii").splitlines() if "---" not in line]
    der = base64.b64decode("".join(lines), validate=True)
    if len(der) != 44 or not der.startswith(bytes.fromhex("302a300506032b6570032100")):
        raise ValueError("not an Ed25519 public key in PEM")
    return hashlib.sha256(der[12:]).hexdigest()


def noted_pair(text: str) -> tuple[int, str]:
    """`SEQ:HASH`."""
    seq, _, end = text.partition(":")
    if not seq.isdecimal() or len(bytes.fromhex(end)) != 32:
        raise ValueError(text)
    return int(seq), end.lower()


def main() -> int:
    """Verify the file that the command line names."""
    parser = argparse.ArgumentParser(description="Verify a ledger of Vashista.")
    parser.add_argument("path", type=pathlib.Path)
    parser.add_argument("--key", type=pathlib.Path, help="public key in PEM that must have signed it")
    parser.add_argument("--fingerprint", help="SHA-256 of that key, in hexadecimal digits")
    parser.add_argument("--noted", type=noted_pair, action="append", default=[], metavar="SEQ:HASH")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.path.is_file():
        parser.error(f"there is no file {options.path}")
    try:
        fingerprint = key_fingerprint(options.key) if options.key else options.fingerprint
    except (OSError, ValueError) as error:
        parser.error(f"--key: {error}")
    try:
        verdict = verify(options.path, fingerprint and fingerprint.lower(), dict(options.noted))
    except UnreadLogError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(verdict, indent=2))
    elif verdict["damage"]:
        print("DAMAGED ({kind} at receipt {seq}): {message}".format(**verdict["damage"]))
    else:
        print(
            "Intact: {num_receipts} receipts, {first} to {last}, {num_checkpoints} checkpoints.\n"
            "hash of the last {hash}\nsigned by        {fingerprint}".format(**verdict)
        )
        if not fingerprint:
            print("No key was given: compare the fingerprint with the one that was noted when the ledger began.")
    return 0 if verdict["is_intact"] else 1


if __name__ == "__main__":
    sys.exit(main())
