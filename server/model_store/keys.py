"""The keys that sign models, and the ones that an operator trusts: EC keys of P-256, P-384 or P-521 in PEM.

`vashista models pack` signs with a private key; import, verify and the server's start check with the public keys of
`model_trust`. The fingerprint of a key is the SHA-256 of its PEM text, which `sha256sum key.pem` prints too; OpenSSF's
model signing names keys the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from vashista.engine.errors import ModelKeyError

HASHES: dict[str, type[hashes.HashAlgorithm]] = {
    "secp256r1": hashes.SHA256,
    "secp384r1": hashes.SHA384,
    "secp521r1": hashes.SHA512,
}
"""What is signed with a key of this curve; the format of OpenSSF fixes it."""
MAX_KEY_BYTES = 64 << 10


@dataclass(frozen=True)
class TrustedKey:
    """A public key, and the file that it came from."""

    path: Path
    key: ec.EllipticCurvePublicKey

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the PEM text, in hexadecimal digits."""
        return fingerprint(self.key)

    def is_signature(self, signature: bytes, statement: bytes) -> bool:
        """Whether the private half signed the statement."""
        try:
            self.key.verify(signature, statement, ec.ECDSA(HASHES[self.key.curve.name]()))
        except InvalidSignature:
            return False
        return True


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the key's PEM text, in hexadecimal digits."""
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def load_trusted(path: Path) -> list[TrustedKey]:
    """The public keys of a PEM file, or of all `*.pem` in a folder. ModelKeyError when there is none, or a bad one."""
    try:
        files = sorted(path.glob("*.pem")) if path.is_dir() else [path]
    except OSError as error:
        raise ModelKeyError(f"{path} cannot be read: {error.strerror}.") from error
    if not files:
        raise ModelKeyError(f"The folder {path} holds no *.pem: no key is trusted.")
    found = [TrustedKey(file, key) for file in files if (key := _load_public(file, is_alone=file == path)) is not None]
    if not found:
        raise ModelKeyError(f"No *.pem in {path} is an EC key, which is what models are signed with.")
    return found


def _load_public(path: Path, *, is_alone: bool) -> ec.EllipticCurvePublicKey | None:
    """The key; None for one of another kind in a folder, where keys of bundles may lie too."""
    data = _read(path)
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        held = " (it holds a private key; give the public half)" if b"PRIVATE KEY" in data else ""
        raise ModelKeyError(f"{path} is not a public key in PEM{held}.") from error
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in HASHES:
        return key
    if is_alone:
        raise ModelKeyError(f"{path} is not an EC key of P-256, P-384 or P-521, which is what models are signed with.")
    return None


def load_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """A key to sign with. ModelKeyError for anything else, and for a key that needs a password."""
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except TypeError as error:
        raise ModelKeyError(
            f"{path} is encrypted; write it without a password to a file that is deleted after use "
            f"(openssl pkey -in {path} -out FILE)."
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ModelKeyError(f"{path} is not a private key in PEM.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in HASHES:
        raise ModelKeyError(f"{path} is not an EC key of P-256, P-384 or P-521.")
    return key


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise ModelKeyError(f"The key {path} {'is not a plain file' if path.exists() else 'does not exist'}.")
        if path.stat().st_size > MAX_KEY_BYTES:
            raise ModelKeyError(f"{path} is larger than {MAX_KEY_BYTES} bytes; no key is.")
        return path.read_bytes()
    except OSError as error:
        raise ModelKeyError(f"The key {path} cannot be read: {error.strerror}.") from error


def find_key(keys: Sequence[TrustedKey], wanted: str) -> TrustedKey | None:
    """The key of this fingerprint."""
    return next((key for key in keys if key.fingerprint == wanted), None)
