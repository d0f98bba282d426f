"""`vashista selftest`: proves in under a minute that an installation computes what it should, without any network.

Checks everything that can be wrong on the command line before torch is imported, runs `engine/selftest.py`, prints one
line for each check as it ends, and exits 0, or raises SelftestFailedError after the last one.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import click
import msgspec

from vashista.engine.config import EngineConfig
from vashista.engine.errors import ReportFileError, SelftestFailedError
from vashista.engine.model_folder import check_folder
from vashista.engine.selftest_answers import FILE_NAME, SelftestAnswers
from vashista.engine.selftest_check import CheckResult, Status
from vashista.server.commands.lazy import SectionedCommand
from vashista.server.commands.measuring import check_writable, write_whole
from vashista.server.commands.options import given, setting_options
from vashista.server.settings import load_settings

MODEL_SETTINGS = ["device", "num_threads"]
BUNDLED = "reference-26m"
"""Folder under deploy/models of a checkout; taken unless a model is given."""
WORDS = {Status.PASSED: "ok", Status.FAILED: "FAILED", Status.SKIPPED: "skipped"}
ROW = "{:<8} {:<40} {:>6.1f} s  {}"
EPILOG = f"""\b
Examples:
  vashista selftest
  vashista selftest --model /opt/vashista/models/reference-26m --json selftest-result.json
  vashista selftest --model /srv/models/llama --write

\b
The model is that of --model, VASHISTA_MODEL or the settings file; unless one is given, the
one that came with the checkout. {FILE_NAME} in its folder holds what it must answer. --write
makes that file for another model, on a machine whose installation is known to be right.
"""


@click.command("selftest", cls=SectionedCommand, epilog=EPILOG)
@click.option("--model", "model_dir", metavar="PATH", type=click.Path(path_type=Path),
              help="Folder of the model that is asked; unless given, the bundled one.")  # fmt: skip
@click.option("--answers", "answers_path", metavar="FILE", type=click.Path(path_type=Path),
              help=f"Known answers; unless given, {FILE_NAME} in the model's folder.")  # fmt: skip
@click.option("--write", is_flag=True, help="Do not check: write the model's answers here as the known ones.")
@click.option("--json", "json_path", metavar="FILE", type=click.Path(path_type=Path),
              help="Also write every result to this file.")  # fmt: skip
@setting_options(MODEL_SETTINGS)
def selftest(
    *,
    model_dir: Path | None,
    answers_path: Path | None,
    write: bool,
    json_path: Path | None,
    config: Path | None,
    **flags: Any,
) -> None:
    """Check that this installation computes what it should: model files, kernels, known answers, long recall, sparse
    against dense attention.

    Needs no network and no server, and less than half a minute on two idle cores with the bundled model.
    """
    engine_config = _engine_config(model_dir, flags, config)
    folder = check_folder(engine_config.model_dir)
    path = answers_path or folder / FILE_NAME
    if write:
        if json_path is not None:
            raise click.UsageError("--write checks nothing: there is no result for --json.")
        _write(folder, path, engine_config)
        return
    answers = SelftestAnswers.load(path)
    if json_path is not None:
        check_writable(json_path)
    results = _run(folder, answers, engine_config)
    if json_path is not None:
        write_whole(json_path, msgspec.json.format(msgspec.json.encode(results), indent=1).decode() + "\n")
    _conclude(results)


def bundled_model() -> Path | None:
    """The model folder of the checkout that this package lies in; None for an installed wheel."""
    models = Path(__file__).resolve().parents[2] / "deploy" / "models"
    return models / BUNDLED if (models / BUNDLED / FILE_NAME).is_file() else None


def _engine_config(model_dir: Path | None, flags: dict[str, Any], config: Path | None) -> EngineConfig:
    """Settings as the server reads them. Raises SettingsError, which names the setting that is missing or wrong."""
    values: dict[str, object] = given(flags)
    if model_dir is not None:
        values["model"] = str(model_dir)
    bundled = bundled_model()
    defaults = {} if bundled is None else {"model": str(bundled)}
    return load_settings(values, os.environ, config=config, defaults=defaults).engine_config()


def _write(folder: Path, path: Path, config: EngineConfig) -> None:
    check_writable(path)
    from vashista.engine.selftest_write import write_answers

    answers = write_answers(folder, config)
    try:
        answers.save(path)
    except OSError as error:
        raise ReportFileError(f"{path} cannot be written: {error.strerror or error}.") from error
    asked = len(answers.recall.asked) if answers.recall is not None else 0
    click.echo(
        f"Wrote {path}: {len(answers.files)} files, {len(answers.known)} continuations, {asked} codes to recall."
    )


def _run(folder: Path, answers: SelftestAnswers, config: EngineConfig) -> list[CheckResult]:
    """All checks, each printed as it ends."""
    # Imported late: everything above is checked before torch, which takes seconds, comes in.
    from vashista.engine.selftest import Selftest

    test = Selftest(folder, answers, config)
    click.echo(f"{folder}, torch {version_of('torch')}")
    started_s = time.monotonic()
    results = []
    for check in test.list_checks():
        result = check.run()
        click.echo(ROW.format(WORDS[result.status], result.name, result.took_s, result.detail))
        if result.remedy is not None:
            click.echo(f"{'':<8} remedy: {result.remedy}")
        results.append(result)
    click.echo(f"{_sum_up(results)} in {time.monotonic() - started_s:.0f} s.")
    return results


def _sum_up(results: list[CheckResult]) -> str:
    counts = {status: sum(result.status is status for result in results) for status in Status}
    words = [f"{counts[status]} {status.value}" for status in Status if counts[status]]
    return f"{len(results)} checks: {', '.join(words)}"


def _conclude(results: list[CheckResult]) -> None:
    """Raise unless nothing failed."""
    failed = [result.name for result in results if result.status is Status.FAILED]
    if failed:
        raise SelftestFailedError(f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}.")
