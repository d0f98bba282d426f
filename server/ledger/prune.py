"""Deletes old receipts without breaking the chain: `vashista ledger prune`.

What is pruned leaves one signed mark, the anchor: the number and hash of the last deleted receipt, from which the
chain goes on. Keeping a hash for each deleted receipt was the other way; it would grow for ever, and a hash of few
unknowns (a client's address, a key, a minute) still tells who was there. The price: a copy of a pruned receipt can be
checked only within an older copy of the ledger.

A running server goes on writing: each transaction deletes at most CHUNK_ROWS receipts and moves the anchor with them.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from vashista.engine.errors import LedgerDamagedError, LedgerError, LedgerOptionError
from vashista.server.ledger.reader import reading
from vashista.server.ledger.receipt import decode
from vashista.server.ledger.store import DATABASE_NAME, PRIVATE_KEY_NAME
from vashista.server.ledger.writer import ChainWriter

CHUNK_ROWS = 5000


class Plan(msgspec.Struct, frozen=True):
    """What a pruning deletes: receipts `first` to `last`; none if `last` is below `first`."""

    first: int
    last: int
    next_time: str | None
    """When the first receipt that stays arrived; None if none stays."""
    last_behind: int | None = None
    """The last receipt that is old enough but stays: those before it, from `last` + 1, are dated in the future."""

    @property
    def num_receipts(self) -> int:
        """How many would go."""
        return self.last - self.first + 1


def plan(path: Path, *, before: str | None = None, through: int | None = None, latest: str | None = None) -> Plan:
    """The receipts of requests that arrived before a date, or those up to a number. LedgerError when it cannot be.

    Receipts stand in the order in which requests ended, so the first one that arrived later is the end of it. Where it
    is dated after `latest`, the machine's clock was wrong then, and the plan says what stays because of it.
    """
    with reading(path) as connection:
        low, high = connection.execute("select min(seq), max(seq) from receipts").fetchone()
        if low is None:
            return Plan(1, 0, None)
        if through is not None and not low <= through <= high:
            raise LedgerOptionError(f"through is {through}; the ledger holds the receipts {low} to {high}.")
        last = low - 1
        stop: Plan | None = None
        for seq, body in connection.execute("select seq, body from receipts order by seq"):
            if type(body) is not bytes:
                raise LedgerDamagedError(f"Receipt {seq} cannot be read: it is of another type.")
            receipt = decode(body, seq)
            if not ((through is not None and seq > through) or (before is not None and receipt.time >= before)):
                last = seq
                continue
            stop = stop or Plan(low, last, receipt.time)
            if latest is None or receipt.time <= latest:
                break
        if stop is None:
            return Plan(low, last, None)
        return stop if last == stop.last else msgspec.structs.replace(stop, last_behind=last)


def prune(folder: Path, plan: Plan, *, busy_timeout_s: float = 30.0) -> None:
    """Delete what the plan says; what a failure leaves is whole, too, with fewer receipts deleted. LedgerError."""
    path = folder / DATABASE_NAME
    if not path.is_file() or not (folder / PRIVATE_KEY_NAME).is_file():
        raise LedgerError(f"There is no ledger with its key in {folder}.")
    writer = ChainWriter(folder, checkpoint_rows=1 << 62, checkpoint_s=float("inf"), busy_timeout_s=busy_timeout_s)
    try:
        writer.erase_on_delete()
        seq = plan.first - 1
        while seq < plan.last:
            seq = min(seq + CHUNK_ROWS, plan.last)
            with reading(path) as connection:
                row = connection.execute("select hash from receipts where seq = ?", (seq,)).fetchone()
                query = "select max(seq) from (select seq from checkpoints where seq <= ?1 union all "
                query += "select previous from edges where kind = 'anchor')"
                previous = connection.execute(query, (seq,)).fetchone()[0] or 0
            if row is None:
                raise LedgerDamagedError(f"Receipt {seq} is missing.")
            writer.move_anchor(seq, row[0], previous)
        writer.give_space_back()
    finally:
        writer.close()
