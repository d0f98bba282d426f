"""Receipts and ledgers for the tests, and both verifiers behind one call."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from vashista.engine.messages import DENSE, FinishReason
from vashista.server.ledger.ledger import Ledger
from vashista.server.ledger.receipt import Outcome, Receipt, utc_text
from vashista.server.ledger.signing import PublicKey
from vashista.server.ledger.verify import verify

ROOT = Path(__file__).parents[3]
START_S = 1_790_000_000.0


def make_receipt(number: int = 1, **changes: Any) -> Receipt:
    receipt = Receipt(
        time=utc_text(START_S + 3600 * number),
        request_id=f"request-{number}",
        key_id="4f0c2a9be1d7",
        client="192.0.2.7",
        endpoint="/v1/chat/completions",
        model="reference-26m",
        model_digest="ab" * 32,
        parameters={"max_tokens": 16, "temperature": 0.7, "stop": ["\n"]},
        num_prompt_tokens=12,
        num_cached_tokens=4,
        num_output_tokens=3,
        attention=DENSE,
        outcome=Outcome(queue_s=0.001, ttft_s=0.25, total_s=1.5, busy_s=0.5, cost_nano=1500, currency="EUR"),
        finish_reasons=(FinishReason.STOP,),
    )
    return msgspec.structs.replace(receipt, **changes)


def _standalone() -> ModuleType:
    path = ROOT / "deploy" / "verify_ledger.py"
    spec = importlib.util.spec_from_file_location("verify_ledger", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["verify_ledger"] = module
    spec.loader.exec_module(module)
    return module


STANDALONE = _standalone()


def verify_twice(path: Path, key: PublicKey | None = None, noted: dict[int, str] | None = None) -> dict[str, Any]:
    """The verdict, which both verifiers must give alike."""
    verdict = msgspec.to_builtins(verify(path, key=key, noted=noted))
    other = STANDALONE.verify(path, key.fingerprint if key else None, noted)
    assert verdict == other
    assert isinstance(verdict, dict)
    return verdict


@pytest.fixture(scope="session")
def standalone() -> ModuleType:
    return STANDALONE


@pytest.fixture(scope="session")
def receipt() -> Callable[..., Receipt]:
    return make_receipt


@pytest.fixture(scope="session")
def check() -> Callable[..., dict[str, Any]]:
    return verify_twice


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A state folder with a ledger of 25 receipts and checkpoints at 10, 20 and 25."""
    folder = tmp_path / "state"
    with Ledger(folder, checkpoint_rows=10, batch_rows=1) as ledger:
        for number in range(1, 26):
            ledger.append(make_receipt(number)).result()
    return folder
