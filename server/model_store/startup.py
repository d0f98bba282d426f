"""The check of a signed model before the engine loads it: every byte, or what changed since every byte was checked.

`server/serve.py` calls `check_before_load` before it starts the engine, and again before it starts one that died.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vashista.engine.errors import ModelError, ModelKeyError
from vashista.engine.whole_file import write_whole
from vashista.server.model_store.folder import check_contents, check_list, read_manifest, read_signature
from vashista.server.model_store.keys import load_trusted
from vashista.server.model_store.manifest import SIGNATURE_NAME
from vashista.server.settings import Settings

logger = logging.getLogger(__name__)
RECORD_NAME = "checked_model.json"
Seal = tuple[int, int, int, int, int]
"""Of one file: device, inode, bytes, nanoseconds of its last write and of its last change of any kind."""


@dataclass(frozen=True)
class VerifiedModel:
    """A model whose files are those that were signed."""

    root_digest: str
    signer: str
    """Fingerprint of the key."""
    is_full: bool
    """Every byte was read this time; False: files that nobody touched since they were read were not read again."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Which files were found right when every byte was read, and how they then looked. In the state folder."""

    folder: str
    root_digest: str
    seals: dict[str, Seal]


def check_before_load(settings: Settings) -> VerifiedModel | None:
    """What was found, None where nothing is asked for; raises the ModelError of a model that must not be served."""
    mode = settings.verify_model
    if mode == "auto":
        mode = "off" if settings.model_trust is None else "fast"
    if mode == "off":
        if read_signature(settings.model) is not None:
            logger.warning("the model's %s is not looked at: model_trust names no key, or verify_model is off",
                           SIGNATURE_NAME)  # fmt: skip
        return None
    if settings.model_trust is None:
        raise ModelKeyError(f"The setting verify_model is {mode}, but model_trust names no key to check models with.")
    start_s = time.monotonic()
    manifest = read_manifest(settings.model, load_trusted(settings.model_trust))
    found = check_list(settings.model, manifest)
    seals = {name: _seal(status) for name, status in found.items()}
    path = settings.state_dir / RECORD_NAME
    known = _read(path, settings.model, manifest.root_digest) if mode == "fast" else {}
    unknown = {name: entry for name, entry in manifest.files.items() if known.get(name) != seals[name]}
    check_contents(settings.model, unknown)
    # looked at again: who wrote to a file while it was read has changed its times
    after = {name: _seal(status) for name, status in check_list(settings.model, manifest).items()}
    if after == seals:
        _write(path, Record(folder=str(settings.model.resolve()), root_digest=manifest.root_digest, seals=seals))
    verified = VerifiedModel(manifest.root_digest, manifest.signer, len(unknown) == len(manifest.files))
    fields = {
        "root_digest": verified.root_digest,
        "signer": verified.signer,
        "files": len(manifest.files),
        "read": len(unknown),
        "seconds": round(time.monotonic() - start_s, 3),
    }
    logger.info("the model is the one that was signed", extra={"fields": fields})
    return verified


def _seal(status: os.stat_result) -> Seal:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _read(path: Path, folder: Path, root_digest: str) -> Mapping[str, Seal]:
    """The seals of this model; {} for a record that is missing, damaged, or of another model."""
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return record.seals if (record.folder, record.root_digest) == (str(folder.resolve()), root_digest) else {}


def _write(path: Path, record: Record) -> None:
    try:
        write_whole(path, msgspec.json.encode(record))
    except OSError as error:
        logger.warning("%s cannot be written, so that the next start reads all of the model: %s", path, error.strerror)


def describe(folder: Path, trust: Path | None) -> str:
    """The signature of a folder in a few words, for a list: nothing but model.sig is read."""
    if read_signature(folder) is None:
        return "unsigned"
    if trust is None:
        return "signed, no key to check it with"
    try:
        return "signed by " + read_manifest(folder, load_trusted(trust)).signer[:16]
    except ModelError as error:
        return f"error[{error.code}]"
