"""Ed25519 of the standalone verifier, against RFC 8032, section 7.1, and against the cryptography package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

SCRIPT = Path(__file__).parents[3] / "deploy" / "verify_ledger.py"
VECTORS = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe2465"
        "5141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb0"
        "0d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc0"
        "27beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("public", "message", "signature"), VECTORS)
def test_the_signatures_of_rfc_8032_are_good_and_with_a_flipped_bit_bad(
    standalone: ModuleType, public: str, message: str, signature: str
) -> None:
    key, text, signed = map(bytes.fromhex, (public, message, signature))
    assert standalone.is_signature(key, signed, text)
    assert not standalone.is_signature(key, signed, text + b"x")
    for bit in (0, 100, 255, 256, 400, 511):
        changed = bytearray(signed)
        changed[bit // 8] ^= 1 << bit % 8
        assert not standalone.is_signature(key, bytes(changed), text)


def test_a_signature_whose_second_half_is_not_reduced_is_refused(standalone: ModuleType) -> None:
    key, _, signature = (bytes.fromhex(part) for part in VECTORS[0])
    larger = int.from_bytes(signature[32:], "little") + standalone.L
    assert not standalone.is_signature(key, signature[:32] + larger.to_bytes(32, "little"), b"")


@settings(max_examples=15, deadline=None)
@given(seed=st.binary(min_size=32, max_size=32), message=st.binary(max_size=100), cut=st.integers(0, 63))
def test_it_agrees_with_the_cryptography_package(standalone: ModuleType, seed: bytes, message: bytes, cut: int) -> None:
    key = Ed25519PrivateKey.from_private_bytes(seed)
    public, signature = key.public_key().public_bytes_raw(), key.sign(message)
    assert standalone.is_signature(public, signature, message)
    assert not standalone.is_signature(public, signature[:cut], message)


def test_it_runs_isolated_from_every_installed_package(filled: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(SCRIPT), str(filled / "ledger.db"), "--json"]
    good = subprocess.run([*command, "--key", str(filled / "ledger.pub")], capture_output=True, check=True, text=True)
    assert json.loads(good.stdout)["num_receipts"] == 25
    bad = subprocess.run([*command, "--fingerprint", "00" * 32], capture_output=True, check=False, text=True)
    assert bad.returncode == 1
    assert json.loads(bad.stdout)["damage"]["kind"] == "key"
    missing = subprocess.run([*command[:4], str(tmp_path / "none.db")], capture_output=True, check=False, text=True)
    assert missing.returncode == 2
    assert "there is no file" in missing.stderr
