"""The folder of installed models, `/srv/vashista/models` unless told otherwise: import, list, remove.

A model is written to a hidden folder beside its place, checked byte by byte on its way, and renamed when all of it is
right and on the disk: at any moment a model is there whole or not at all. What a killed import left is removed by the
next one; a lock on the hidden folder tells the two apart. A server holds a shared lock on the folder that it serves, so
that nobody removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from vashista.engine.errors import (
    ModelChangedError,
    ModelDiskError,
    ModelExistsError,
    ModelFolderError,
    ModelInUseError,
    ModelNotInstalledError,
)
from vashista.engine.model_folder import check_folder
from vashista.server.commands.inspection import inspect_model
from vashista.server.model_store.archive import ArchiveReader, Write, packed_bytes
from vashista.server.model_store.folder import (
    CHUNK_BYTES,
    Report,
    check_contents,
    check_list,
    hash_file,
    no_report,
    read_manifest,
    read_signature,
)
from vashista.server.model_store.keys import TrustedKey
from vashista.server.model_store.manifest import MODEL_NAME, SIGNATURE_NAME, Manifest
from vashista.server.model_store.packing import check_name, disk_error

MODELS_DIR = Path("/srv/vashista/models")
STAGING, GOING = ".importing-", ".removing-"


def check_packed(path: Path, keys: Sequence[TrustedKey], report: Report = no_report) -> Manifest:
    """Read a packed model to its end. Raises the ModelError of whatever is wrong with it."""
    with _opened(path) as file:
        reader = ArchiveReader(file, path, keys)
        reader.read(lambda name: lambda data: None, report)
    return reader.manifest


def check_installed(folder: Path, keys: Sequence[TrustedKey], report: Report = no_report) -> Manifest:
    """Read a signed folder to its end. Raises the ModelError of whatever is wrong with it."""
    manifest = read_manifest(folder, keys)
    check_list(folder, manifest)
    check_contents(folder, manifest.files, report)
    return manifest


def install(
    source: Path, models_dir: Path, keys: Sequence[TrustedKey], *, name: str | None = None, report: Report = no_report
) -> tuple[Path, Manifest, bool]:
    """Import a packed model, or a folder with its model.sig. Its place, its manifest, and whether it is new.

    The same model in its place already is checked again and left alone.
    """
    if source.is_dir():
        manifest = read_manifest(source, keys)
        num_bytes = sum(status.st_size for status in check_list(source, manifest).values())
    else:
        num_bytes = packed_bytes_of(source)
        with _opened(source) as file:
            manifest = ArchiveReader(file, source, keys).manifest
    place = models_dir / (name or manifest.name)
    check_name(place.name)
    if os.path.lexists(place):
        _refuse_other(place, manifest, keys, report)
        return place, manifest, False
    with _staging(models_dir, place.name, num_bytes) as folder:
        try:
            _copy(source, folder, keys, report)
            inspect_model(folder)
            _sync(folder)
            os.rename(folder, place)  # never onto a model: a folder with files in it cannot be replaced so
            _sync_entry(models_dir)
        except OSError as error:
            if os.path.lexists(place):
                raise ModelExistsError(f"{place} was made by someone else meanwhile.") from error
            raise disk_error(error, place, num_bytes) from error
    return place, manifest, True


def remove(models_dir: Path, name: str) -> Path:
    """Delete an installed model. ModelNotInstalledError, ModelInUseError, ModelDiskError."""
    place = models_dir / name
    # What cannot be a model's name may be a path that leads out of the folder.
    if not MODEL_NAME.fullmatch(name) or place.is_symlink() or not place.is_dir():
        raise ModelNotInstalledError(f"{models_dir} has no model {name!r}.")
    if not ((place / SIGNATURE_NAME).exists() or (place / "config.json").exists()):
        raise ModelNotInstalledError(f"{place} is no model: it has neither {SIGNATURE_NAME} nor config.json.")
    going = models_dir / f"{GOING}{name}-{os.getpid()}"
    with _locked(place, fcntl.LOCK_EX) as is_free:
        if not is_free:
            raise ModelInUseError(f"A running server serves {place}.")
        try:
            os.rename(place, going)
            shutil.rmtree(going)
        except OSError as error:
            raise ModelDiskError(f"{place} cannot be removed: {error.strerror or error}.") from error
    return place


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep `remove` off the folder; where the file system knows no locks, nothing does."""
    with _locked(folder, fcntl.LOCK_SH):
        yield


def packed_bytes_of(path: Path) -> int:
    """Size of a packed model; ModelFolderError for no such file."""
    try:
        return packed_bytes(path)
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read: {error.strerror or error}.") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    packed_bytes_of(path)
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        if error.filename not in (None, str(path)):
            raise
        raise ModelFolderError(f"{path} cannot be read: {error.strerror or error}.") from error


def _refuse_other(place: Path, manifest: Manifest, keys: Sequence[TrustedKey], report: Report) -> None:
    """Nothing if the same model is in its place, whole; else the error."""
    try:
        installed = check_installed(place, keys, report)
    except ModelChangedError:
        raise
    except Exception as error:
        raise ModelExistsError(f"{place} exists, and is not this model: {error}") from error
    if installed.files != manifest.files:
        raise ModelExistsError(
            f"{place} is another model, of root digest {installed.root_digest[:16]}…, not {manifest.root_digest[:16]}…."
        )


@contextlib.contextmanager
def _staging(models_dir: Path, name: str, num_bytes: int) -> Iterator[Path]:
    """A hidden folder on the same disk; whatever is left in it when this ends is deleted."""
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        _remove_left(models_dir)
        free = shutil.disk_usage(models_dir).free
        if free < num_bytes:
            raise ModelDiskError(f"The disk of {models_dir} is full: {num_bytes} bytes are needed, {free} are free.")
        folder = Path(tempfile.mkdtemp(prefix=f"{STAGING}{name}-", dir=models_dir))
    except OSError as error:
        raise ModelDiskError(f"{models_dir} cannot be written: {error.strerror or error}.") from error
    try:
        with _locked(folder, fcntl.LOCK_EX):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left(models_dir: Path) -> None:
    """Delete what imports and removals left that were killed; running ones hold a lock."""
    for path in list(models_dir.iterdir()):
        if path.name.startswith((STAGING, GOING)) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError, ModelFolderError), _locked(path, fcntl.LOCK_EX) as is_free:
                if is_free:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, kind: int) -> Iterator[bool]:
    """Hold the folder's lock; whether that was possible."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelFolderError(f"{folder} cannot be read: {error.strerror}.") from error
    try:
        is_held = True
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


def _copy(source: Path, folder: Path, keys: Sequence[TrustedKey], report: Report) -> None:
    """All files into the hidden folder, each checked on its way."""
    if source.is_dir():
        signature = read_signature(check_folder(source)) or b""
        manifest = read_manifest(source, keys)
        for name in manifest.files:
            _copy_file(source / name, folder / name)
        check_list(folder, manifest)
        for name, entry in manifest.files.items():  # the copy is what counts
            if hash_file(folder / name, report) != entry.sha256:
                raise ModelChangedError(f"{source / name} was changed after it was signed.")
    else:
        with _opened(source) as file, contextlib.ExitStack() as stack:
            reader = ArchiveReader(file, source, keys)

            def open_file(name: str) -> Write:
                stack.close()
                return stack.enter_context((folder / name).open("xb")).write

            reader.read(open_file, report)
        signature = reader.signature
    (folder / SIGNATURE_NAME).write_bytes(signature)


def _copy_file(source: Path, target: Path) -> None:
    with source.open("rb") as file, target.open("xb") as out:
        shutil.copyfileobj(file, out, CHUNK_BYTES)


def _sync(folder: Path) -> None:
    """Everything readable for the server's user, and on the disk."""
    for path in list(folder.iterdir()):
        path.chmod(0o644)
        _sync_entry(path)
    folder.chmod(0o755)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    """A file's data, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
