"""Verifies a file of `vashista attest write` with Python's standard library: copy it with verify_ledger.py anywhere.

    python3 verify_attestation.py attestation.json [--key ledger.pub] [--parts FOLDER]

Prints the statement, but for the text of its bill of materials, which --parts writes to sbom.cdx.json. Exit status: 0
good, 1 not, 2 wrong use. --parts writes statement, signature and key.pem for

    openssl pkeyutl -verify -pubin -inkey key.pem -rawin -in statement -sigfile signature
"""

from __future__ import annotations

import argparse
import base64
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from verify_ledger import is_signature

DOMAIN = b"vashista-attestation-v1\n"
SPKI = bytes.fromhex("302a300506032b6570032100")


def raw_key(pem: str) -> bytes:
    """32 bytes of an Ed25519 public key in PEM; ValueError if it is none."""
    der = base64.b64decode("".join(line for line in pem.splitlines() if "---" not in line), validate=True)
    if len(der) != 44 or not der.startswith(SPKI):
        raise ValueError("not an Ed25519 public key in PEM")
    return der[12:]


def main() -> int:
    """Verify the file that the command line names."""
    parser = argparse.ArgumentParser(description="Verify an attestation of Vashista.")
    parser.add_argument("path", type=pathlib.Path)
    parser.add_argument("--key", type=pathlib.Path, help="public key in PEM that must have signed it")
    parser.add_argument("--parts", type=pathlib.Path, help="folder for the three parts, for openssl")
    options = parser.parse_args()
    try:
        found = json.loads(options.path.read_text(encoding="utf-8"))
        statement, signature = (base64.b64decode(found[name], validate=True) for name in ("statement", "signature"))
        key = raw_key(found["public_key"])
        expected = raw_key(options.key.read_text(encoding="ascii")) if options.key else key
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        print(f"NOT GOOD: {error}")
        return 1
    if options.parts:
        options.parts.mkdir(parents=True, exist_ok=True)
        (options.parts / "statement").write_bytes(statement)
        (options.parts / "signature").write_bytes(signature)
        (options.parts / "key.pem").write_text(found["public_key"], encoding="ascii")
    if key != expected or not statement.startswith(DOMAIN) or not is_signature(key, signature, statement):
        print("NOT GOOD: changed since it was signed, or signed by another key.")
        return 1
    told = json.loads(statement[len(DOMAIN) :])
    if told.get("sbom"):
        if options.parts:
            (options.parts / "sbom.cdx.json").write_text(told["sbom"]["text"], encoding="utf-8")
        told["sbom"]["text"] = f"{len(told['sbom']['text'])} characters"
    print(json.dumps(told, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
