"""Code that nobody wanted, in a server and its engine while they serve: it gets nowhere, is counted, and is named.

It comes as a dependency could bring it: a module that Python imports by itself at the start (sitecustomize), which
waits until the process serves and then tries every way out of ways_out.py from a thread of its own.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vashista.server.isolation.filter import architecture

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(architecture() is None, reason="the filter is not known for this kind of machine")
PLANT = """
import os, pathlib, sys, threading, time
FOLDER = pathlib.Path(os.environ["PLANT_FOLDER"])
STARTS = {"vashista.server.services": "server", "torch.utils": "engine"}
is_planted = False

def wait_and_try(role):
    while not (FOLDER / f"go-{role}").exists():
        time.sleep(0.05)
    import json
    import ways_out
    results = ways_out.try_all(ways_out.ANYWHERE)
    (FOLDER / f"{role}.part").write_text(json.dumps(results))
    (FOLDER / f"{role}.part").rename(FOLDER / f"{role}.json")

def hook(event, arguments):
    global is_planted
    if event == "import" and not is_planted and arguments[0] in STARTS:
        is_planted = True
        role = STARTS[arguments[0]]
        if role == "server" or "vashista.engine.process" in sys.orig_argv:
            threading.Thread(target=wait_and_try, args=(role,), daemon=True).start()

sys.addaudithook(hook)
"""
NAMED = {
    "socket": {"tcp", "udp", "ipv6", "netlink", "raw_socket", "packet_socket", "open_and_close", "proxy"},
    "native": {"raw", "libc"},
    "resolve": {"name"},
    "program": {"shell", "trace"},
}
"""Functions of ways_out.py that the log must name, by what they tried."""


def planted(start_server: Any, folder: Path, **settings: Any) -> Any:
    """A server of the real engine with the plant in both processes."""
    (folder / "sitecustomize.py").write_text(PLANT)
    shutil.copy(HERE / "ways_out.py", folder)
    environ = {"PYTHONPATH": str(folder), "PLANT_FOLDER": str(folder), "http_proxy": "http://127.0.0.1:9"}
    return start_server("real", environ, log_format="json", **settings).wait_ready()


def tried(server: Any, folder: Path, role: str) -> dict[str, str]:
    (folder / f"go-{role}").touch()
    server.wait_for((folder / f"{role}.json").exists)
    found: dict[str, str] = json.loads((folder / f"{role}.json").read_text())
    return found


def attempts(server: Any) -> list[dict[str, str]]:
    """What the log says of them."""
    lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    return [line for line in lines if "culprit" in line]


def named(server: Any, seen_by: str, what: str) -> set[str]:
    """Functions of the plant that the log names; `a/b/ways_out.py:12 tcp` is one."""
    return {
        line["culprit"].rsplit(" ", 1)[1]
        for line in attempts(server)
        if line["seen_by"] == seen_by and line["message"].endswith(f": {what}") and "ways_out.py:" in line["culprit"]
    }


@pytest.mark.parametrize("role", ["server", "engine"])
def test_a_plant_in_a_serving_process_gets_nowhere_and_is_counted_and_named(
    role: str, start_server: Any, tmp_path: Path
) -> None:
    server = planted(start_server, tmp_path)
    before = server.metric('vashista_egress_attempts_total{seen_by="kernel",what="socket"}')
    results = tried(server, tmp_path, role)
    assert len(results) >= 33
    assert {name: state for name, state in results.items() if state == "open"} == {}

    def counted(seen_by: str, what: str) -> float:
        count: float = server.metric(f'vashista_egress_attempts_total{{seen_by="{seen_by}",what="{what}"}}')
        return count

    server.wait_for(lambda: named(server, role, "resolve") and counted("kernel", "socket") >= before + 17)
    for call in ("connect", "sendto", "sendmsg", "sendmmsg", "process_vm_readv", "process_vm_writev", "pidfd_getfd"):
        assert counted("kernel", call) >= 1, call
    for call in ("setns", "ptrace", "io_uring_setup", "request_key", "ioctl", "socketpair"):
        assert counted("kernel", call) >= 1, call
    for what, functions in NAMED.items():
        server.wait_for(lambda what=what, functions=functions: functions <= named(server, role, what))
        assert counted(role, what) >= len(functions)
    by_kernel = {line["culprit"] for line in attempts(server) if line["seen_by"] == "kernel"}
    pid = server.process.pid if role == "server" else server.engine_pid()
    assert any(f"(process {pid}, in libc" in culprit for culprit in by_kernel), by_kernel
    assert any(culprit.startswith("bash (process") for culprit in by_kernel) or shutil.which("bash") is None, by_kernel
    assert server.complete().status_code == 200, "who serves goes on serving"


def test_without_the_filter_the_plant_would_get_out(start_server: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANT)
    (tmp_path / "ways_out.py").write_text(
        (HERE / "ways_out.py").read_text().replace("(name, read_memory", "(read_memory")  # it would ask a resolver
    )
    environ = {"PYTHONPATH": str(tmp_path), "PLANT_FOLDER": str(tmp_path)}
    server = start_server("real", environ, network_filter=False).wait_ready()
    for role in ("server", "engine"):
        shut = {name for name, state in tried(server, tmp_path, role).items() if state != "open"}
        assert shut <= {"hypervisor", "raw_socket", "packet_socket", "io_uring", "key", "terminal", "other_network"}


EARLY_SOCKET = """
import socket, sys
if "run_server.py" in " ".join(sys.orig_argv):
    kept = socket.create_connection(("127.0.0.1", PORT))
"""
EARLY_THREAD = """
import sys, threading, time
if "run_server.py" in " ".join(sys.orig_argv):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
"""


def test_a_machine_of_many_cores_gives_an_isolated_server_no_threads_before_the_filter(start_server: Any) -> None:
    """Tests have one core to compute on unless they say otherwise; numpy and OpenMP would start threads for each."""
    environ = {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"}
    server = start_server("scripted", environ, isolation="lan", client_networks="127.0.0.0/8").wait_ready()
    assert server.complete().status_code == 200


@pytest.mark.parametrize(("isolation", "networks"), [("required", None), ("lan", "127.0.0.0/8")])
@pytest.mark.parametrize(("plant", "words"), [(EARLY_SOCKET, "AF_INET"), (EARLY_THREAD, "a thread named")])
def test_what_was_opened_before_the_filter_keeps_an_isolated_server_from_serving(
    plant: str, words: str, isolation: str, networks: str | None, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        (tmp_path / "sitecustomize.py").write_text(plant.replace("PORT", str(listener.getsockname()[1])))
        settings = {"model": str(HERE.parents[1] / "deploy/models/reference-26m"), "state_dir": str(tmp_path / "state"),
                    "isolation": isolation, "client_networks": networks, "port": 0}  # fmt: skip
        command = [sys.executable, str(HERE / "run_server.py"), "scripted", json.dumps(settings)]
        environ = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"isolation is {isolation}, but before it was there this process had" in done.stderr
    assert words in done.stderr
