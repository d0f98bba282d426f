"""The shell scripts behind `make` and CI: they parse, and the environment script refuses what it cannot do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / ".ci/run", *sorted((ROOT / "deploy").glob("*.sh"))]


def run_venv(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / "deploy/venv.sh"), str(folder)]
    environ = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **environ}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_stops_at_the_first_error(script: Path) -> None:
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
    assert "\nset -eu\n" in script.read_text(encoding="utf-8")


def test_an_unsupported_python_is_refused_by_name(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.9" && exit 0\nexit 1\n')
    fake.chmod(0o755)
    done = run_venv(tmp_path / "venv", PYTHON=str(fake))
    assert done.returncode == 1
    assert "is Python 3.10.9; Python 3.11 to 3.13 is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_an_unknown_build_of_torch_is_refused(tmp_path: Path) -> None:
    done = run_venv(tmp_path / "venv", TORCH="rocm")
    assert done.returncode == 1
    assert "TORCH is rocm; it can be cpu, cuda or auto" in done.stderr


def test_make_help_lists_every_documented_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split(":")[0] for line in text.splitlines() if ": " in line and "## " in line and line[0] != "\t"]
    done = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True)
    assert {"serve", "test", "lock", "wheel", "clean", "types", "docs", "help"} <= set(targets)
    assert all(f"make {target} " in done.stdout for target in targets)
