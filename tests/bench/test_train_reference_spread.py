"""The spread between trainings: lowest and highest of each figure, what is beyond its error, who cannot be compared."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "bench" / "train_reference"
RUNS = FOLDER / "runs"
Scripts = Callable[[str], Any]


def entry(task: str, context: int, plain: float, chat: float, num_samples: int = 100) -> dict[str, Any]:
    forms = {form: {"score": score, "num_samples": num_samples} for form, score in (("plain", plain), ("chat", chat))}
    return {"task": task, "context": context, "chance": 0.0, **forms}


def scores(*tasks: dict[str, Any], loss: float = 3.0, num_books: int = 2, words: str = "evaluation") -> dict[str, Any]:
    losses = {"nats_per_token": loss, "nats_per_token_in_last_1024": loss / 2, "num_books": num_books}
    return {"device": "a CPU", "words": words, "tasks": list(tasks), "books": {"4096": losses, "8192": {}}}


def training(scripts: Scripts, folder: Path, found: dict[str, Any], seed: int = 7) -> Any:
    """A training of the preset `tiny` with these scores, written as a run leaves it and read again."""
    folder.mkdir()
    reports = [{"stage": 0, "step": 6, "elapsed_s": 30.4}, {"stage": 1, "step": 3, "elapsed_s": 12.0}]
    (folder / "log_tiny.jsonl").write_text("\n".join(map(json.dumps, [{**reports[0], "step": 2}, *reports])))
    (folder / "run.json").write_text(json.dumps({"device": "a slow CPU", "seeds": {"tiny": seed}}))
    (folder / "scores.json").write_text(json.dumps(found))
    return scripts("spread").Training.read(str(folder))


def test_each_figure_goes_from_the_lowest_to_the_highest_training(scripts: Scripts, tmp_path: Path) -> None:
    tasks = [
        [entry("single", 4096, 1.0, 1.0), entry("single", 8192, 0.9, 0.6), entry("copy", 4096, 0.5, 0.5)],
        [entry("single", 4096, 1.0, 1.0), entry("single", 8192, 0.95, 0.55), entry("copy", 4096, 0.3, 0.5)],
        [entry("single", 4096, 1.0, 1.0), entry("single", 8192, 0.92, 0.64), entry("copy", 4096, 0.6, 0.45)],
    ]
    model, *again = (
        training(scripts, tmp_path / f"run-{number}", scores(*found, loss=3 + number / 100))
        for number, found in enumerate(tasks)
    )
    section = scripts("spread").spread_section(model, again)
    rows = section.splitlines()
    assert "| figure | 4,096 | 8,192 | mean |" in rows
    assert "| single | 1.000 / 1.000 | 0.900 to 0.950 / 0.550 to 0.640 | 0.950 to 0.975 / 0.775 to 0.820 |" in rows
    assert "| copy | **0.300 to 0.600** / 0.450 to 0.500 | - | **0.300 to 0.600** / 0.450 to 0.500 |" in rows
    assert "| loss on held-out books, nats a token | 3.000 to 3.020 | - | - |" in rows
    assert "| the same, last 1,024 tokens | 1.500 to 1.510 | - | - |" in rows
    assert "differ notably in copy (by 0.300 at most). In single no figure is more than 0.090 apart." in rows[-1]
    assert "{" not in section


def test_a_training_counts_the_figures_within_its_error_and_names_the_furthest(
    scripts: Scripts, tmp_path: Path
) -> None:
    model = training(scripts, tmp_path / "own", scores(entry("single", 4096, 1.0, 1.0), entry("copy", 4096, 0.5, 0.8)))
    found = scores(entry("single", 4096, 1.0, 1.0), entry("copy", 4096, 0.2, 0.75))
    section = scripts("spread").spread_section(model, [training(scripts, tmp_path / "other", found, seed=11)])
    assert "| own | a slow CPU | 7 | 9 | 42 | 100 / 100 | - | - | - |" in section
    # sqrt(0.35 x 0.65 x 2 / 100) is 0.0675, and 0.3 is 4.4 of it
    assert "| other | a slow CPU | 11 | 9 | 42 | 100 / 100 | 3 of 4 | 3 of 4 | copy, 4,096, plain: 4.4 |" in section
    assert "the fewer" not in section
    fewer = scores(entry("single", 4096, 1.0, 1.0, 10), entry("copy", 4096, 0.2, 0.75, 10))
    section = scripts("spread").spread_section(model, [training(scripts, tmp_path / "fewer", fewer)])
    assert "| 10 / 10 | 4 of 4 | 4 of 4 | copy, 4,096, plain: 1.8 |" in section
    assert "where numbers differ, the fewer are the first of the more" in section


def test_a_task_that_is_right_in_each_context_can_be_wrong_in_the_mean(scripts: Scripts, tmp_path: Path) -> None:
    contexts = (4096, 8192, 16384, 32768)
    own, other = (scores(*(entry("copy", context, share, 0.5) for context in contexts)) for share in (0.5, 0.4))
    model = training(scripts, tmp_path / "own", own)
    section = scripts("spread").spread_section(model, [training(scripts, tmp_path / "other", other)])
    assert "| 8 of 8 | 1 of 2 | copy, 4,096, plain: 1.4 |" in section


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (scores(entry("single", 4096, 1.0, 1.0), words="held_out"), "words"),
        (scores(entry("single", 8192, 1.0, 1.0)), "tasks and contexts"),
        (scores(entry("single", 4096, 1.0, 1.0), num_books=1), "books"),
    ],
)
def test_trainings_that_were_asked_something_else_are_not_compared(
    other: dict[str, Any], what: str, scripts: Scripts, tmp_path: Path
) -> None:
    model = training(scripts, tmp_path / "own", scores(entry("single", 4096, 1.0, 1.0)))
    again = training(scripts, tmp_path / "other", other)
    with pytest.raises(ValueError, match=f"other was evaluated with other {what} than own"):
        scripts("spread").spread_section(model, [again])


def test_a_folder_that_is_no_training_is_refused_with_what_it_lacks(scripts: Scripts, tmp_path: Path) -> None:
    read = scripts("spread").Training.read
    with pytest.raises(ArgumentTypeError, match=r"it has no run\.json, scores\.json"):
        read(str(tmp_path))
    (tmp_path / "scores.json").write_text("{}")
    (tmp_path / "run.json").write_text('{"device": "a CPU"}')
    with pytest.raises(ArgumentTypeError, match=r'run\.json must say \{"device": WORDS, "seeds"'):
        read(str(tmp_path))
    (tmp_path / "run.json").write_text('{"device": "a CPU", "seeds": {"tiny": 1}}')
    with pytest.raises(ArgumentTypeError, match=r"log_tiny\.jsonl is not a file"):
        read(str(tmp_path))


def test_a_card_that_cannot_be_compared_is_not_written(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = tmp_path / "model", RUNS / "reference-26m"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).symlink_to(FOLDER.parents[1] / "deploy" / "models" / "reference-26m" / name)
    training(scripts, tmp_path / "other", scores(entry("single", 4096, 1.0, 1.0)))
    arguments = ["--model", str(model), "--data", str(run), "--device", "a CPU", "--scores", str(run / "scores.json")]
    arguments += ["--legs", *(f"{name}={run / f'log_{name}.jsonl'}" for name in ("short", "long"))]
    monkeypatch.setattr(sys, "argv", ["card.py", *arguments, "--again", str(tmp_path / "other")])
    with pytest.raises(SystemExit) as ended:
        scripts("card").main()
    assert ended.value.code == 2
    assert "other was evaluated with other tasks and contexts than model" in " ".join(capsys.readouterr().err.split())
    assert not (model / "README.md").exists()
