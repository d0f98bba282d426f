"""What the start of a GPU's engine asks for by itself is no attempt; all that is near it is one.

No GPU is needed: a library of the driver's name, brought into the engine as a dependency could bring it, makes the call
that CUDA makes. strace of CUDA 13 with driver 580: socket(AF_UNIX, SOCK_SEQPACKET|SOCK_CLOEXEC, 0), then connect to
/tmp/nvidia-mps/control with a length of 26.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vashista.server.isolation.filter import architecture

pytestmark = [
    pytest.mark.skipif(architecture() is None, reason="the filter is not known for this kind of machine"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the imitated driver is compiled"),
]
DRIVER = r"""
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
int start(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int file = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), result;
    strcpy(address.sun_path, path);
    result = connect(file, (struct sockaddr *)&address, sizeof(sa_family_t) + strlen(path) + 1);
    close(file);
    return result;
}
"""
PLANT = """
import ctypes, json, os, pathlib, subprocess, sys
CALLS = json.loads(os.environ["DRIVER_CALLS"])
def load():
    return ctypes.CDLL(os.environ["DRIVER"])
def hook(event, arguments):
    if event == "import" and arguments[0] == "torch.utils" and CALLS and "vashista.engine.process" in sys.orig_argv:
        calls, CALLS[:] = list(CALLS), []
        for path in calls:
            if path == "child":
                command = f"import ctypes; ctypes.CDLL({os.environ['DRIVER']!r}).start(b'/tmp/nvidia-mps/control')"
                subprocess.run([sys.executable, "-I", "-S", "-c", command])
            else:
                load().start(path.encode())
sys.addaudithook(hook)
"""
CONTROL = "/tmp/nvidia-mps/control"


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libcuda.so.1, and the same under another name."""
    folder = tmp_path_factory.mktemp("drivers")
    (folder / "driver.c").write_text(DRIVER)
    for name in ("libcuda.so.1", "libother.so.1"):
        command = ["gcc", "-shared", "-fPIC", "-o", str(folder / name), str(folder / "driver.c")]
        subprocess.run(command, check=True, timeout=60)
    return folder


def start(start_server: Any, folder: Path, driver: Path, *calls: str, **environ: str) -> Any:
    """A server whose engine makes these calls while it starts."""
    (folder / "sitecustomize.py").write_text(PLANT)
    environ |= {"PYTHONPATH": str(folder), "DRIVER": str(driver), "DRIVER_CALLS": json.dumps(calls)}
    return start_server("real", environ, log_format="json").wait_ready()


def counted(server: Any) -> float:
    count: float = server.metric('vashista_egress_attempts_total{seen_by="kernel",what="connect"}')
    return count


def said(server: Any) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    return [line for line in lines if "multi-process service" in line["message"]]


def test_the_drivers_question_at_the_start_is_said_once_and_not_counted(
    start_server: Any, tmp_path: Path, drivers: Path
) -> None:
    server = start(start_server, tmp_path, drivers / "libcuda.so.1", CONTROL)
    (line,) = server.wait_for(lambda: said(server))
    assert (line["level"], line["engine_pid"]) == ("info", server.engine_pid())
    assert line["detail"] == f"AF_UNIX {CONTROL!r}"
    assert counted(server) == 0
    assert "an attempt to reach out: connect" not in server.log()
    engine = server.engine_pid()
    os.kill(engine, 9)
    server.wait_for(lambda: len(said(server)) == 2)
    assert counted(server) == 0, "the next engine may ask as well"


def test_where_another_folder_is_set_the_question_is_known_by_that(
    start_server: Any, tmp_path: Path, drivers: Path
) -> None:
    environ = {"CUDA_MPS_PIPE_DIRECTORY": "/run/mps"}
    server = start(start_server, tmp_path, drivers / "libcuda.so.1", "/run/mps/control", **environ)
    server.wait_for(lambda: said(server))
    assert counted(server) == 0


@pytest.mark.parametrize(
    ("driver", "calls", "times"),
    [
        ("libcuda.so.1", (CONTROL, CONTROL, CONTROL), 2),
        ("libcuda.so.1", ("/run/dbus/system_bus_socket",), 1),
        ("libcuda.so.1", (CONTROL + "2", "/tmp/nvidia-mps/contro"), 2),
        ("libcuda.so.1", ("child",), 1),
        ("libother.so.1", (CONTROL,), 1),
    ],
)
def test_what_is_not_exactly_that_question_is_counted_and_named(
    driver: str, calls: tuple[str, ...], times: int, start_server: Any, tmp_path: Path, drivers: Path
) -> None:
    server = start(start_server, tmp_path, drivers / driver, *calls)
    server.wait_for(lambda: counted(server) == times)
    lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    attempts = [line for line in lines if line["message"] == "an attempt to reach out: connect"]
    asked = CONTROL if calls == ("child",) else calls[0]
    assert attempts[0]["detail"] == f"AF_UNIX {asked!r}"
