"""The SQLite database of a ledger: its layout, its migrations, and what SQLite's errors mean.

`ledger.py` writes through it, `verify.py`, `report.py`, `export.py` read, `prune.py` deletes. The layout is part of
the format in docs/ledger.md.
"""

from __future__ import annotations

import errno
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vashista.engine.errors import (
    LedgerDamagedError,
    LedgerError,
    LedgerFullError,
    LedgerLockedError,
    LedgerLogUnreadError,
    LedgerNewerError,
    LedgerReadOnlyError,
)
from vashista.server.database import Database, UnreadLogError, open_for_reading
from vashista.server.ledger.chain import Kind, Mark
from vashista.server.ledger.receipt import utc_text

DATABASE_NAME = "ledger.db"
PRIVATE_KEY_NAME = "ledger.key"
PUBLIC_KEY_NAME = "ledger.pub"
FORMAT = "1"

_BY_CODE: dict[int, type[LedgerError]] = {
    sqlite3.SQLITE_FULL: LedgerFullError,
    sqlite3.SQLITE_BUSY: LedgerLockedError,
    sqlite3.SQLITE_LOCKED: LedgerLockedError,
    sqlite3.SQLITE_READONLY: LedgerReadOnlyError,
    sqlite3.SQLITE_PERM: LedgerReadOnlyError,
    sqlite3.SQLITE_CORRUPT: LedgerDamagedError,
    sqlite3.SQLITE_NOTADB: LedgerDamagedError,
}


_BY_ERRNO: dict[int, type[LedgerError]] = {
    errno.EROFS: LedgerReadOnlyError,
    errno.EACCES: LedgerReadOnlyError,
    errno.EPERM: LedgerReadOnlyError,
    errno.ENOSPC: LedgerFullError,
    errno.EDQUOT: LedgerFullError,
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what SQLite and the file system raise into a LedgerError with a name."""
    try:
        yield
    except sqlite3.Error as error:
        raise from_sqlite(error, path) from error
    except OSError as error:
        raise _BY_ERRNO.get(error.errno or 0, LedgerError)(
            f"The ledger {path} cannot be opened: {error.strerror}."
        ) from error


def from_sqlite(error: sqlite3.Error, path: Path) -> LedgerError:
    """The named error of one of SQLite's."""
    code = getattr(error, "sqlite_errorcode", None)
    kind = LedgerError if code is None else _BY_CODE.get(code & 0xFF, LedgerError)
    is_layout = code is not None and code & 0xFF == sqlite3.SQLITE_ERROR and "no such" in str(error)
    if code is None or is_layout or isinstance(error, sqlite3.IntegrityError):
        kind = LedgerDamagedError
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return kind(f"The ledger {path} cannot be used: {error} ({name}).")


def open_writable(path: Path, *, busy_timeout_s: float, synchronous: str = "FULL") -> Database:
    """Open or create the database, in WAL, with the newest layout. Transactions are begun and ended by hand."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Made by hand, so that there is no moment in which others may read it.
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    connection = sqlite3.connect(path, timeout=busy_timeout_s, check_same_thread=False, isolation_level=None)
    try:
        database = Database(connection)
        # Lets prune give space back to the file system; only a database without tables takes it.
        database.execute("pragma auto_vacuum = incremental")
        database.enable_wal()
        # FULL syncs the log at every commit: an answered request keeps its receipt through a power cut, too.
        database.execute(f"pragma synchronous = {synchronous}")
        database.execute("pragma journal_size_limit = 67108864")
        _migrate(database, path)
    except BaseException:
        connection.close()
        raise
    return database


def open_readable(path: Path) -> sqlite3.Connection:
    """Open for reading alone, beside a writer or from a medium that cannot be written.

    Text comes as bytearray, blobs as bytes.
    """
    if not path.is_file():
        raise LedgerError(f"There is no ledger at {path}: no server has begun one there (--state-dir names another).")
    try:
        with explained(path):
            connection = open_for_reading(path)
    except UnreadLogError as error:
        raise LedgerLogUnreadError(f"The ledger {path} cannot be read: {error}.") from error
    connection.text_factory = bytearray
    return connection


def read_meta(connection: sqlite3.Connection) -> dict[str, str]:
    """The ledger's format, id and public key."""
    rows = connection.execute("select name, value from meta")
    return {_text(name): _text(value) for name, value in rows}


def read_mark(connection: sqlite3.Connection, kind: Kind) -> Mark | None:
    """The head or the anchor."""
    row = connection.execute(
        "select seq, hash, previous, time, signature from edges where kind = ?", (kind,)
    ).fetchone()
    return None if row is None else Mark(kind, row[0], row[1], row[2], _text(row[3]), row[4])


def write_edge(connection: sqlite3.Connection, mark: Mark) -> None:
    """Replace the head or the anchor."""
    connection.execute(
        "insert or replace into edges (kind, seq, hash, previous, time, signature) values (?, ?, ?, ?, ?, ?)",
        (mark.kind, mark.seq, mark.hash, mark.previous, mark.time, mark.signature),
    )


def write_checkpoint(connection: sqlite3.Connection, mark: Mark) -> None:
    """Add a checkpoint."""
    connection.execute(
        "insert into checkpoints (seq, hash, previous, time, signature) values (?, ?, ?, ?, ?)",
        (mark.seq, mark.hash, mark.previous, mark.time, mark.signature),
    )


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing; takes the write lock at once, so that what is read inside stays true."""
    connection.execute("begin immediate")
    try:
        yield
        connection.execute("commit")
    except BaseException:
        if connection.in_transaction:
            connection.execute("rollback")
        raise


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value)


def _first_layout(database: Database) -> None:
    database.conn.execute("create table meta (name text primary key, value text not null)")
    database.conn.execute("create table receipts (seq integer primary key, body blob not null, hash blob not null)")
    signed = "hash blob not null, previous integer not null, time text not null, signature blob not null"
    database.conn.execute(f"create table checkpoints (seq integer primary key, {signed})")
    database.conn.execute(f"create table edges (kind text primary key, seq integer not null, {signed})")
    database.conn.execute("insert into meta values ('format', ?), ('ledger_id', ?)", (FORMAT, secrets.token_hex(16)))


def _sealed_prompts(database: Database) -> None:
    database.conn.execute("create table prompts (seq integer primary key, box blob not null)")


MIGRATIONS: list[tuple[str, Callable[[Database], None]]] = [
    ("first layout", _first_layout),
    ("sealed prompts", _sealed_prompts),
]
"""Each runs once, in order; the table `migrations` says which did."""


def _migrate(database: Database, path: Path) -> None:
    with transaction(database.conn):
        database.conn.execute(
            "create table if not exists migrations "
            "(version integer primary key, name text not null, time text not null)"
        )
        done = database.conn.execute("select coalesce(max(version), 0) from migrations").fetchone()[0]
        if done > len(MIGRATIONS):
            raise LedgerNewerError(
                f"The ledger {path} has layout {done}, but this version knows layouts up to {len(MIGRATIONS)}: it was "
                "written by a newer version."
            )
        for version, (name, change) in enumerate(MIGRATIONS[done:], done + 1):
            change(database)
            made_at = utc_text(time.time())
            database.conn.execute("insert into migrations values (?, ?, ?)", (version, name, made_at))
