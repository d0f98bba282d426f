"""Seals request bodies for the ledger, so that the server can write them and cannot read them back.

With `ledger_prompts = encrypted` the server has an X25519 public key; the private half stays with whoever may read
prompts and is needed by `vashista ledger show --key` alone. The seal is an anonymous box of standard parts: a fresh key
pair for each body, X25519, HKDF-SHA256, AES-256-GCM. docs/ledger.md gives the bytes. The receipt holds the box's hash.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vashista.engine.errors import PromptKeyError

MAGIC = b"vashista-prompt-v1\n"
KEY_ID_BYTES = 8
_HEAD = len(MAGIC) + KEY_ID_BYTES + 32
_NONCE = bytes(12)
"""Constant: each box has a key of its own."""


class Sealer:
    """Seals for one public key."""

    def __init__(self, public: X25519PublicKey) -> None:
        self._public = public
        self._raw = public.public_bytes_raw()

    def seal(self, data: bytes) -> bytes:
        """The box: head, then ciphertext and tag. About 150 microseconds, and 1 ms a MB."""
        own = X25519PrivateKey.generate()
        ephemeral = own.public_key().public_bytes_raw()
        head = MAGIC + _key_id(self._raw) + ephemeral
        key = _derive(own.exchange(self._public), ephemeral, self._raw)
        return head + AESGCM(key).encrypt(_NONCE, data, head)


def box_hash(box: bytes) -> str:
    """What the receipt holds: SHA-256 in hexadecimal digits."""
    return hashlib.sha256(box).hexdigest()


def unseal(box: bytes, private: X25519PrivateKey) -> bytes:
    """What was sealed; PromptKeyError when it was sealed for another key or changed."""
    raw = private.public_key().public_bytes_raw()
    if len(box) < _HEAD or not box.startswith(MAGIC):
        raise PromptKeyError("The sealed prompt is damaged: it does not begin as one.")
    if box[len(MAGIC) : len(MAGIC) + KEY_ID_BYTES] != _key_id(raw):
        raise PromptKeyError("The prompt was sealed for another key.")
    ephemeral = box[_HEAD - 32 : _HEAD]
    try:
        key = _derive(private.exchange(X25519PublicKey.from_public_bytes(ephemeral)), ephemeral, raw)
        return AESGCM(key).decrypt(_NONCE, box[_HEAD:], box[:_HEAD])
    except (InvalidTag, ValueError):
        raise PromptKeyError("The sealed prompt is damaged: it cannot be opened.") from None


def load_sealer(path: Path) -> Sealer:
    """For the public key of a PEM file; PromptKeyError if it is none."""
    try:
        key = serialization.load_pem_public_key(_read(path))
    except ValueError:
        raise PromptKeyError(f"{path} is not a public key in PEM.") from None
    if not isinstance(key, X25519PublicKey):
        raise PromptKeyError(f"{path} is not an X25519 public key.")
    return Sealer(key)


def load_opener(path: Path) -> X25519PrivateKey:
    """The private key of a PEM file; PromptKeyError if it is none."""
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError):
        raise PromptKeyError(f"{path} is not a private key in PEM without a password.") from None
    if not isinstance(key, X25519PrivateKey):
        raise PromptKeyError(f"{path} is not an X25519 private key.")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PromptKeyError(f"The key {path} cannot be read: {error.strerror}.") from error


def _key_id(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:KEY_ID_BYTES]


def _derive(shared: bytes, ephemeral: bytes, recipient: bytes) -> bytes:
    kdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=ephemeral + recipient, info=MAGIC)
    return kdf.derive(shared)
