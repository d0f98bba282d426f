"""The state folder belongs to one server at a time: `server/serve.py` holds it from its start to its end.

Two servers on one folder would each count what keys use by themselves, so that together they let through twice the
limits. The lock is the kernel's, on `server.lock`: it ends with the process, however that ends, and a file that was
left behind locks nobody out. Commands such as `vashista keys` and `vashista ledger` work beside the server and take
no lock.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vashista.engine.errors import StateFolderError, StateFolderTakenError

LOCK_NAME = "server.lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and keep it for this process. StateFolderTakenError, StateFolderError."""
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateFolderError(f"The state folder {folder} cannot be used: {error.strerror}.") from error
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """Take the lock and note who has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "of unknown number"
        raise StateFolderTakenError(
            f"The server with process id {holder} uses the state folder {folder}; in a container the id is the "
            "container's own."
        ) from None
    except OSError as error:
        raise StateFolderError(f"The state folder {folder} cannot be locked: {error.strerror}.") from error
