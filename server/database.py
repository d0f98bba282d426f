"""SQLite: the one place that imports sqlite_utils, and how a database is opened for reading alone.

Without numpy, which sqlite_utils would import for types that nobody here stores.

numpy's linear algebra starts a thread for each core. A server that has threads before the kernel's filter is on refuses
to serve in isolation (`server/isolation/baggage.py`), and one that never computes with numpy starts sooner without it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Database", "UnreadLogError", "open_for_reading"]
_NO_ROOM = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
"""What SQLite says where it cannot write beside a file in WAL, which it wants even for reading."""


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """A module that cannot be imported meanwhile; as it is where it has been imported before."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


with _hidden("numpy"):
    from sqlite_utils import Database


class UnreadLogError(Exception):
    """Changes that are in the log alone cannot be read, because nothing can be written beside it; the text says so."""


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Beside a writer or from a medium that cannot be written. Raises sqlite3.Error and UnreadLogError."""
    log = path.with_name(path.name + "-wal")
    address = f"{path.resolve().as_uri()}?mode=ro"
    connection = sqlite3.connect(address, uri=True, timeout=5.0, isolation_level=None)
    try:
        connection.execute("select count(*) from sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if log.exists() and log.stat().st_size:
            are_readable = os.access(path, os.R_OK) and os.access(log, os.R_OK)
            if are_readable and error.sqlite_errorcode & 0xFF in _NO_ROOM:
                raise UnreadLogError(
                    f"What was written last is in {log.name} alone, which SQLite reads only where it can write beside "
                    f"it, or with the {path.name}-shm of the same moment"
                ) from error
            raise
        # Without a log there is nothing that would have to be written.
        return sqlite3.connect(f"{address}&immutable=1", uri=True, isolation_level=None)
    return connection
