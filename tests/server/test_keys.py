"""API keys: what is stored, who is let in, and what happens to a damaged or foreign database."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vashista.engine.errors import KeyNotFoundError, SettingsError, StateFolderError, StateFolderNewerError
from vashista.server import keys as keys_module
from vashista.server.keys import GUARD_NAME, REFRESH_S, KeyStore, Role
from vashista.server.limits import Resource, Window


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "keys.db"


@pytest.fixture
def store(path: Path, clock: Clock) -> Iterator[KeyStore]:
    with contextlib.closing(KeyStore(path, clock=clock)) as store:
        yield store


def test_a_new_key_opens_the_server_and_nothing_else_does(store: KeyStore) -> None:
    key, secret = store.create("alice")
    other, other_secret = store.create("bob")
    assert secret.startswith(f"vsk_{key.id}_")
    assert store.verify(secret) == key
    assert store.verify(other_secret) == other
    crossed = f"vsk_{key.id}_{other_secret.split('_', 2)[2]}"
    for wrong in ("", "vsk_", secret[:-1], secret + "x", secret.upper(), secret.replace("vsk", "sk"), crossed, key.id):
        assert store.verify(wrong) is None


@given(st.text())
@example("vsk__")
@example("vsk_\ud800_\udfff")
@example("_" * 1000)
def test_no_text_but_a_key_is_let_in(text: str) -> None:
    assert _shared_store().verify(text) is None


_stores: list[KeyStore] = []


def _shared_store() -> KeyStore:
    return _stores[0]


@pytest.fixture(autouse=True, scope="module")
def _one_store_for_properties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with contextlib.closing(KeyStore(tmp_path_factory.mktemp("keys") / "keys.db")) as store:
        store.create("alice")
        _stores.append(store)
        yield
        _stores.clear()


def test_a_writer_that_holds_the_database_does_not_stall_the_server(store: KeyStore, path: Path) -> None:
    key, text = store.create("alice")
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("begin exclusive")
    try:
        assert store.list() == [key]  # looks into the file, whatever the cache has
        assert store.verify(text) == key
    finally:
        writer.close()


def test_the_secret_is_not_in_the_file(store: KeyStore, path: Path) -> None:
    _, first = store.create("alice")
    _, second = store.create("alice")
    secrets = [text.split("_", 2)[2] for text in (first, second)]
    assert all(len(secret) == 43 for secret in secrets)
    content = b"".join(file.read_bytes() for file in path.parent.glob(path.name + "*"))
    assert b"alice" in content
    assert all(secret.encode() not in content for secret in secrets)
    rows = sqlite3.connect(path).execute("select salt, secret_hash from keys").fetchall()
    assert len({salt for salt, _ in rows}) == 2
    assert all(len(salt) == 16 and len(digest) == 32 for salt, digest in rows)


def test_the_file_and_its_folder_are_for_the_owner_alone(store: KeyStore, path: Path) -> None:
    store.create("alice")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_with_a_wider_mode_is_narrowed(path: Path) -> None:
    path.parent.mkdir()
    path.touch(0o644)
    path.chmod(0o644)
    KeyStore(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_known_and_unknown_keys_take_one_hash_and_one_comparison_each(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = store.create("alice")
    revoked, revoked_secret = store.create("bob")
    store.revoke(revoked.id)
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def compare_digest(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return compare(left, right)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare_digest)
    for text in (secret, f"vsk_{key.id}_wrong", "vsk_000000000000_x", "nonsense", revoked_secret):
        compared.clear()
        store.verify(text)
        assert compared == [(32, 32)]


def test_a_revoked_key_is_refused_and_stays_in_the_list(store: KeyStore) -> None:
    key, secret = store.create("alice")
    revoked = store.revoke(key.id)
    assert revoked.is_revoked
    assert store.verify(secret) is None
    assert store.list() == [revoked]
    assert store.revoke(key.id) == revoked


def test_revoking_the_last_key_does_not_open_the_server(store: KeyStore, path: Path) -> None:
    assert not store.are_needed()
    key, _ = store.create("alice")
    store.revoke(key.id)
    assert store.are_needed()
    with contextlib.closing(KeyStore(path)) as again:
        assert again.are_needed()


def test_a_server_that_had_keys_stays_closed_when_its_database_is_emptied_or_lost(
    store: KeyStore, path: Path, clock: Clock
) -> None:
    store.create("alice")
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("delete from keys")
    clock.now_s += REFRESH_S
    assert store.are_needed()
    store.close()
    with contextlib.closing(KeyStore(path)) as again:
        assert again.are_needed()
    for file in path.parent.glob("keys.db*"):
        file.unlink()
    with contextlib.closing(KeyStore(path)) as again:
        assert again.are_needed()
        assert again.list() == []


def test_keys_of_before_there_was_a_guard_are_guarded_from_now_on(store: KeyStore, path: Path) -> None:
    store.create("alice")
    (path.parent / GUARD_NAME).unlink()
    with contextlib.closing(KeyStore(path)) as again:
        assert again.are_needed()
    assert stat.S_IMODE((path.parent / GUARD_NAME).stat().st_mode) == 0o600


def test_opening_to_all_forgets_keys_and_counts_for_a_running_server(store: KeyStore, path: Path, clock: Clock) -> None:
    _, secret = store.create("alice")
    with contextlib.closing(KeyStore(path)) as other:
        assert other.open_to_all() == 1
    clock.now_s += REFRESH_S
    assert not store.are_needed()
    assert store.verify(secret) is None
    again, _ = store.create("bob")
    assert store.are_needed()
    assert store.list() == [again]


def test_an_unknown_id_cannot_be_revoked(store: KeyStore) -> None:
    with pytest.raises(KeyNotFoundError, match="'nope'"):
        store.revoke("nope")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 65, " alice", "\x1b[31m"])
def test_a_name_that_would_garble_the_list_is_refused(store: KeyStore, name: str) -> None:
    with pytest.raises(SettingsError, match="1 to 64 printable characters"):
        store.create(name)
    assert store.list() == []


def test_a_change_by_another_process_counts_after_the_refresh_time(store: KeyStore, path: Path, clock: Clock) -> None:
    with contextlib.closing(KeyStore(path)) as other:
        key, secret = other.create("alice")
        assert store.verify(secret) is None
        clock.now_s += REFRESH_S
        assert store.verify(secret) == key
        other.revoke(key.id)
        clock.now_s += REFRESH_S
        assert store.verify(secret) is None
    assert REFRESH_S < 1


def test_a_key_revoked_in_a_database_that_cannot_be_read_does_not_work_on(
    store: KeyStore, path: Path, clock: Clock
) -> None:
    _, secret = store.create("alice")
    other, _ = store.create("bob")
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("update keys set revoked_at = created_at")
        database.execute("update keys set roles = 'emperor' where id = ?", (other.id,))
    for _ in range(3):
        clock.now_s += REFRESH_S
        with pytest.raises(StateFolderError, match="emperor"):
            store.verify(secret)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("update keys set roles = 'infer'")
    clock.now_s += REFRESH_S
    assert store.verify(secret) is None


def test_the_list_is_fresh_without_waiting(store: KeyStore, path: Path) -> None:
    with contextlib.closing(KeyStore(path)) as other:
        key, _ = other.create("alice")
    assert store.list() == [key]


def test_a_key_has_the_roles_it_was_made_with(store: KeyStore, path: Path) -> None:
    assert store.create("alice")[0].roles == (Role.INFER,)
    key, secret = store.create("prometheus", iter([Role.ADMIN, Role.METRICS, Role.METRICS]))
    assert key.roles == (Role.METRICS, Role.ADMIN)
    with contextlib.closing(KeyStore(path)) as again:
        assert again.verify(secret) == key
    with pytest.raises(SettingsError, match="needs a role"):
        store.create("nobody", [])


def test_limits_are_set_replaced_and_lifted(store: KeyStore, path: Path, clock: Clock) -> None:
    key, secret = store.create("alice")
    other, _ = store.create("bob")
    changes = [(Resource.TOKENS, Window.DAY, 1000), (Resource.REQUESTS, Window.MINUTE, 60)]
    with contextlib.closing(KeyStore(path)) as elsewhere:
        limited = elsewhere.set_limits(key.id, changes)
        assert [limit.text for limit in limited.limits] == ["60 requests/minute", "1000 tokens/day"]
        clock.now_s += REFRESH_S
        assert store.verify(secret) == limited
        again = elsewhere.set_limits(
            key.id, [(Resource.TOKENS, Window.DAY, 5), (Resource.REQUESTS, Window.MINUTE, None)]
        )
    assert [limit.text for limit in again.limits] == ["5 tokens/day"]
    assert [entry.limits for entry in store.list() if entry.id == other.id] == [()]
    with pytest.raises(KeyNotFoundError):
        store.set_limits("nope", changes)


SECRET = "x" * 43


def make_first_layout(path: Path) -> None:
    """As it was before keys had roles: one key, with the id 0123456789ab and SECRET."""
    path.parent.mkdir()
    salt = b"s" * 16
    old = sqlite3.connect(path)
    old.execute("pragma journal_mode = wal")
    old.execute(
        "create table keys (id text primary key, name text not null, created_at text not null, revoked_at text, "
        "salt blob not null, secret_hash blob not null)"
    )
    row = ("0123456789ab", "alice", "2026-11-24T00:00:00+00:00", None, salt)
    digest = hashlib.sha256(salt + SECRET.encode()).digest()
    old.execute("insert into keys values (?, ?, ?, ?, ?, ?)", (*row, digest))
    old.execute("pragma user_version = 1")
    old.commit()
    old.close()


def test_keys_of_the_first_layout_keep_what_they_opened(path: Path) -> None:
    make_first_layout(path)
    for _ in range(2):
        with contextlib.closing(KeyStore(path)) as store:
            key = store.verify(f"vsk_0123456789ab_{SECRET}")
            assert key is not None
            assert (key.roles, key.limits) == ((Role.INFER, Role.METRICS), ())
            assert store.create("bob")[0].roles == (Role.INFER,)


def test_two_processes_may_bring_an_old_database_forward_at_once(path: Path) -> None:
    make_first_layout(path)
    failures: list[BaseException] = []

    def open_it() -> None:
        try:
            KeyStore(path).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sqlite3.connect(path).execute("pragma user_version").fetchone() == (2,)


def test_keys_outlive_the_process(path: Path) -> None:
    with contextlib.closing(KeyStore(path)) as store:
        key, secret = store.create("alice")
    with contextlib.closing(KeyStore(path)) as store:
        assert store.verify(secret) == key


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_removed_or_replaced_file_locks_the_server_instead_of_serving_old_keys(
    store: KeyStore, path: Path, clock: Clock, is_replaced: bool
) -> None:
    _, secret = store.create("alice")
    path.rename(path.with_suffix(".old"))
    if is_replaced:
        KeyStore(path).close()
    clock.now_s += REFRESH_S
    for use in (lambda: store.verify(secret), store.are_needed, lambda: store.create("bob")):
        with pytest.raises(StateFolderError, match="removed or replaced"):
            use()


def test_many_threads_may_use_one_store(store: KeyStore, clock: Clock) -> None:
    made: list[tuple[str, str]] = []
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                key, secret = store.create(f"{number}-{turn}")
                clock.now_s += REFRESH_S
                assert store.verify(secret) == key
                made.append((key.id, secret))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {key.id for key in store.list()} == {key_id for key_id, _ in made}
    assert len(made) == 20


@pytest.mark.parametrize(
    "content", [b"this is no database, whatever it may be called" * 40, b"SQLite format 3\0garbage"]
)
def test_a_corrupt_file_is_an_error_that_names_it(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StateFolderError, match=r"keys\.db"):
        KeyStore(path)


def test_a_table_of_another_shape_is_an_error(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("create table keys (id text primary key, colour text)")
        connection.execute("insert into keys values ('a', 'red')")
        connection.commit()
    with pytest.raises(StateFolderError, match="not a database of API keys"):
        KeyStore(path)


def test_a_database_of_a_newer_version_is_refused(path: Path) -> None:
    KeyStore(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("pragma user_version = 99")
    for is_read_only in (False, True):
        with pytest.raises(StateFolderNewerError, match="newer version") as raised:
            KeyStore(path, is_read_only=is_read_only)
        assert "write permission" not in raised.value.remedy


def test_a_locked_database_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "BUSY_TIMEOUT_S", 0.01)
    with contextlib.closing(KeyStore(path)) as store, contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("begin exclusive")
        with pytest.raises(StateFolderError, match="locked"):
            store.create("alice")


def test_a_key_that_could_not_be_made_does_not_close_the_server(
    path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """On a full disk, or beside a backup that locks the database: everybody was refused, and no key was there."""
    monkeypatch.setattr(keys_module, "BUSY_TIMEOUT_S", 0.01)
    with contextlib.closing(KeyStore(path, clock=clock)) as store, contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("begin exclusive")
        with pytest.raises(StateFolderError):
            store.create("alice")
        other.rollback()
        clock.now_s += REFRESH_S
        assert not store.are_needed()
        _, secret = store.create("alice")
        other.execute("begin exclusive")
        with pytest.raises(StateFolderError):
            store.create("bob")
        other.rollback()
        clock.now_s += REFRESH_S
        assert store.are_needed()
        assert store.verify(secret) is not None


def test_a_state_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateFolderError, match="cannot be opened"):
        KeyStore(tmp_path / "file" / "state" / "keys.db")
    (tmp_path / "keys.db").mkdir()
    with pytest.raises(StateFolderError, match="Is a directory"):
        KeyStore(tmp_path / "keys.db")


def test_a_state_folder_that_cannot_be_written_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(keys_module.os, "open", refuse)
    with pytest.raises(StateFolderError, match=r"keys\.db cannot be opened: Permission denied"):
        KeyStore(path)


@pytest.fixture
def keep_log_out(path: Path) -> None:
    """What SQLite meets on a medium that cannot be written: there is no place for the index of the log."""
    path.parent.mkdir()
    path.with_name("keys.db-shm").symlink_to("nowhere")


def copied(source: Path, path: Path, *names: str) -> None:
    source.mkdir()
    with contextlib.closing(KeyStore(source / "keys.db")) as store:
        store.create("alice")
        for name in names:
            shutil.copy(source / name, path.with_name(name))


@pytest.mark.usefixtures("keep_log_out")
def test_keys_are_listed_from_a_medium_that_cannot_be_written(path: Path, tmp_path: Path) -> None:
    copied(tmp_path / "source", path)
    shutil.copy(tmp_path / "source" / "keys.db", path)
    with pytest.raises(StateFolderError):
        KeyStore(path)
    with contextlib.closing(KeyStore(path, is_read_only=True)) as store:
        assert [key.name for key in store.list()] == ["alice"]
        assert store.are_needed()
        for change in (lambda: store.create("bob"), lambda: store.revoke(store.list()[0].id), store.open_to_all):
            with pytest.raises(StateFolderError):
                change()
        assert [key.is_revoked for key in store.list()] == [False]


def test_reading_makes_no_file(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    copied(tmp_path / "source", path)
    shutil.copy(tmp_path / "source" / "keys.db", path)
    KeyStore(path, is_read_only=True).close()
    assert not path.with_name(GUARD_NAME).exists()


@pytest.mark.usefixtures("keep_log_out")
def test_a_log_that_cannot_be_read_is_said_to_be_there(path: Path, tmp_path: Path) -> None:
    copied(tmp_path / "source", path, "keys.db", "keys.db-wal")
    with pytest.raises(StateFolderError, match=r"in keys\.db-wal alone.* A copy of both in a folder that can be"):
        KeyStore(path, is_read_only=True)


def test_an_old_layout_is_not_brought_forward_by_reading(path: Path) -> None:
    make_first_layout(path)
    with pytest.raises(StateFolderError, match=r"has layout 1; this version reads layout 2"):
        KeyStore(path, is_read_only=True)
