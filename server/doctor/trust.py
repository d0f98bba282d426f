"""Checks of who vouches for the model, and of the server's certificate."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from vashista.engine.errors import ModelError, TlsError
from vashista.server.doctor.finding import Finding, not_checked, not_ok, ok
from vashista.server.model_store.keys import load_trusted
from vashista.server.model_store.store import check_installed
from vashista.server.settings import Settings
from vashista.server.tls import load

DAYS_AHEAD = 14
"""So long before a certificate expires it is not ok any more: a new one takes people."""


def signer(folder: Path | None, trust: Path | None) -> tuple[Finding, dict[str, str] | None]:
    """Whether a trusted key signed the model, and every byte is as signed; then the SHA-256 of the files by name."""
    name = "model signer"
    if folder is None:
        return not_checked(name, "no model is set; give --model or --config"), None
    if trust is None:
        return not_checked(name, "model_trust names no key, so the model's signature is not looked at"), None
    try:
        manifest = check_installed(folder, load_trusted(trust))
    except ModelError as error:
        return not_ok(name, error.message, error.remedy), None
    detail = f"{manifest.signer[:16]}… signed {manifest.name}, root digest {manifest.root_digest[:16]}…"
    return ok(name, detail), {file: entry.sha256 for file, entry in manifest.files.items()}


def certificates(settings: Settings | None, now: Callable[[], float] = time.time) -> Finding:
    """Whether the certificate can be used, and for how long yet."""
    name = "certificates"
    if settings is None or settings.tls_certificate is None:
        return not_checked(name, "tls_certificate is not set: the server speaks HTTP, or a proxy before it has one")
    try:
        found = load(settings, now)
    except TlsError as error:
        return not_ok(name, error.message, error.remedy)
    days = int((found.expires_s - now()) // 86400)
    until = datetime.fromtimestamp(found.expires_s, UTC).strftime("%Y-%m-%d")
    if days < DAYS_AHEAD:
        return not_ok(name, f"{found.subject} expires on {until}, in {days} days.", "Have your CA issue a new one now.")
    clients = "" if settings.tls_client_ca is None else "; clients need one too"
    return ok(name, f"{found.subject} until {until}, {days} days{clients}")
