"""signature/ of a bundle: public keys and signatures of the manifest, made by a command or taken from another bundle.

The fingerprint is the SHA-256 of ecdsa.pem followed by mldsa.pem where there is one, so that nobody can take the second
signature away unseen. mldsa.sig is of the manifest; ecdsa.sig is of the manifest and, where there is an mldsa.sig, what
`sha256sum signature/mldsa.sig` prints. Every signature is checked with openssl before it goes in.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bundle.archive import read_member
from bundle.contents import Contents
from bundle.manifest import BundleError

FOLDER = "signature"
ECDSA = ("ecdsa.pem", "ecdsa.sig")
MLDSA = ("mldsa.pem", "mldsa.sig")


def fingerprint(contents: Mapping[str, bytes | Path]) -> str:
    """64 hex digits: what the operator compares."""
    digest = hashlib.sha256()
    for name in ("ecdsa.pem", "mldsa.pem"):
        data = contents.get(f"{FOLDER}/{name}", b"")
        digest.update(data if isinstance(data, bytes) else data.read_bytes())
    return digest.hexdigest()


def made_by(command: list[str], text: bytes, folder: Path) -> Contents:
    """Run the command with the manifest and a folder for its files. BundleError when it fails or signs another text."""
    manifest, out = folder / "MANIFEST", folder / FOLDER
    manifest.write_bytes(text)
    out.mkdir()
    done = subprocess.run([*command, str(manifest), str(out)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BundleError(f"The signing command failed: {done.stderr.strip()}")
    return taken_over(out, text)


def taken_over(place: Path, text: bytes) -> Contents:
    """The signature files of a folder or bundle; BundleError unless they are of this very manifest."""
    contents: Contents = {}
    for name in (*ECDSA, *MLDSA):
        if place.is_dir():
            data = (place / name).read_bytes() if (place / name).is_file() else None
        else:
            data = read_member(place, f"{FOLDER}/{name}")
        if data is not None:
            contents[f"{FOLDER}/{name}"] = data
    names = {path.partition("/")[2] for path in contents}
    if names not in (set(ECDSA), {*ECDSA, *MLDSA}):
        raise BundleError(f"{place} has {sorted(names) or 'no signatures'}, but ecdsa.pem and ecdsa.sig are needed.")
    _check(contents, text, place)
    return contents


def _check(contents: Contents, text: bytes, place: Path) -> None:
    """ECDSA always, ML-DSA where openssl (3.5) knows it."""
    with tempfile.TemporaryDirectory() as name:
        whole = text
        if isinstance(second := contents.get(f"{FOLDER}/mldsa.sig"), bytes):
            whole += f"{hashlib.sha256(second).hexdigest()}  {FOLDER}/mldsa.sig\n".encode()
        for path, data in {**contents, "MANIFEST": text, "WHOLE": whole}.items():
            assert isinstance(data, bytes)
            Path(name, Path(path).name).write_bytes(data)
        commands = ["openssl dgst -sha384 -verify ecdsa.pem -signature ecdsa.sig WHOLE"]
        if f"{FOLDER}/mldsa.pem" in contents and b"ML-DSA-87" in _openssl(["list", "-signature-algorithms"], name):
            commands.append("openssl pkeyutl -verify -pubin -inkey mldsa.pem -rawin -in MANIFEST -sigfile mldsa.sig")
        for command in commands:
            done = subprocess.run(command.split(), cwd=name, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise BundleError(f"The signature of {place} is not of this content: {done.stderr.strip()[:300]}")


def _openssl(arguments: list[str], folder: str) -> bytes:
    return subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, check=False).stdout
