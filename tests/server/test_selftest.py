"""`vashista selftest`: its table, its JSON, and how it ends when something is wrong."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from vashista.engine import whole_file
from vashista.engine.config import EngineConfig
from vashista.engine.selftest_answers import FILE_NAME
from vashista.engine.selftest_write import write_answers
from vashista.server.cli import run
from vashista.server.commands import selftest as command

MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VASHISTA_DEVICE", "VASHISTA_MODEL", "VASHISTA_CONFIG", "VASHISTA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Known answers of the bundled model with a short passage."""
    path = tmp_path_factory.mktemp("answers") / FILE_NAME
    write_answers(MODEL, EngineConfig(model_dir=str(MODEL), num_threads=1), 600).save(path)
    return path


def test_the_bundled_model_passes_on_this_machine(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "result.json"
    assert run(["selftest", "--device", "cpu", "--num-threads", "1", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "FAILED" not in text
    results = json.loads(out.read_text())
    assert len(text.splitlines()) == len(results) + 2
    assert {result["status"] for result in results} <= {"passed", "skipped"}
    assert {"model files", "known answers", "recall, dense", "recall, sparse"} <= {
        result["name"] for result in results if result["status"] == "passed"
    }


def test_a_changed_file_ends_it_with_status_1_and_a_remedy(short: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("support*")))
    with (folder / "config.json").open("a") as file:
        file.write("\n")
    arguments = ["--model", str(folder), "--answers", str(short), "--device", "cpu", "--num-threads", "1"]
    assert run(["selftest", *arguments]) == 1
    out, err = capsys.readouterr()
    failed = next(index for index, line in enumerate(out.splitlines()) if line.startswith("FAILED"))
    assert "model files" in out.splitlines()[failed]
    assert out.splitlines()[failed + 1].strip().startswith("remedy: Copy the model folder again")
    # A changed model has no profile, and with it no retrieval heads: its sparse recall may fail, too.
    assert " of 9 checks failed: model files" in err
    assert "\n  remedy: " in err


def test_answers_that_are_written_are_then_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("vashista.engine.selftest_write.PASSAGE_TOKENS", 600)
    path = tmp_path / "known.json"
    arguments = ["selftest", "--model", str(MODEL), "--answers", str(path), "--num-threads", "1"]
    assert run([*arguments, "--write"]) == 0
    assert "codes to recall" in capsys.readouterr().out
    assert run([*arguments, "--device", "cpu"]) == 0
    assert "9 checks: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--model", "/no/such/folder"], 1, "error[model_folder]: The model folder /no/such/folder does not exist."),
        (["--answers", "/no/such/file"], 1, "error[selftest_answers]: The file of known answers /no/such/file does"),
        (["--answers", str(MODEL / "config.json")], 1, "error[selftest_answers]"),
        (["--device", "cuda:99"], 1, "error[device_unavailable]"),
        (["--device", "tpu"], 2, "error[invalid_settings]"),
        (["--json", "/no/such/folder/x"], 1, "error[report_file]"),
        (["--write", "--answers", "/no/such/folder/x"], 1, "error[report_file]"),
        (["--write", "--json", "x"], 2, "--write checks nothing"),
    ],
)
def test_what_cannot_work_ends_by_name(arguments: list[str], status: int, words: str, capsys: Capture) -> None:
    assert run(["selftest", *arguments]) == status
    assert words in capsys.readouterr().err


def test_a_wheel_without_the_bundled_model_asks_for_one(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(command, "bundled_model", lambda: None)
    assert run(["selftest"]) == 2
    assert "The setting model is missing: give --model, VASHISTA_MODEL" in capsys.readouterr().err
    monkeypatch.setenv("VASHISTA_MODEL", "/no/such/folder")
    assert run(["selftest"]) == 1
    assert "error[model_folder]" in capsys.readouterr().err


def test_the_checkout_brings_a_model_with_known_answers() -> None:
    found = command.bundled_model()
    assert found is not None
    assert (found / FILE_NAME).is_file()


@pytest.mark.parametrize("option", ["--json", "--write"])
def test_a_full_disk_is_named(
    option: str, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole_file, "write_whole", full)
    monkeypatch.setattr("vashista.engine.selftest_answers.write_whole", full)
    monkeypatch.setattr("vashista.engine.selftest_write.PASSAGE_TOKENS", 500)
    target = tmp_path / "out.json"
    answers = str(short) if option == "--json" else str(target)
    arguments = ["--json", str(target)] if option == "--json" else ["--write"]
    command_line = ["selftest", "--model", str(MODEL), "--answers", answers, "--num-threads", "1", *arguments]
    if option == "--json":
        command_line += ["--device", "cpu"]
    assert run(command_line) == 1
    assert f"error[report_file]: {target} cannot be written: No space left on device." in capsys.readouterr().err
    assert not target.exists()
