"""A packed model: one plain tar of the folder, `model.sig` first, that any tar unpacks and only we could have written.

`vashista models pack` writes it, import and verify read it once from front to back. The reader makes every header anew
from the name and size that it expects and compares all 512 bytes; fill bytes must be zero and nothing may follow. So
there is no byte of the file that can change unnoticed, and no path, link or device that tar could be talked into.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from vashista.engine.errors import ModelArchiveError, ModelChangedError, ModelSignatureError
from vashista.engine.model_folder import file_size
from vashista.server.model_store.folder import CHUNK_BYTES, Report, no_report, refuse_foreign
from vashista.server.model_store.keys import TrustedKey
from vashista.server.model_store.manifest import (
    MAX_SIGNATURE_BYTES,
    MODEL_NAME,
    SIGNATURE_NAME,
    FileDigest,
    Manifest,
    read_signed,
)

SUFFIX = ".model.tar"
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
Write = Callable[[bytes], object]
Open = Callable[[str], Write]
"""Told the name of each file before its bytes."""


def header(model: str, name: str, num_bytes: int) -> bytes:
    """The 512 bytes before a file: nothing in them depends on machine, user or time."""
    info = tarfile.TarInfo(f"{model}/{name}")
    info.size, info.mode, info.mtime = num_bytes, 0o644, 0
    return info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def _fill(num_bytes: int) -> bytes:
    return bytes(-num_bytes % BLOCK)


def archive_bytes(signature: bytes, sizes: Sequence[int]) -> int:
    """Length of the packed file."""
    return sum(BLOCK + size + len(_fill(size)) for size in (len(signature), *sizes)) + len(END)


def write_archive(
    out: BinaryIO, folder: Path, manifest: Manifest, signature: bytes, report: Report = no_report
) -> None:
    """Pack the folder's files; each is hashed again on its way. ModelChangedError, OSError."""
    out.write(header(manifest.name, SIGNATURE_NAME, len(signature)) + signature + _fill(len(signature)))
    for name, entry in manifest.files.items():
        assert entry.num_bytes is not None
        out.write(header(manifest.name, name, entry.num_bytes))
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
                report(len(chunk))
        if digest.hexdigest() != entry.sha256:
            raise ModelChangedError(f"{folder / name} changed while it was packed.")
        out.write(_fill(entry.num_bytes))
    out.write(END)


class ArchiveReader:
    """One packed model, read once: first the manifest, then the files."""

    def __init__(self, file: BinaryIO, path: Path, keys: Sequence[TrustedKey]) -> None:
        """Reads and checks the signature. ModelArchiveError, ModelSignatureError, ModelUntrustedError, OSError."""
        self._file, self._path = file, path
        raw = self._exactly(BLOCK, "the header of the manifest")
        model, num_bytes = self._first(raw)
        if not 0 < num_bytes <= MAX_SIGNATURE_BYTES:
            raise self._broken(f"{SIGNATURE_NAME} has {num_bytes} bytes")
        self.signature = self._exactly(num_bytes, SIGNATURE_NAME)
        self._expect_fill(num_bytes, SIGNATURE_NAME)
        self.manifest: Manifest = read_signed(self.signature, keys)
        if self.manifest.name != model:
            raise ModelSignatureError(
                f"{path} calls its model {model!r}, but {self.manifest.name!r} was signed: it was renamed."
            )
        for name in self.manifest.files:
            refuse_foreign(name)

    def read(self, open_file: Open, report: Report = no_report) -> None:
        """Hand all bytes of all files over, each file whole and right, or raise at the first that is not.

        ModelChangedError, ModelArchiveError, OSError. What was handed over before an error must be thrown away.
        """
        for name, entry in self.manifest.files.items():
            num_bytes = self._next(name, entry)
            write = open_file(name)
            digest = hashlib.sha256()
            for chunk in self._chunks(num_bytes, name):
                digest.update(chunk)
                write(chunk)
                report(len(chunk))
            if digest.hexdigest() != entry.sha256:
                raise ModelChangedError(f"{name} in {self._path} was changed after it was signed.")
            self._expect_fill(num_bytes, name)
        if self._file.read(len(END) + 1) != END:
            raise self._broken(f"it is truncated or goes on behind {list(self.manifest.files)[-1]}, its last file")

    def _first(self, raw: bytes) -> tuple[str, int]:
        """Name of the model and size of the signature, from the first header."""
        try:
            info = tarfile.TarInfo.frombuf(raw, "ascii", "strict")
            model, _, name = info.name.partition("/")
            is_right = name == SIGNATURE_NAME and MODEL_NAME.fullmatch(model) and raw == header(model, name, info.size)
        except (tarfile.HeaderError, ValueError, OverflowError):
            is_right = False
        if not is_right:
            raise ModelArchiveError(
                f"{self._path} is not a packed model: it does not begin with the {SIGNATURE_NAME} that "
                "`vashista models pack` writes."
            )
        return model, info.size

    def _next(self, name: str, entry: FileDigest) -> int:
        """Check the header of the file that must come now; its size."""
        raw = self._exactly(BLOCK, name)
        if entry.num_bytes is not None and raw == header(self.manifest.name, name, entry.num_bytes):
            return entry.num_bytes
        if raw == END[:BLOCK]:
            raise ModelChangedError(f"{name} is missing in {self._path}.")
        try:
            info = tarfile.TarInfo.frombuf(raw, "ascii", "strict")
            found, size = info.name.partition("/")[2], info.size
            is_plain = raw == header(self.manifest.name, found, size)
        except (tarfile.HeaderError, ValueError, OverflowError):
            is_plain = False
        if not is_plain:
            raise self._broken(f"the header of {name} was changed")
        if found == name:
            if entry.num_bytes is None:
                return size
            raise ModelChangedError(f"{name} in {self._path} has {size} bytes instead of {entry.num_bytes}.")
        state = "comes twice or too late" if found in self.manifest.files else "is not in the signed manifest"
        raise ModelChangedError(f"{found!r} in {self._path} {state}; {name} must come there.")

    def _chunks(self, num_bytes: int, name: str) -> Iterator[bytes]:
        while num_bytes > 0:
            chunk = self._file.read(min(CHUNK_BYTES, num_bytes))
            if not chunk:
                raise self._broken(f"it is truncated: it ends within {name}")
            num_bytes -= len(chunk)
            yield chunk

    def _exactly(self, num_bytes: int, what: str) -> bytes:
        data = self._file.read(num_bytes)
        if len(data) < num_bytes:
            raise self._broken(f"it is truncated: it ends within {what}")
        return data

    def _expect_fill(self, num_bytes: int, name: str) -> None:
        if self._exactly(len(_fill(num_bytes)), name) != _fill(num_bytes):
            raise self._broken(f"the fill bytes behind {name} are not zero")

    def _broken(self, how: str) -> ModelArchiveError:
        return ModelArchiveError(f"The packed model {self._path} is damaged: {how}.")


def packed_bytes(path: Path) -> int:
    """Size of the file; ModelFolderError when it is no plain file."""
    return file_size(path)
