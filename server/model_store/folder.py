"""Whether a model's folder holds exactly what its manifest says, and which files may be in one at all.

Every difference is named at once: missing, extra, renamed, truncated, changed. Used by import, by `vashista models
verify` and before the server loads a model.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vashista.engine.checkpoint_files import PICKLE_SUFFIXES
from vashista.engine.errors import (
    ModelChangedError,
    ModelFileRefusedError,
    ModelFolderError,
    ModelSignatureError,
    PickleRefusedError,
)
from vashista.engine.model_folder import check_folder
from vashista.server.model_store.keys import TrustedKey
from vashista.server.model_store.manifest import (
    FILE_NAME,
    MAX_SIGNATURE_BYTES,
    SIGNATURE_NAME,
    FileDigest,
    Manifest,
    read_signed,
)

CHUNK_BYTES = 1 << 20
NUM_READERS = min(4, os.cpu_count() or 1)
ALL_PICKLES = (*PICKLE_SUFFIXES, ".pickle", ".npy", ".npz", ".joblib", ".mar")
"""Formats whose readers run code that is in the file, or may."""
SUFFIXES = (".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".toml", ".yaml", ".yml")
"""What a packed model may hold: data that no reader executes."""
PLAIN_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING", "README")
Report = Callable[[int], object]
"""Told how many bytes were read."""


def no_report(num_bytes: int) -> None:
    """Nobody looks."""


def refuse_foreign(name: str) -> None:
    """PickleRefusedError or ModelFileRefusedError for a file that no packed model may hold."""
    lower = name.lower()
    if lower.endswith(ALL_PICKLES):
        raise PickleRefusedError(f"{name} is a pickle file, or may hold one; loading it would run code.")
    if not FILE_NAME.fullmatch(name):
        raise ModelFileRefusedError(f"{name!r} is no plain file name of letters, digits and ._ +@- up to 100 of them.")
    if not lower.endswith(SUFFIXES) and Path(name).stem.upper() not in PLAIN_NAMES:
        raise ModelFileRefusedError(f"{name} is of no kind that a model needs; possible are {', '.join(SUFFIXES)}.")


def list_files(folder: Path, *, without: Set[str] = frozenset()) -> dict[str, os.stat_result]:
    """Every entry of the folder by name but some; ModelFileRefusedError for what is no plain file, as a link."""
    found = {}
    try:
        with os.scandir(check_folder(folder)) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            if entry.name in without:
                continue
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                kind = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder"}.get(stat.S_IFMT(status.st_mode), "no file")
                raise ModelFileRefusedError(f"{entry.name} in {folder} is {kind}; a signed model has plain files only.")
            found[entry.name] = status
    except OSError as error:
        raise ModelFolderError(f"{error.filename} cannot be read: {error.strerror}.") from error
    return found


def read_signature(folder: Path) -> bytes | None:
    """The text of `model.sig`; None where there is none."""
    path = folder / SIGNATURE_NAME
    try:
        if not os.path.lexists(path):
            return None
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_SIGNATURE_BYTES:
            raise ModelSignatureError(f"{path} is no plain file of at most {MAX_SIGNATURE_BYTES} bytes.")
        return path.read_bytes()
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read: {error.strerror}.") from error


def read_manifest(folder: Path, keys: Sequence[TrustedKey]) -> Manifest:
    """The folder's signed manifest. ModelSignatureError also where there is no signature."""
    data = read_signature(check_folder(folder))
    if data is None:
        raise ModelSignatureError(f"{folder} has no {SIGNATURE_NAME}: nobody has signed this model.")
    return read_signed(data, keys)


def hash_file(path: Path, report: Report = no_report) -> str:
    """SHA-256 in hexadecimal digits; OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            report(len(chunk))
    return digest.hexdigest()


def hash_files(folder: Path, names: Sequence[str], report: Report = no_report) -> dict[str, str]:
    """SHA-256 of several files, some at a time; ModelFolderError."""
    try:
        with ThreadPoolExecutor(NUM_READERS) as pool:
            return dict(zip(names, pool.map(lambda name: hash_file(folder / name, report), names), strict=True))
    except OSError as error:
        raise ModelFolderError(f"{error.filename} cannot be read: {error.strerror}.") from error


def check_list(folder: Path, manifest: Manifest) -> dict[str, os.stat_result]:
    """Names and sizes against the manifest; nothing is read. ModelChangedError names all that differs."""
    found = list_files(folder)
    found.pop(SIGNATURE_NAME, None)
    for name in manifest.files:
        refuse_foreign(name)
    problems = [f"{name} is missing" for name in manifest.files if name not in found]
    problems += [f"{name} is not in the signed manifest" for name in found if name not in manifest.files]
    for name, status in found.items():
        wanted = manifest.files[name].num_bytes if name in manifest.files else None
        if wanted is not None and status.st_size != wanted:
            how = "truncated" if status.st_size < wanted else "too long"
            problems.append(f"{name} is {how} ({status.st_size} bytes instead of {wanted})")
    _refuse(folder, problems)
    return found


def check_contents(folder: Path, files: Mapping[str, FileDigest], report: Report = no_report) -> None:
    """Every byte of these files. ModelChangedError names all that differ."""
    digests = hash_files(folder, list(files), report)
    _refuse(folder, [f"{name} was changed" for name, digest in digests.items() if digest != files[name].sha256])


def _refuse(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ModelChangedError(f"{folder} is not the model that was signed: {'; '.join(problems[:8])}{more}.")
