"""Checks of what must be kept and of what is served: ledger, its key, the clock against it, the model's files."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from vashista.engine.errors import LedgerError, ModelError, SelftestAnswersError
from vashista.engine.model_digest import model_digest
from vashista.engine.selftest_answers import FILE_NAME, SelftestAnswers, digest_files, list_files
from vashista.server.doctor.finding import Finding, not_checked, not_ok, ok
from vashista.server.ledger.signing import load_public, load_signing
from vashista.server.ledger.store import DATABASE_NAME, PUBLIC_KEY_NAME, open_readable, read_mark
from vashista.server.ledger.verify import Verdict, verify

SIGNING_KEY_NAME = "ledger.key"
MAX_LEAD_S = 60.0
"""Seconds by which the ledger's last signature may be ahead of the clock."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def _has_ledger(state_dir: Path) -> bool | None:
    """Whether there is one; None where this user may not look."""
    try:
        (state_dir / DATABASE_NAME).stat()
    except FileNotFoundError:
        return False
    except PermissionError:
        return None
    return True


def ledger(state_dir: Path) -> tuple[Finding, Verdict | None]:
    """Whether the chain is whole, and the verdict for the attestation; None where there is no ledger."""
    name = "ledger"
    path = state_dir / DATABASE_NAME
    has_ledger = _has_ledger(state_dir)
    if has_ledger is None:
        remedy = "Run this as root, or as the server's user."
        return not_ok(name, f"{state_dir} may not be entered by user {os.geteuid()}.", remedy), None
    if not has_ledger:
        return not_checked(name, f"there is none at {path}: no server has run with this state folder"), None
    try:
        verdict = verify(path, key=load_public(state_dir / PUBLIC_KEY_NAME))
    except LedgerError as error:
        return not_ok(name, error.message, error.remedy), None
    if verdict.damage is not None:
        return not_ok(
            name, verdict.damage.message, "Keep the file as evidence; `vashista ledger verify` says more."
        ), verdict
    return ok(name, f"{verdict.num_receipts} receipts, whole and signed by {verdict.fingerprint[:16]}…"), verdict


def signing_key(state_dir: Path) -> Finding:
    """Whether the key that signs is there, the owner's alone, and the ledger's."""
    name = "signatures"
    if not _has_ledger(state_dir):
        return not_checked(name, "there is no ledger yet and so no key, or they may not be looked at")
    try:
        signing = load_signing(state_dir / SIGNING_KEY_NAME)
        public = load_public(state_dir / PUBLIC_KEY_NAME)
    except LedgerError as error:
        return not_ok(name, error.message, error.remedy)
    if signing.public.raw != public.raw:
        return not_ok(name, "ledger.key and ledger.pub are not of one pair.", "Restore both from the same backup.")
    return ok(name, f"the ledger's key {public.fingerprint}, for its owner alone")


def clock(state_dir: Path, now: Callable[[], float] = time.time) -> Finding:
    """Whether the clock is behind what the ledger has signed: the only clock in the room to compare it with."""
    name = "clock"
    now_s = now()
    text = datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    path = state_dir / DATABASE_NAME
    if not _has_ledger(state_dir):
        return not_checked(name, f"{text}; there is no ledger to compare it with, or it may not be looked at")
    try:
        signed = _signed_at(path)
        signed_s = datetime.fromisoformat(signed).timestamp()
    except LedgerError as error:
        return not_checked(name, f"{text}; {error.message}")
    except (sqlite3.Error, ValueError):
        return not_checked(name, f"{text}; the ledger's end cannot be read")
    if signed_s > now_s + MAX_LEAD_S:
        return not_ok(
            name,
            f"It is {text}, but the ledger was signed at {signed}.",
            "Set the clock, or the machine's time source.",
        )
    return ok(name, f"{text}, not behind the ledger's last signature at {signed}")


def _signed_at(path: Path) -> str:
    """When the ledger's end was signed; ValueError when it has none."""
    connection = open_readable(path)
    try:
        connection.text_factory = str
        head = read_mark(connection, "head")
    finally:
        connection.close()
    if head is None:
        raise ValueError("no head")
    return head.time


def model(folder: Path | None, checked: Mapping[str, str] | None = None) -> tuple[Finding, dict[str, object] | None]:
    """Whether the model can be served and its files are the known ones; its digests for the attestation.

    `checked`: SHA-256 of its files by name where they were hashed just now; gigabytes are not read twice.
    """
    if folder is None:
        return not_checked("model", "none is set; give --model or --config"), None
    try:
        digest = model_digest(folder)
        names = list_files(folder)
        files = (
            {file: checked[file] for file in names}
            if checked and checked.keys() >= set(names)
            else (digest_files(folder))
        )
    except ModelError as error:
        return not_ok("model", error.message, error.remedy), None
    return _compare(folder, digest, files), {"folder": str(folder), "digest": digest, "sha256": files}


def _compare(folder: Path, digest: str, files: dict[str, str]) -> Finding:
    """The files against those of selftest.json, where the model has one."""
    name = "model"
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return not_ok(name, f"{', '.join(pickles)} may hold code; it is never loaded.", "Remove the file.")
    if not (folder / FILE_NAME).exists():
        return ok(name, f"{folder.name}, digest {digest[:16]}…; no {FILE_NAME} to compare its files with")
    try:
        known = SelftestAnswers.load(folder / FILE_NAME).files
    except SelftestAnswersError as error:
        return not_ok(name, error.message, error.remedy)
    wrong = sorted(file for file in known.keys() | files.keys() if known.get(file) != files.get(file))
    if wrong:
        return not_ok(name, f"Not as {FILE_NAME} knows them: {', '.join(wrong)}.", "Copy the model folder again.")
    return ok(name, f"{folder.name}, {len(files)} files as {FILE_NAME} knows them")
