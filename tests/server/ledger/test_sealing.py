from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from vashista.engine.errors import LedgerOverloadedError, PromptKeyError
from vashista.server.ledger import ledger as ledger_module
from vashista.server.ledger.ledger import Ledger
from vashista.server.ledger.prune import plan, prune
from vashista.server.ledger.reader import find, reading
from vashista.server.ledger.receipt import Receipt
from vashista.server.ledger.sealing import Sealer, box_hash, load_opener, load_sealer, unseal

KEY = X25519PrivateKey.from_private_bytes(bytes(range(32)))
SEALER = Sealer(KEY.public_key())


@given(st.binary(max_size=2000))
def test_what_was_sealed_is_opened_with_the_private_key(data: bytes) -> None:
    assert unseal(SEALER.seal(data), KEY) == data


def test_equal_bodies_give_different_boxes_and_no_box_shows_its_body() -> None:
    data = b"the same secret"
    assert SEALER.seal(data) != SEALER.seal(data)
    assert data not in SEALER.seal(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_box_is_refused_wherever_it_was_changed(data: st.DataObject) -> None:
    box = bytearray(SEALER.seal(b"secret"))
    box[data.draw(st.integers(0, len(box) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    # X25519 ignores the top bit of the ephemeral key, but the seal authenticates it too.
    with pytest.raises(PromptKeyError):
        unseal(bytes(box), KEY)


def test_another_key_and_a_cut_box_are_named() -> None:
    with pytest.raises(PromptKeyError, match="another key"):
        unseal(SEALER.seal(b"secret"), X25519PrivateKey.generate())
    for box in (b"", SEALER.seal(b"secret")[:40]):
        with pytest.raises(PromptKeyError, match="damaged"):
            unseal(box, KEY)


def pem(key: Any) -> tuple[bytes, bytes]:
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return key.private_bytes(*plain), key.public_key().public_bytes(*form)


def test_key_files_of_openssls_form_are_read_and_others_refused(tmp_path: Path) -> None:
    private, public = tmp_path / "a.key", tmp_path / "a.pub"
    for path, data in zip((private, public), pem(KEY), strict=True):
        path.write_bytes(data)
    assert unseal(load_sealer(public).seal(b"x"), load_opener(private)) == b"x"
    for load, wrong in ((load_sealer, private), (load_opener, public), (load_sealer, tmp_path / "none")):
        with pytest.raises(PromptKeyError):
            load(wrong)
    for path, data in zip((private, public), pem(Ed25519PrivateKey.generate()), strict=True):
        path.write_bytes(data)
    for load, path in ((load_opener, private), (load_sealer, public)):
        with pytest.raises(PromptKeyError, match="not an X25519"):
            load(path)


def test_boxes_are_kept_beside_their_receipts_and_pruned_with_them(
    tmp_path: Path, receipt: Callable[..., Receipt], check: Callable[..., dict[str, Any]]
) -> None:
    boxes = [SEALER.seal(b"one"), None, SEALER.seal(b"three")]
    with Ledger(tmp_path) as ledger:
        for number, box in enumerate(boxes, 1):
            kept = None if box is None else box_hash(box)
            ledger.append(receipt(number, prompt_hash=kept), box).result()
    path = tmp_path / "ledger.db"
    with reading(path) as connection:
        assert [find(connection, f"request-{number}")[0][2] for number in (1, 2, 3)] == boxes
        assert find(connection, "3")[0][2] == boxes[2]
        assert find(connection, "4") == find(connection, "request-") == []
    prune(tmp_path, plan(path, through=2))
    with reading(path) as connection:
        assert connection.execute("select seq from prompts").fetchall() == [(3,)]
    assert check(path)["is_intact"]


def test_sealed_prompts_that_wait_are_bounded_by_their_bytes(
    tmp_path: Path, receipt: Callable[..., Receipt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "QUEUE_BYTES", 10000)
    with Ledger(tmp_path) as ledger:
        with ledger._changed:  # the writer cannot take them away
            first = ledger.append(receipt(1), bytes(20000))
            with pytest.raises(LedgerOverloadedError, match="bytes wait"):
                ledger.append(receipt(2))
        assert first.result() == 1
        assert ledger.append(receipt(2)).result() == 2
