"""OpenSSF's own program takes what `vashista models pack` signs, and what it signs is taken here.

    python -m venv scratch && scratch/bin/pip install model-signing==1.1.1 pyOpenSSL
    PYTHONPATH=bench/airgap python bench/airgap/model_signing_peer.py scratch/bin/python

model-signing 1.1.1 imports OpenSSL without declaring it, so pyOpenSSL is named too. Both sides must also refuse the
model once a byte of it is changed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from damage_models import make_model

from vashista.engine.errors import ModelError
from vashista.server.model_store.keys import load_private, load_trusted
from vashista.server.model_store.packing import pack
from vashista.server.model_store.store import check_installed, install


def peer(python: str, *words: str) -> bool:
    done = subprocess.run([python, "-m", "model_signing", *words], capture_output=True, text=True, check=False)
    print(" ".join(words[:2]), "->", done.returncode, done.stderr.strip()[-200:] or done.stdout.strip()[-200:])
    return done.returncode == 0


def ours(folder: Path, pem: Path) -> bool:
    try:
        check_installed(folder, load_trusted(pem))
    except ModelError as error:
        print("ours ->", error.message[:200])
        return False
    return True


def main(python: str) -> int:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        key = ec.generate_private_key(ec.SECP384R1())
        private, public = home / "signer.key", home / "signer.pem"
        private.write_bytes(key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))  # fmt: skip
        public.write_bytes(key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))  # fmt: skip
        make_model(home / "tiny")
        pack(home / "tiny", home / "tiny.tar", load_private(private), name="tiny")
        mine = install(home / "tiny.tar", home / "models", load_trusted(public))[0]
        theirs = home / "tiny"
        verify = ("verify", "key", "--public_key", str(public), "--signature")
        results = {
            "theirs takes ours": peer(python, *verify, str(mine / "model.sig"), str(mine)),
            "theirs signs": peer(python, "sign", "key", "--private_key", str(private), "--signature",
                                 str(theirs / "model.sig"), str(theirs)),
            "ours takes theirs": ours(theirs, public),
        }  # fmt: skip
        for folder in (mine, theirs):
            config = folder / "config.json"
            config.write_bytes(config.read_bytes().replace(b"{", b"{ ", 1)[:-1])
        results["theirs refuses a change"] = not peer(python, *verify, str(mine / "model.sig"), str(mine))
        results["ours refuses a change"] = not ours(theirs, public)
    for what, is_right in results.items():
        print("ok    " if is_right else "FAILED", what)
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
