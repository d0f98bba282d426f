"""API keys, their roles and limits: made and revoked by `vashista keys`, checked by the server on every request.

A key is `vsk_<id>_<secret>`. The secret is 256 random bits and shown once; the database keeps a salted SHA-256 of it.
A slow password hash would add nothing: it protects guessable secrets, and nobody guesses 256 bits. Keys live in
`keys.db` in the state folder, mode 0600. A revoked key keeps its row, and a server with any row asks for a key:
revoking the last key closes the server, it does not open it to everyone. `keys.required` beside it says that there were
keys: a database that was lost or emptied by hand does not open the server either. `vashista keys open` alone does.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from vashista.engine.errors import KeyNotFoundError, KeyOptionError, StateFolderError, StateFolderNewerError
from vashista.server.database import Database, UnreadLogError, open_for_reading
from vashista.server.limits import Limit, Resource, Window

SCHEMA_VERSION = 2
GUARD_NAME = "keys.required"
REFRESH_S = 0.5
"""How old the view of the database may be: a change by another process counts within this time."""
BUSY_TIMEOUT_S = 2.0
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,64}")
_UNKNOWN_SALT = secrets.token_bytes(16)
_UNKNOWN_HASH = secrets.token_bytes(32)


class Role(StrEnum):
    """What a key opens."""

    INFER = "infer"
    """Completions, models and tokens."""
    METRICS = "metrics"
    """/metrics."""
    ADMIN = "admin"
    """Everything."""


@dataclass(frozen=True)
class Key:
    """One API key without its secret. Times are ISO 8601 in UTC."""

    id: str
    name: str
    created_at: str
    revoked_at: str | None
    roles: tuple[Role, ...] = (Role.INFER,)
    limits: tuple[Limit, ...] = ()

    @property
    def is_revoked(self) -> bool:
        """A revoked key opens nothing."""
        return self.revoked_at is not None

    def opens(self, roles: Iterable[Role]) -> bool:
        """Whether it has one of the roles."""
        return Role.ADMIN in self.roles or not set(roles).isdisjoint(self.roles)


@dataclass(frozen=True)
class _Entry:
    key: Key
    salt: bytes
    secret_hash: bytes


class KeyStore:
    """The database of keys, with a copy in memory. May be used from many threads; StateFolderError when it fails."""

    def __init__(self, path: Path, *, is_read_only: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """is_read_only: nothing is made or changed, and all that changes keys fails."""
        self._path = path
        self._is_read_only = is_read_only
        self._guard = path.with_name(GUARD_NAME)
        self._is_guarded = False
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._data_version = -1
        self._checked_at = 0.0
        with self._explained():
            self._database = self._open_readable() if is_read_only else self._open()
            self._inode = path.stat().st_ino
            self._load()

    def create(self, name: str, roles: Iterable[Role] = (Role.INFER,)) -> tuple[Key, str]:
        """Make a key; returns it with the whole text `vsk_<id>_<secret>`, which cannot be shown again."""
        if not _NAME.fullmatch(name) or name != name.strip():
            raise KeyOptionError(f"The name {name!r} is not usable: give 1 to 64 printable characters.", param="name")
        secret = secrets.token_urlsafe(32)
        salt = secrets.token_bytes(16)
        wanted = set(roles)
        key = Key(secrets.token_hex(6), name, _now(), None, tuple(role for role in Role if role in wanted))
        if not key.roles:
            raise KeyOptionError("A key needs a role: infer, metrics or admin.", param="role")
        row = {"id": key.id, "name": name, "created_at": key.created_at, "revoked_at": None}
        row["roles"] = " ".join(key.roles)
        with self._lock, self._explained():
            self._check_file()
            with self._guarded():
                self._database.table("keys").insert({**row, "salt": salt, "secret_hash": _digest(salt, secret)})
            self._load()
        return key, f"vsk_{key.id}_{secret}"

    def list(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        with self._lock, self._explained():
            self._refresh(now=True)
            return sorted((entry.key for entry in self._entries.values()), key=lambda key: (key.created_at, key.id))

    def revoke(self, key_id: str) -> Key:
        """Make a key useless for good; a second time changes nothing. KeyNotFoundError for an unknown id."""
        with self._lock, self._explained():
            self._refresh(now=True)
            entry = self._entries.get(key_id)
            if entry is None:
                raise KeyNotFoundError(f"No API key has the id {key_id!r}.", param="id")
            if not entry.key.is_revoked:
                self._database.table("keys").update(key_id, {"revoked_at": _now()})
                self._load()
            return self._entries[key_id].key

    def set_limits(self, key_id: str, changes: Iterable[tuple[Resource, Window, int | None]]) -> Key:
        """Let a key use at most so much of a resource in a window; None lifts that limit. KeyNotFoundError."""
        with self._lock, self._explained():
            self._refresh(now=True)
            if key_id not in self._entries:
                raise KeyNotFoundError(f"No API key has the id {key_id!r}.", param="id")
            table = self._database.table("limits")
            with self._database.conn:
                for resource, window, amount in changes:
                    names = {"key_id": key_id, "resource": str(resource), "window": str(window)}
                    table.delete_where("key_id = :key_id and resource = :resource and window = :window", names)
                    if amount is not None:
                        table.insert({**names, "amount": amount})
            self._load()
            return self._entries[key_id].key

    def verify(self, bearer: str) -> Key | None:
        """The live key of the text `vsk_<id>_<secret>`, or None; takes the same time for right, wrong and unknown."""
        with self._lock, self._explained():
            self._refresh()
            entries = self._entries
        prefix, _, rest = bearer.partition("_")
        key_id, _, secret = rest.partition("_")
        entry = entries.get(key_id)
        salt, expected = (entry.salt, entry.secret_hash) if entry else (_UNKNOWN_SALT, _UNKNOWN_HASH)
        is_right = hmac.compare_digest(_digest(salt, secret), expected)
        return entry.key if is_right and entry and prefix == "vsk" and not entry.key.is_revoked else None

    def are_needed(self) -> bool:
        """Whether every request needs a key: once one was made, until `open_to_all`."""
        with self._lock, self._explained():
            self._refresh()
            return self._is_guarded

    def open_to_all(self) -> int:
        """Forget all keys, so that no request needs one; returns how many there were. Receipts keep their ids."""
        with self._lock, self._explained():
            self._refresh(now=True)
            num_keys = len(self._entries)
            with self._database.conn:
                self._database.execute("delete from limits")
                self._database.execute("delete from keys")
            self._guard.unlink(missing_ok=True)
            self._load()
            return num_keys

    def close(self) -> None:
        """Close the database; the store is not usable afterwards."""
        with self._lock:
            self._database.conn.close()

    def _open(self) -> Database:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Made by hand, so that there is no moment in which others may read it.
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        self._path.chmod(0o600)
        connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            database = Database(connection)
            # Readers then never wait for a writer: a slow `vashista keys` or a backup must not stall the server.
            database.enable_wal()
            self._migrate(database)
        except BaseException:
            connection.close()
            raise
        return database

    def _open_readable(self) -> Database:
        try:
            database = Database(open_for_reading(self._path))
        except UnreadLogError as error:
            raise StateFolderError(
                f"The API keys in {self._path} cannot be read: {error}. A copy of both in a folder that can be written "
                "can be."
            ) from error
        version = database.execute("pragma user_version").fetchone()[0]
        if version != SCHEMA_VERSION:
            database.conn.close()
            self._check_layout(version)
            raise StateFolderError(
                f"{self._path} has layout {version}; this version reads layout {SCHEMA_VERSION}, and brings older ones "
                "forward where it may write: in a copy of the state folder."
            )
        return database

    def _migrate(self, database: Database) -> None:
        version = database.execute("pragma user_version").fetchone()[0]
        self._check_layout(version)
        columns = {"id": str, "name": str, "created_at": str, "revoked_at": str, "salt": bytes, "secret_hash": bytes}
        required = {"name", "created_at", "salt", "secret_hash"}
        database.table("keys").create(columns, pk="id", not_null=required, if_not_exists=True)
        if version < SCHEMA_VERSION:
            self._add_roles_and_limits(database)

    def _check_layout(self, version: int) -> None:
        if version > SCHEMA_VERSION:
            raise StateFolderNewerError(
                f"{self._path} has layout {version}, but this version knows layouts up to {SCHEMA_VERSION}: "
                "it was written by a newer version."
            )

    def _add_roles_and_limits(self, database: Database) -> None:
        """Layout 2. Older keys opened everything that there was, and go on doing so."""
        with database.conn:
            database.execute("begin immediate")
            if database.execute("pragma user_version").fetchone()[0] >= SCHEMA_VERSION:
                return  # another process was faster
            database.execute(f"alter table keys add column roles text not null default '{Role.INFER} {Role.METRICS}'")
            database.execute(
                "create table limits (key_id text not null, resource text not null, window text not null, "
                "amount integer not null, primary key (key_id, resource, window))"
            )
            database.execute(f"pragma user_version = {SCHEMA_VERSION}")

    def _refresh(self, *, now: bool = False) -> None:
        """Read the keys again if another process changed them; looks at most every REFRESH_S unless `now`."""
        if not now and self._clock() - self._checked_at < REFRESH_S:
            return
        self._check_file()
        version = self._database.execute("pragma data_version").fetchone()[0]
        if version != self._data_version:
            self._load()
        self._is_guarded = self._guard.exists() or bool(self._entries)
        self._checked_at = self._clock()

    def _load(self) -> None:
        version = self._database.execute("pragma data_version").fetchone()[0]
        limits: dict[str, list[Limit]] = {}
        for row in self._database.table("limits").rows:
            limit = Limit(Resource(row["resource"]), Window(row["window"]), int(row["amount"]))
            limits.setdefault(row["key_id"], []).append(limit)
        rows = self._database.table("keys").rows
        self._entries = {
            row["id"]: _Entry(
                Key(
                    row["id"],
                    row["name"],
                    row["created_at"],
                    row["revoked_at"],
                    tuple(map(Role, row["roles"].split())),
                    tuple(sorted(limits.get(row["id"], []))),
                ),
                bytes(row["salt"]),
                bytes(row["secret_hash"]),
            )
            for row in rows
        }
        if self._entries and not self._is_read_only:
            self._set_guard()
        self._is_guarded = self._guard.exists() or bool(self._entries)
        # Noted last: what could not be read is read again, or a key revoked in it would go on working.
        self._data_version = version
        self._checked_at = self._clock()

    def _set_guard(self) -> bool:
        """Whether there was none."""
        is_new = not self._guard.exists()
        if is_new:
            os.close(os.open(self._guard, os.O_CREAT | os.O_WRONLY, 0o600))
        return is_new

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """The guard is there before the first key, so that no key is there without it; if no key comes, it goes."""
        is_new = self._set_guard()
        try:
            yield
        except BaseException:
            if is_new and not self._database.execute("select count(*) from keys").fetchone()[0]:
                self._guard.unlink(missing_ok=True)
            raise

    def _check_file(self) -> None:
        """An open database outlives its removed file; keys that nobody can revoke any more must not go on working."""
        try:
            is_same = self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise StateFolderError(f"{self._path} was removed or replaced while in use. Restart the server.")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the file system and SQLite raise into StateFolderError."""
        try:
            yield
        except OSError as error:
            raise StateFolderError(f"The API keys in {self._path} cannot be opened: {error.strerror}.") from error
        except sqlite3.OperationalError as error:
            raise StateFolderError(f"The API keys in {self._path} cannot be read or written: {error}.") from error
        except (sqlite3.DatabaseError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateFolderError(
                f"{self._path} is not a database of API keys ({error}). Restore it from a backup, or remove it and "
                "make new keys."
            ) from error


def _digest(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret.encode("utf-8", "surrogatepass")).digest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
