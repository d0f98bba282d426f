"""One server a state folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vashista.engine.errors import StateFolderError, StateFolderTakenError
from vashista.server.state_folder import LOCK_NAME, held

HOLD = "import sys; from pathlib import Path; from vashista.server.state_folder import held\n"
HOLD += "with held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_folder_is_held_by_one_process_and_free_once_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StateFolderTakenError, match=f"process id {other.pid} uses"), held(tmp_path):
            pass
        other.kill()
    for _ in range(2):
        with held(tmp_path):
            assert (tmp_path / LOCK_NAME).read_text() == f"{os.getpid()}\n"


def test_a_folder_that_cannot_be_used_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateFolderError, match="cannot be used"), held(tmp_path / "file"):
        pass


def test_a_second_server_refuses_to_start_and_names_the_first(start_server):
    first = start_server().wait_ready()
    folder = first.log_path.parent / "state"
    second = start_server(state_dir=str(folder))
    assert second.process.wait(60) != 0
    assert "StateFolderTakenError" in second.log()
    assert f"process id {first.process.pid} uses" in second.log()
    assert first.complete().status_code == 200
