"""The signed manifest of a model: `model.sig` beside its files, in the format of OpenSSF's model signing 1.0.

A Sigstore bundle that holds a DSSE envelope around an in-toto statement: the SHA-256 of every file, and as its subject
the model's name and root digest, the SHA-256 over the files' digests in the order of their names. `model_signing verify
key` (the reference program) takes what is signed here, and what it signs with a key is taken here;
`bench/airgap/model_signing_peer.py` tries both. A file's size is added, which that program ignores.

https://github.com/ossf/model-signing-spec, https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from vashista.engine.errors import ModelSignatureError, ModelUntrustedError
from vashista.server.model_store.keys import HASHES, TrustedKey, find_key, fingerprint

SIGNATURE_NAME = "model.sig"
MAX_SIGNATURE_BYTES = 16 << 20
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ +@-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileDigest:
    """What a file must be."""

    sha256: str
    num_bytes: int | None
    """None where the signer did not write it down."""


@dataclass(frozen=True)
class Manifest:
    """The files of a model, and who vouches for them."""

    name: str
    files: Mapping[str, FileDigest]
    """By plain name, in the order of the names."""
    signer: str
    """Fingerprint of the key."""

    @property
    def root_digest(self) -> str:
        """SHA-256 over the files' digests: one number for the whole model, in hexadecimal digits."""
        return root_digest(self.files)


def root_digest(files: Mapping[str, FileDigest]) -> str:
    """See `Manifest.root_digest`."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(bytes.fromhex(files[name].sha256))
    return digest.hexdigest()


def sign(name: str, files: Mapping[str, FileDigest], key: ec.EllipticCurvePrivateKey) -> bytes:
    """The text of `model.sig`. ECDSA draws a random number, so that no two signatures are alike."""
    ordered = {file: files[file] for file in sorted(files)}
    resources = [
        {"name": file, "algorithm": "sha256", "digest": entry.sha256, "size": entry.num_bytes}
        for file, entry in ordered.items()
    ]
    serialization = {
        "method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE_NAME]
    }  # fmt: skip
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": root_digest(ordered)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"serialization": serialization, "resources": resources},
    }
    payload = json.dumps(statement, indent=1).encode()
    signature = key.sign(_signed_bytes(payload), ec.ECDSA(HASHES[key.curve.name]()))
    bundle = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": fingerprint(key.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle).encode() + b"\n"


def read_signed(data: bytes, keys: Sequence[TrustedKey]) -> Manifest:
    """The manifest in the text of `model.sig`, once a trusted key has signed it.

    ModelSignatureError for a text that is none or was changed, ModelUntrustedError for a key that is not trusted.
    """
    try:
        bundle = _fields(json.loads(data), "mediaType", "verificationMaterial", "dsseEnvelope")
        if data not in _forms(bundle):
            raise ValueError("blanks or line ends were put in or taken out")
        material = _fields(bundle["verificationMaterial"], "publicKey", "tlogEntries")
        hint = _fields(material["publicKey"], "hint", "rawBytes", "keyDetails")["hint"]
        envelope = _fields(bundle["dsseEnvelope"], "payload", "payloadType", "signatures")
        [signed] = envelope["signatures"]
        payload, signature = _decode(envelope["payload"]), _decode(_fields(signed, "sig", "keyid")["sig"])
        if material.get("tlogEntries") or signed.get("keyid"):
            raise ValueError("there is a transparency log or a key id, which nobody reads")
        media_type, payload_type = bundle["mediaType"], envelope["payloadType"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelSignatureError(
            f"{SIGNATURE_NAME} is damaged, or not signed with a key in the format of model signing 1.0 ({error!r})."
        ) from error
    if (media_type, payload_type) != (BUNDLE_TYPE, PAYLOAD_TYPE):
        raise ModelSignatureError(f"{SIGNATURE_NAME} is of type {media_type!r}; {BUNDLE_TYPE} is read.")
    key = find_key(keys, hint) if isinstance(hint, str) else None
    if key is None:
        trusted = ", ".join(f"{key.fingerprint[:16]}… ({key.path.name})" for key in keys)
        raise ModelUntrustedError(
            f"The model is signed by the key {str(hint)[:16]}…, which is not trusted here; trusted are {trusted}."
        )
    if not key.is_signature(signature, _signed_bytes(payload)):
        raise ModelSignatureError(f"{SIGNATURE_NAME} was changed after {key.path.name} signed it.")
    return _read_statement(payload, key)


def _fields(value: Mapping[str, Any], *known: str) -> Mapping[str, Any]:
    """The JSON object; ValueError if it has fields that are not known: nothing in the file may go unread."""
    unknown = {name for name, held in value.items() if name not in known and held is not None}
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    return value


def _forms(bundle: Mapping[str, Any]) -> tuple[bytes, ...]:
    """The bytes that we, and the reference program, write for it."""
    compact = json.dumps(bundle, separators=(",", ":"), ensure_ascii=False)
    return json.dumps(bundle).encode() + b"\n", compact.encode("utf-8", "surrogatepass")


def _decode(text: str) -> bytes:
    """base64; ValueError for one that no encoder writes."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise ValueError("the base64 has bits that belong to no byte")
    return data


def _signed_bytes(payload: bytes) -> bytes:
    """What a DSSE signature is over."""
    return f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def _read_statement(payload: bytes, key: TrustedKey) -> Manifest:
    """The manifest of a statement whose signature is right; it may still be of another kind."""
    try:
        statement = json.loads(payload)
        kinds = (statement["_type"], statement["predicateType"])
        [subject] = statement["subject"]
        name, digest = subject["name"], subject["digest"]["sha256"]
        serialization = statement["predicate"]["serialization"]
        method = (serialization["method"], serialization["hash_type"])
        listed = [(str(entry["name"]), _entry(entry)) for entry in statement["predicate"]["resources"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelSignatureError(f"{SIGNATURE_NAME} does not hold a statement about a model ({error!r}).") from error
    files = dict(sorted(listed))
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise ModelSignatureError(f"{SIGNATURE_NAME} states {kinds[1]!r}; {PREDICATE_TYPE} is read.")
    if method != ("files", "sha256"):
        raise ModelSignatureError(
            f"{SIGNATURE_NAME} was made with {method[0]} and {method[1]}; sign again by files with sha256."
        )
    bad = [file for file in files if not FILE_NAME.fullmatch(file)]
    if bad or len(files) != len(listed) or not files or not isinstance(name, str):
        raise ModelSignatureError(
            f"{SIGNATURE_NAME} names {bad[0]!r}; only plain names of files in the model's folder itself can be used."
            if bad
            else f"{SIGNATURE_NAME} names no file, or one of them twice."
        )
    if digest != root_digest(files):
        raise ModelSignatureError(f"{SIGNATURE_NAME} contradicts itself: its root digest is not that of its files.")
    return Manifest(name, files, key.fingerprint)


def _entry(entry: Mapping[str, Any]) -> FileDigest:
    """One file of the statement; ValueError if it is none."""
    digest, num_bytes = entry["digest"], entry.get("size")
    if entry["algorithm"] != "sha256" or not _DIGEST.fullmatch(digest):
        raise ValueError("a digest is not a SHA-256")
    # protobuf's JSON, in which the reference program writes, has no integers
    if num_bytes is not None and (num_bytes != int(num_bytes) or num_bytes < 0):
        raise ValueError("a size is not a number of bytes")
    return FileDigest(digest, None if num_bytes is None else int(num_bytes))
