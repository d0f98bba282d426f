"""`vashista diagnose`: its tables, its JSON, and how a wrong option ends it before any work is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vashista.engine import diagnose as work
from vashista.engine.attention.capture import Captured
from vashista.engine.support_profile import Rule
from vashista.server.cli import run
from vashista.server.commands.diagnosis_table import diagnosis_text

MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VASHISTA_DEVICE", "VASHISTA_DTYPE", "VASHISTA_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def test_a_model_is_diagnosed_in_tables_and_json(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "diagnosis.json"
    arguments = [
        "--context",
        "200",
        "--layers",
        "5,1",
        "--positions",
        "2",
        "--token-budget",
        "96",
        "--num-threads",
        "1",
    ]
    assert run(["diagnose", str(MODEL), "--json", str(out), "--device", "cpu", *arguments]) == 0
    found = json.loads(out.read_text())
    assert found["context"] == 200
    assert len(found["heads"]) == 2 * 2 * 8
    assert {head["layer"] for head in found["heads"]} == {1, 5}
    head = found["heads"][0]
    assert head["hull"]["theorem"]["relaxed"][0]["log_leakage"] < 0
    assert 0 < head["softmax"]["dropped_mass"] < 1
    text = capsys.readouterr().out
    assert "0 of 32 queries lie inside the hull" in text
    assert "Leakage against (M - |I|) exp(-Delta / (2 eps)): 0 of" in text
    assert "the rule mean_variance keeps 96 tokens of up to 200" in text
    assert f"Wrote {out}." in text


def test_queries_inside_the_hull_are_said_to_have_no_gap() -> None:
    keys = torch.randn(1, 100, 4, generator=torch.Generator().manual_seed(0))
    plan = work.DiagnosisPlan([0], [99], Rule.MEAN, 32)
    heads = list(work.diagnose_heads(Captured(0, 99, 0, torch.zeros(3, 4), keys, keys), plan, 0.5))
    diagnosis = work.Diagnosis(
        model_dir="m", device="d", dtype="float32", context=100, rule=Rule.MEAN, token_budget=32, heads=heads
    )
    text = diagnosis_text(diagnosis)
    assert "3 of 3 queries lie inside the hull of their keys, where no key is inactive: no gap exists." in text
    assert "Leakage" not in text
    row = text.splitlines()[3].split()
    assert row == ["0", "3", "3", "0.000", "-", "-", "-", "-", "-", "0"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--layers", "8"], 2, "error[invalid_measurement]: --layers names layer 8; this model has layers 0 to 7"),
        (["--layers", "-1"], 2, "layer -1"),
        (["--layers", "all"], 2, "--layers is 'all'"),
        (["--context", "32769"], 2, "the model was made for 32768"),
        (["--context", "4", "--positions", "5"], 2, "5 positions were asked for in a context of 4"),
        (["--context", "0"], 2, "--context"),
        (["--text", "short"], 2, "error[sample_text]"),
        (["--json", "no-folder/file"], 1, "error[report_file]"),
    ],
)
def test_a_wrong_option_ends_it_before_the_model_is_loaded(
    arguments: list[str], status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the measurement began")

    monkeypatch.setattr(work, "diagnose", never)
    monkeypatch.chdir(tmp_path)
    assert run(["diagnose", str(MODEL), *arguments]) == status
    assert words in capsys.readouterr().err


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "diagnose", interrupted)
    assert run(["diagnose", str(MODEL), "--json", str(tmp_path / "file.json")]) == 130
    assert not list(tmp_path.iterdir())
