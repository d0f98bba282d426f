"""The systemd units, judged by systemd itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "deploy/systemd"
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


@needs_systemd
@pytest.mark.parametrize(("drop_in", "limit"), [(None, 10), ("gpu.conf", 20)])
def test_the_exposure_of_the_service_is_small(tmp_path, drop_in, limit):
    """systemd scores from 0 to 100 (printed as 0 to 10): 1.0 for the CPU, 2.0 with a GPU."""
    unit = shutil.copy(UNITS / "vashista.service", tmp_path)
    if drop_in is not None:
        folder = tmp_path / "vashista.service.d"
        folder.mkdir()
        shutil.copy(UNITS / "vashista.service.d" / drop_in, folder)
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={limit}", unit]
    judged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stdout[-2000:] + judged.stderr
    assert ("char-nvidia" in judged.stdout) == (drop_in is not None), "the drop-in was not read"


@needs_systemd
def test_systemd_knows_every_line_of_the_units(tmp_path):
    for unit in UNITS.glob("vashista.*"):
        if unit.is_dir():
            shutil.copytree(unit, tmp_path / unit.name)
        else:
            text = unit.read_text().replace("/opt/vashista/current/bin/vashista", "/bin/true")
            (tmp_path / unit.name).write_text(text)
    units = sorted(str(path) for path in tmp_path.glob("vashista.*") if path.is_file())
    checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    lines = [line for line in checked.stderr.splitlines() if str(tmp_path) in line or "vashista" in line]
    assert not lines
