"""The two keys that sign bundles: ECDSA P-384, which any openssl verifies, and ML-DSA-87 for the day after it.

They lie in one folder: ecdsa.key and mldsa.key (private, PKCS 8, mode 0600), ecdsa.pem and mldsa.pem (public). The
fingerprint is the SHA-256 of ecdsa.pem followed by mldsa.pem; `deploy/bundle/signature.py` and `install.sh` compute the
same. ML-DSA signs the manifest; ECDSA signs it too, with what sha256sum prints of the first signature after it,
so that a verifier without ML-DSA still sees a change of it. ML-DSA is hedged: two signatures of one text differ.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import click
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, mldsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

HASH = hashes.SHA384()
PRIVATE = ("ecdsa.key", "mldsa.key")
PUBLIC = ("ecdsa.pem", "mldsa.pem")
PrivateKey = ec.EllipticCurvePrivateKey | mldsa.MLDSA87PrivateKey


def make_keys(folder: Path) -> str:
    """Make both keys and return their fingerprint; ClickException when there are some already, or none can be."""
    keys: tuple[PrivateKey, ...] = (ec.generate_private_key(ec.SECP384R1()), mldsa.MLDSA87PrivateKey.generate())
    try:
        there = [name for name in (*PRIVATE, *PUBLIC) if (folder / name).exists()]
        if there:
            raise click.ClickException(
                f"{folder} has {there[0]} already: keys are never overwritten. Name another folder."
            )
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for key, private, public in zip(keys, PRIVATE, PUBLIC, strict=True):
            descriptor = os.open(folder / private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            (folder / public).write_bytes(_public_pem(key))
    except OSError as error:
        raise _unwritable(folder, error) from error
    return fingerprint(folder)


def fingerprint(folder: Path) -> str:
    """64 hex digits over the public keys in the folder."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in PUBLIC)).hexdigest()


def load_keys(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, mldsa.MLDSA87PrivateKey]:
    """Both private keys; ClickException when one cannot be used."""
    first, second = _load(folder / PRIVATE[0]), _load(folder / PRIVATE[1])
    if not isinstance(first, ec.EllipticCurvePrivateKey) or not isinstance(first.curve, ec.SECP384R1):
        raise click.ClickException(f"{folder / PRIVATE[0]} is not a key on the curve P-384.")
    if not isinstance(second, mldsa.MLDSA87PrivateKey):
        raise click.ClickException(f"{folder / PRIVATE[1]} is not a key of ML-DSA-87.")
    return first, second


def sign(text: bytes, keys: Path, out: Path) -> None:
    """Write ecdsa.pem, ecdsa.sig, mldsa.pem and mldsa.sig of the text into `out`, which is made if need be.

    ClickException when a key cannot be used or the folder not be written.
    """
    first, second = load_keys(keys)
    after = second.sign(text)
    whole = text + f"{hashlib.sha256(after).hexdigest()}  signature/mldsa.sig\n".encode()
    signed = (first.sign(whole, ec.ECDSA(HASH, deterministic_signing=True)), after)
    keys_used: tuple[PrivateKey, ...] = (first, second)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for key, public, signature in zip(keys_used, PUBLIC, signed, strict=True):
            (out / public).write_bytes(_public_pem(key))
            (out / public.replace(".pem", ".sig")).write_bytes(signature)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:  # a fault of the machine must not leave with a release
        first.public_key().verify(signed[0], whole, ec.ECDSA(HASH))
        second.public_key().verify(signed[1], text)
    except InvalidSignature as error:
        raise click.ClickException("A signature that was just made does not verify; try another machine.") from error


def _load(path: Path) -> object:
    try:
        return load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise click.ClickException(
            f"{path} cannot be read: {error.strerror}. `vashista bundle key` makes keys."
        ) from error
    except (ValueError, TypeError) as error:
        raise click.ClickException(f"{path} holds no private key without a password: {error}") from error


def _unwritable(folder: Path, error: OSError) -> click.ClickException:
    return click.ClickException(f"{folder} cannot be written: {error.strerror}. Name a folder that you may write to.")


def _public_pem(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
