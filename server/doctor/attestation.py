"""A signed statement of what was found at one moment: `vashista attest write` makes it, `verify` checks it.

The file is JSON with three fields: `statement` (base64 of the signed bytes), `signature` (base64, Ed25519 with the
ledger's key) and `public_key` (PEM). The signed bytes are the line `vashista-attestation-v1` and then JSON; no receipt
or mark of the ledger begins like that, so that neither can stand for the other. `deploy/verify_attestation.py` checks
it with the standard library alone, openssl with the three parts written to files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import msgspec

from vashista.engine.errors import AttestationError
from vashista.server.doctor.controls import map_controls
from vashista.server.doctor.examination import Examination
from vashista.server.ledger.signing import PublicKey, SigningKey
from vashista.server.settings import Settings

DOMAIN = b"vashista-attestation-v1\n"
SPKI_BYTES = 44
SECRET_WORDS = ("secret", "password", "passphrase", "api_key", "private")
BILL_NAME = "sbom.cdx.json"


class Attestation(msgspec.Struct, frozen=True):
    """The file."""

    statement: str
    signature: str
    public_key: str


def bill_of_materials(prefix: Path | None = None) -> Path | None:
    """The SBOM that came with this installation, by a bundle or in an image; None in a checkout."""
    places = ((prefix or Path(sys.prefix)) / "share" / BILL_NAME, Path("/usr/share/vashista") / BILL_NAME)
    return next((place for place in places if place.is_file()), None)


def _whole(bill: Path) -> dict[str, str]:
    """Where it lies, its SHA-256 and all of its text."""
    data = bill.read_bytes()
    return {"path": str(bill), "sha256": hashlib.sha256(data).hexdigest(), "text": data.decode()}


def make_statement(
    examination: Examination, settings: Settings, *, now_s: float, bill: Path | None, sources: str
) -> dict[str, Any]:
    """What is signed, as JSON values. `sources` says where the settings came from."""
    states = {finding.name: finding.state for finding in examination.findings}
    verdict = examination.verdict
    return {
        "format": "vashista-attestation-v1",
        "time": datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "scope": "What the findings say was looked at on this machine at this time; nothing else is claimed.",
        "product": {"name": "vashista", "version": version_of("vashista"), "python": sys.version.split()[0]},
        "sbom": None if bill is None else _whole(bill),
        "model": examination.model,
        "ledger": None if verdict is None else msgspec.to_builtins(verdict),
        "findings": msgspec.to_builtins(examination.findings),
        "settings": {"from": sources, "values": redacted(settings)},
        "controls": map_controls(states, has_bill=bill is not None),
    }


def redacted(settings: Settings) -> dict[str, Any]:
    """All settings as JSON values; the text of those whose names speak of secrets is left out."""
    return hide_secrets(settings.model_dump(mode="json"))


def hide_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, but for those that are secrets by their names. A path to a key is none."""
    return {
        name: "(not shown)" if value is not None and any(word in name for word in SECRET_WORDS) else value
        for name, value in values.items()
    }


def sign(statement: dict[str, Any], key: SigningKey) -> Attestation:
    """The signed file."""
    data = DOMAIN + json.dumps(statement, sort_keys=True, indent=1, ensure_ascii=False).encode()
    return Attestation(base64.b64encode(data).decode(), base64.b64encode(key.sign(data)).decode(), key.public.pem)


def read_attestation(path: Path, expected: PublicKey | None = None) -> tuple[dict[str, Any], PublicKey]:
    """The statement of a file whose signature is good, and the key that signed it. AttestationError else.

    `expected` is the key that must have signed it; without it the file's own word is taken.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Attestation)
        data, signature = (base64.b64decode(text, validate=True) for text in (found.statement, found.signature))
        lines = [line for line in found.public_key.splitlines() if "---" not in line]
        raw = base64.b64decode("".join(lines), validate=True)
    except OSError as error:
        raise AttestationError(f"{path} cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, binascii.Error, ValueError, RecursionError) as error:
        raise AttestationError(f"{path} is no attestation.") from error
    if len(raw) != SPKI_BYTES:
        raise AttestationError(f"{path} names no Ed25519 key.")
    key = PublicKey(raw[12:])
    if found.public_key != key.pem:
        raise AttestationError(f"{path} names no Ed25519 key.")
    if expected is not None and key.raw != expected.raw:
        raise AttestationError(f"{path} is signed by {key.fingerprint}, not by {expected.fingerprint}.")
    if not key.is_signature(signature, data):
        raise AttestationError(f"{path} was changed since it was signed.")
    if not data.startswith(DOMAIN):
        raise AttestationError(f"{path} holds another kind of statement.")
    statement: dict[str, Any] = json.loads(data[len(DOMAIN) :])
    return statement, key
