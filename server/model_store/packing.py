"""Makes a packed model out of a folder: refuses what may not travel, hashes, signs, writes one file whole."""

from __future__ import annotations

import errno
import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from vashista.engine.checkpoint_files import INDEX_NAME, SINGLE_NAME, list_tensors
from vashista.engine.errors import ModelDiskError, ModelFileRefusedError, ModelFolderError
from vashista.server.commands.inspection import inspect_model
from vashista.server.model_store.archive import archive_bytes, write_archive
from vashista.server.model_store.folder import Report, hash_files, list_files, no_report, refuse_foreign
from vashista.server.model_store.keys import fingerprint
from vashista.server.model_store.manifest import MODEL_NAME, SIGNATURE_NAME, FileDigest, Manifest, sign


@dataclass(frozen=True)
class Packed:
    """What was written."""

    manifest: Manifest
    num_bytes: int
    left_out: Sequence[str]


def check_name(name: str) -> None:
    """ModelFileRefusedError for a name that cannot be a folder's everywhere."""
    if not MODEL_NAME.fullmatch(name):
        raise ModelFileRefusedError(
            f"A model cannot be named {name!r}: letters, digits and ._- are possible, 100 of them, a letter or digit "
            "first. Choose one with --as."
        )


def pack(
    folder: Path, out: Path, key: ec.EllipticCurvePrivateKey, *, name: str, leave_out: Sequence[str] = (),
    report: Report = no_report,
) -> Packed:  # fmt: skip
    """Sign the folder's files and write them to `out`. The folder itself is not changed.

    `leave_out`: shell patterns of files that stay behind. Raises the ModelError that serving or importing would raise.
    """
    check_name(name)
    inspect_model(folder)  # what cannot be served here need not travel
    names = os.listdir(folder)
    left_out = sorted(file for file in names if any(fnmatch.fnmatchcase(file, pattern) for pattern in leave_out))
    needed = {"config.json", "tokenizer.json", *(entry.path.name for entry in list_tensors(folder).values())}
    if SINGLE_NAME not in needed:
        needed.add(INDEX_NAME)
    if lost := sorted(needed.intersection(left_out)):
        raise ModelFolderError(f"Without {', '.join(lost)} what is packed could not be served: do not leave it out.")
    chosen = _chosen(folder, set(left_out))
    digests = hash_files(folder, list(chosen), report)
    files = {file: FileDigest(digests[file], chosen[file].st_size) for file in chosen}
    signature = sign(name, files, key)
    manifest = Manifest(name, files, fingerprint(key.public_key()))
    num_bytes = archive_bytes(signature, [status.st_size for status in chosen.values()])
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            write_archive(file, folder, manifest, signature, report)
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
    except OSError as error:
        raise disk_error(error, out, num_bytes) from error
    finally:
        part.unlink(missing_ok=True)
    return Packed(manifest, num_bytes, left_out)


def _chosen(folder: Path, left_out: set[str]) -> dict[str, os.stat_result]:
    found = {}
    for name, status in list_files(folder, without=left_out).items():
        if name in left_out or name == SIGNATURE_NAME:
            continue
        refuse_foreign(name)
        found[name] = status
    return found


def disk_error(error: OSError, path: Path, num_bytes: int) -> ModelDiskError:
    """What an error of the disk means to whoever wanted to write so many bytes."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelDiskError(f"The disk is full: {path} needs {num_bytes} bytes.")
    return ModelDiskError(f"{path} cannot be written: {error.strerror or error}.")
