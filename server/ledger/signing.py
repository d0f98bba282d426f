"""The Ed25519 key that signs a ledger: made at its first start, in `ledger.key` beside the database, mode 0600.

Its public half is in `ledger.pub` and in the ledger itself. An auditor should note the fingerprint elsewhere: who can
write the state folder could replace ledger and key together.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from vashista.engine.errors import LedgerKeyError, LedgerOptionError

logger = logging.getLogger(__name__)
_SPKI = bytes.fromhex("302a300506032b6570032100")
"""What stands before the 32 bytes of the key in DER (RFC 8410)."""


class PublicKey:
    """Checks signatures."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._key = Ed25519PublicKey.from_public_bytes(raw)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the 32 bytes, in hexadecimal digits."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def pem(self) -> str:
        """The key as openssl reads it."""
        text = base64.b64encode(_SPKI + self.raw).decode()
        return f"-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n"

    def is_signature(self, signature: bytes, statement: bytes) -> bool:
        """Whether the private half signed the statement."""
        try:
            self._key.verify(signature, statement)
        except InvalidSignature:
            return False
        return True


class SigningKey:
    """Signs; lives in the process that writes."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes_raw())

    def sign(self, statement: bytes) -> bytes:
        """64 bytes; about 50 microseconds."""
        return self._key.sign(statement)


def load_public(path: Path) -> PublicKey:
    """The key of a PEM file; LedgerKeyError if it is none."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        der = base64.b64decode("".join(line for line in lines if "---" not in line), validate=True)
    except OSError as error:
        raise LedgerKeyError(f"The public key {path} cannot be read: {error.strerror}.") from error
    except (ValueError, binascii.Error) as error:
        raise LedgerKeyError(f"{path} is not a public key in PEM.") from error
    if len(der) != 44 or not der.startswith(_SPKI):
        raise LedgerKeyError(f"{path} is not an Ed25519 public key in PEM.")
    return PublicKey(der[12:])


def expected_key(path: Path | None) -> PublicKey | None:
    """The key that the option --key names; LedgerOptionError if it names none."""
    try:
        return None if path is None else load_public(path)
    except LedgerKeyError as error:
        raise LedgerOptionError(f"--key: {error.message}") from error


def load_signing(path: Path) -> SigningKey:
    """The private key; LedgerKeyError when it is missing, damaged or open to others."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except OSError as error:
        raise LedgerKeyError(f"The ledger's key {path} cannot be read: {error.strerror}.") from error
    if mode & 0o077:
        raise LedgerKeyError(
            f"The ledger's key {path} has mode {mode:04o}, so that others may use it; it must be 0600."
        )
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise LedgerKeyError(f"{path} is not a private key in PEM.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise LedgerKeyError(f"{path} is not an Ed25519 private key.")
    return SigningKey(key)


def make_signing(private_path: Path, public_path: Path) -> SigningKey:
    """Make a key and write both halves; LedgerKeyError when that fails."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    signing = SigningKey(key)
    try:
        # Written aside and renamed: a crash leaves no half of a key.
        _write(private_path, pem, 0o600)
        _write(public_path, signing.public.pem.encode(), 0o644)
        folder = os.open(private_path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise LedgerKeyError(f"The ledger's key {private_path} cannot be written: {error.strerror}.") from error
    return signing


def renew_public(signing: SigningKey, path: Path) -> None:
    """Write the public half again where it is missing or another's; LedgerKeyError when that fails."""
    pem = signing.public.pem.encode()
    try:
        known = path.read_bytes() if path.exists() else None
        if known == pem:
            return
        if known is not None:
            logger.warning("%s was not the public half of the ledger's key; it is written anew", path)
        _write(path, pem, 0o644)
    except OSError as error:
        raise LedgerKeyError(f"The ledger's public key {path} cannot be written: {error.strerror}.") from error


def _write(path: Path, data: bytes, mode: int) -> None:
    aside = path.with_name(path.name + ".new")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
