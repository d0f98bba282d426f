"""Adds receipts to the chain: one batch, one transaction, one new signed head.

`ledger.py` calls it from its thread. The end of the chain is read from the database inside each transaction, so that
nothing in memory can disagree with the disk after an error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vashista.engine.errors import LedgerDamagedError, LedgerKeyError, LedgerNewerError
from vashista.server.ledger import signing
from vashista.server.ledger.chain import Kind, Mark, genesis, link
from vashista.server.ledger.receipt import utc_text
from vashista.server.ledger.store import (
    DATABASE_NAME,
    FORMAT,
    PRIVATE_KEY_NAME,
    PUBLIC_KEY_NAME,
    explained,
    open_writable,
    read_mark,
    read_meta,
    transaction,
    write_checkpoint,
    write_edge,
)


class ChainWriter:
    """The writing end of a ledger. Used by one thread at a time; every method raises LedgerError."""

    def __init__(
        self,
        folder: Path,
        *,
        checkpoint_rows: int,
        checkpoint_s: float,
        busy_timeout_s: float,
        synchronous: str = "FULL",
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = folder / DATABASE_NAME
        self._checkpoint_rows = checkpoint_rows
        self._checkpoint_s = checkpoint_s
        self._clock = clock
        self._monotonic = monotonic
        self._head: Mark | None = None
        with explained(self.path):
            self._database = open_writable(self.path, busy_timeout_s=busy_timeout_s, synchronous=synchronous)
            self._connection = self._database.conn
            self._inode = self.path.stat().st_ino
        try:
            with explained(self.path):
                self._begin(folder)
        except BaseException:
            self._connection.close()
            raise
        self._checkpoint_at = monotonic()

    @property
    def public(self) -> signing.PublicKey:
        """The key that checks this ledger."""
        return self._key.public

    @property
    def checkpoint_age_s(self) -> float:
        """Seconds since the last checkpoint, or since the ledger was opened."""
        return self._monotonic() - self._checkpoint_at

    def write(self, bodies: Sequence[bytes], *, boxes: Sequence[bytes | None] = (), checkpoint: bool = False) -> int:
        """Add receipts in this order and return the number of the first; after it they are on disk, all or none.

        `boxes` are their sealed prompts, one each where there are any. With `checkpoint` the chain's end gets one even
        if none is due.
        """
        with explained(self.path):
            self._check_file()
            with transaction(self._connection):
                head = self._read_head()
                seq, end = head.seq, head.hash
                rows = []
                for body in bodies:
                    seq += 1
                    end = link(end, seq, body)
                    rows.append((seq, body, end))
                self._connection.executemany("insert into receipts (seq, body, hash) values (?, ?, ?)", rows)
                sealed = [(head.seq + 1 + index, box) for index, box in enumerate(boxes) if box is not None]
                if sealed:
                    self._connection.executemany("insert into prompts (seq, box) values (?, ?)", sealed)
                previous = head.previous
                is_due = seq - previous >= self._checkpoint_rows or (
                    self._monotonic() - self._checkpoint_at >= self._checkpoint_s
                )
                adds_checkpoint = seq > previous and (is_due or checkpoint)
                if adds_checkpoint:
                    write_checkpoint(self._connection, self._signed("checkpoint", seq, end, previous))
                    previous = seq
                new_head = self._signed("head", seq, end, previous)
                write_edge(self._connection, new_head)
            self._head = new_head
            if adds_checkpoint:
                self._checkpoint_at = self._monotonic()
        return head.seq + 1

    def close(self) -> None:
        """Close the database; the writer is not usable afterwards."""
        with explained(self.path):
            self._connection.close()

    def move_anchor(self, seq: int, end: bytes, previous: int) -> None:
        """Sign `seq` as the last pruned receipt and delete everything up to it, in one transaction."""
        with explained(self.path), transaction(self._connection):
            write_edge(self._connection, self._signed("anchor", seq, end, previous))
            self._connection.execute("delete from receipts where seq <= ?", (seq,))
            self._connection.execute("delete from prompts where seq <= ?", (seq,))
            self._connection.execute("delete from checkpoints where seq <= ?", (seq,))

    def give_space_back(self) -> None:
        """Shrink the file by what was deleted, as far as nobody reads."""
        with explained(self.path):
            # A plain execute frees one page: it does not run this statement to its end.
            self._connection.executescript("pragma incremental_vacuum")
            self._connection.execute("pragma wal_checkpoint(truncate)").fetchall()

    def erase_on_delete(self) -> None:
        """Overwrite what is deleted from here on: retention means that it is gone from the disk's file."""
        with explained(self.path):
            self._connection.execute("pragma secure_delete = on").fetchall()

    def _begin(self, folder: Path) -> None:
        """Load the key, or make it for a ledger without one, and check the end of the chain."""
        private, public = folder / PRIVATE_KEY_NAME, folder / PUBLIC_KEY_NAME
        # The lock is taken first: two servers that begin one ledger at once would each make a
        # key, and a ledger that is written meanwhile would seem damaged at its end.
        with transaction(self._connection):
            meta = read_meta(self._connection)
            self._check_format(meta.get("format"))
            self._ledger_id = meta.get("ledger_id", "")
            known = meta.get("public_key")
            if known is None and not private.exists():
                self._key = signing.make_signing(private, public)
            else:
                self._key = signing.load_signing(private)
                if known in {None, self._key.public.raw.hex()}:
                    signing.renew_public(self._key, public)
            raw = self._key.public.raw.hex()
            if known is None:
                self._connection.execute("insert into meta values ('public_key', ?)", (raw,))
                write_edge(self._connection, self._signed("head", 0, genesis(self._ledger_id), 0))
            elif known != raw:
                raise LedgerKeyError(f"The key {private} is not the one that the ledger {self.path} began with.")
            head = self._read_head()
            last = self._connection.execute("select seq, hash from receipts order by seq desc limit 1").fetchone()
            anchor = read_mark(self._connection, "anchor")
            expected = (anchor.seq, anchor.hash) if anchor else (0, genesis(self._ledger_id))
        if (head.seq, head.hash) != (last or expected):
            raise LedgerDamagedError(f"The last receipt of {self.path} is not the one that its head was signed for.")
        self._head = head

    def _check_format(self, found: str | None) -> None:
        """Receipts in a chain of another format would be ones that no verifier takes."""
        if found == FORMAT:
            return
        if found is not None and found.isascii() and found.isdigit() and int(found) > int(FORMAT):
            raise LedgerNewerError(
                f"The ledger {self.path} has format {found}, but this version writes format {FORMAT}: it was written "
                "by a newer version."
            )
        raise LedgerDamagedError(f"The ledger {self.path} has format {found!r}; there is none but {FORMAT}.")

    def _read_head(self) -> Mark:
        head = read_mark(self._connection, "head")
        if head is not None and head == self._head:
            return head
        # Another process with the same key may have written; nobody without it.
        if head is None or not self._is_signed(head):
            raise LedgerDamagedError(f"The head of {self.path} does not bear the signature of its key.")
        return head

    def _is_signed(self, mark: Mark) -> bool:
        try:
            return self.public.is_signature(mark.signature, mark.statement(self._ledger_id))
        except (TypeError, AttributeError):  # a column of another type
            return False

    def _signed(self, kind: Kind, seq: int, end: bytes, previous: int) -> Mark:
        mark = Mark(kind, seq, end, previous, utc_text(self._clock()))
        return Mark(kind, seq, end, previous, mark.time, self._key.sign(mark.statement(self._ledger_id)))

    def _check_file(self) -> None:
        """An open database outlives its removed file; receipts must not go where nobody will find them."""
        try:
            inode = os.stat(self.path).st_ino
        except FileNotFoundError:
            inode = -1
        if inode != self._inode:
            raise LedgerDamagedError(f"The ledger {self.path} was removed or replaced while it was in use.")
