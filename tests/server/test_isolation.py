"""Confinement: what the kernel refuses, who is named and counted, and a server that has no way out."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vashista.engine.egress import AttemptBox
from vashista.engine.errors import SettingsError
from vashista.engine.messages import Attempt
from vashista.engine.offline import go_offline
from vashista.server.isolation.attempts import Attempts
from vashista.server.isolation.filter import architecture
from vashista.server.isolation.sentry import address
from vashista.server.settings import Settings, load_settings
from vashista.server.visitors import Visitors

HERE = Path(__file__).parent
needs_filter = pytest.mark.skipif(architecture() is None, reason="the filter is not known for this kind of machine")

TRY_ALL = f"""
import asyncio, json, sys
sys.path.append({str(HERE)!r})
import ways_out
from vashista.server.isolation.confinement import confine
before = ways_out.Before()
ways = (*ways_out.ANYWHERE, *before.ways)
if IS_CONFINED:
    confinement = confine("none", wants_filter=True)
else:
    ways = tuple(way for way in ways if way is not ways_out.name)  # it would ask the machine's resolver: nobody does
found = {{"results": ways_out.try_all(ways), "may_be_shut": sorted(ways_out.NEEDS_THE_MACHINE)}}
async def read():
    async with confinement.followed():
        await asyncio.sleep(0.3)
if IS_CONFINED:
    asyncio.run(read())
    found["counts"] = {{f"{{who}} {{what}}": n for (who, what), n in confinement.attempts.counts.items()}}
    confinement.close()
print(json.dumps(found))
"""


def run_python(code: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_filter
def test_three_dozen_ways_out_are_open_without_the_filter_and_refused_and_counted_with_it():
    control = run_python("IS_CONFINED = False" + TRY_ALL)
    shut = {name for name, state in control["results"].items() if state != "open"}
    assert shut <= set(control["may_be_shut"]), control["results"]
    confined = run_python("IS_CONFINED = True" + TRY_ALL)
    assert {name: state for name, state in confined["results"].items() if state == "open"} == {}
    assert len(confined["results"]) >= 39
    counts = confined["counts"]
    assert counts["kernel socket"] >= 19, counts
    once = (
        "sendto",
        "sendmsg",
        "sendmmsg",
        "recvmsg",
        "process_vm_readv",
        "process_vm_writev",
        "pidfd_getfd",
        "ptrace",
    )
    assert all(counts[f"kernel {name}"] >= 1 for name in ("setns", "request_key", "ioctl", "socketpair", *once)), counts
    assert counts["kernel connect"] >= 4, counts
    assert counts["server socket"] >= 12, counts
    assert counts["server send"] >= 2, counts
    assert counts["server resolve"] >= 1, counts
    assert counts["server native"] >= 2, counts


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\1\0/run/dbus/socket\0", "AF_UNIX '/run/dbus/socket'"),
        (b"\1\0\0name", "AF_UNIX '@name'"),
        (b"\1\0", "AF_UNIX ''"),
        (b"\2\0\1\xbb\xc0\0\2\x07" + bytes(8), "AF_INET 192.0.2.7:443"),
        (
            b"\x0a\0\0\x35" + bytes(4) + bytes.fromhex("20010db8") + bytes(11) + b"\1" + bytes(4),
            "AF_INET6 [2001:db8::1]:53",
        ),
        (b"\2\0\1", "AF_INET"),
        (b"\x28\0" + bytes(14), "AF_VSOCK"),
        (b"\xfe\xfe", "family 65278"),
        (b"", "AF_UNSPEC"),
    ],
)
def test_the_supervisor_says_where_a_connection_was_to_lead(data, words):
    assert address(data) == words


@needs_filter
def test_a_server_that_cannot_leave_the_network_refuses_to_serve(tmp_path):
    code = (
        "import sys\nfrom vashista.server.isolation import confinement, network\n"
        "confinement.look = lambda: network.Network(('eth0',), 1)\n"
        "def leave(): raise PermissionError(1, 'Operation not permitted')\n"
        "confinement.leave = leave\n"
        "try: confinement.confine('required', wants_filter=True)\n"
        "except Exception as error: print(error.code, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("isolation_missing")
    assert "eth0" in done.stdout
    assert "Operation not permitted" in done.stdout


@needs_filter
def test_a_server_that_leaves_the_network_answers_all_the_same_and_has_no_interface(start_server):
    server = start_server("scripted", isolation="required")
    try:
        server.wait_ready()
    except AssertionError:
        if "isolation_missing" in server.log() or "IsolationMissing" in server.log():
            pytest.skip("this machine lets nobody make network namespaces")
        raise
    assert server.complete().status_code == 200
    assert server.metric("vashista_network_interfaces") == 0
    assert server.metric("vashista_network_filter") == 1
    assert server.metric('vashista_isolation{mode="required"}') == 1
    inside = Path(f"/proc/{server.process.pid}/net/dev").read_text()
    assert [line.split(":")[0].strip() for line in inside.splitlines()[2:]] == ["lo"]
    for seen_by in ("server", "engine", "kernel"):
        assert server.metric(f'vashista_egress_attempts_total{{seen_by="{seen_by}",what="connect"}}') == 0


@needs_filter
def test_a_server_that_starts_its_engine_is_not_said_to_reach_out(start_server):
    server = start_server("scripted").wait_ready()
    assert server.complete().status_code == 200
    assert server.metric("vashista_network_filter") == 1
    assert "an attempt to reach out" not in server.log()


def test_a_client_of_another_network_is_closed_at_once_and_counted(start_server):
    server = start_server("scripted", isolation="lan", client_networks="127.0.0.1/32").wait_ready()
    assert server.complete().status_code == 200
    port = int(server.url.rsplit(":", 1)[1])
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.2", 0))
        stranger.connect(("127.0.0.1", port))
        answer = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            stranger.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = stranger.recv(1)
        assert answer == b""
    assert server.metric("vashista_clients_refused_total") == 1
    assert "MODE LAN" in server.log()
    modes = {mode: server.metric(f'vashista_isolation{{mode="{mode}"}}') for mode in ("none", "lan", "required")}
    assert modes == {"none": 0, "lan": 1, "required": 0}


@pytest.mark.parametrize(
    ("peer", "may_come"),
    [(("192.0.2.7", 1), True), (("::ffff:192.0.2.7", 1, 0, 0), True), (("198.51.100.1", 1), False), ("", True)],
)
def test_client_networks_know_both_families(peer, may_come):
    networks = Settings.model_validate({"model": "x", "client_networks": "192.0.2.0/24, 2001:db8::/32"}).client_networks
    assert Visitors(networks, lambda: None).may_come(peer) is may_come


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"client_networks": "192.0.2.7/24"}, "host bits"),
        ({"client_networks": "everyone"}, "networks such as"),
        ({"isolation": "lan"}, "client_networks is not given"),
        ({"isolation": "required", "network_filter": False}, "needs the filter"),
    ],
)
def test_settings_that_would_isolate_nobody_are_errors(values, words):
    with pytest.raises(SettingsError, match=words):
        load_settings({"model": "x", **values}, {})


def test_an_attempt_is_logged_once_and_then_at_powers_of_ten(caplog):
    attempts = Attempts()
    for _ in range(12):
        attempts.count("engine", "connect", "('192.0.2.1', 443)", "a.py:1 f")
    assert attempts.counts["engine", "connect"] == 12
    assert len(caplog.records) == 2


def test_attempts_of_one_culprit_travel_as_one():
    box = AttemptBox()
    for port in range(3):
        box.put(Attempt("connect", f"port {port}", "a.py:1 f"))
    (attempt,) = box.take()
    assert (attempt.times, attempt.detail) == (3, "port 2")
    assert box.take() == []


def test_the_hook_names_the_line_that_asked():
    code = (
        "import json, socket\nfrom vashista.engine.egress import watch\nseen = []\nwatch(seen.append)\n"
        "def culprit():\n"
        "    try: socket.getaddrinfo('name.invalid', 1)\n"
        "    except OSError: pass\n"
        "culprit()\nsocket.socket(fileno=socket.socketpair()[0].detach())\n"
        "print(json.dumps({a.what: [a.detail, a.culprit] for a in seen}))"
    )
    found = run_python(code.replace("socket.getaddrinfo('name.invalid', 1)", "socket.gethostbyname('127.0.0.1')"))
    assert found == {"resolve": ["'127.0.0.1'", "<string>:6 culprit"]}


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python asks the C library then, and starts no program")
def test_programs_that_look_for_a_library_are_no_attempt(tmp_path: Path):
    """As cuda-pathfinder has them started for torch, where ldconfig may not run or does not know the library."""
    library = tmp_path / "libof_nobody.so"
    library.write_bytes(b"\x7fELF")
    for name, said in (("gcc", f"({library})"), ("objdump", "  SONAME  libof_nobody.so.2")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / name).chmod(0o755)
    code = (
        "import json, os\nfrom vashista.engine.egress import watch\nfrom ctypes.util import find_library\n"
        f"seen = []\nwatch(seen.append)\nos.environ['PATH'] = {str(tmp_path)!r}\nfound = find_library('of_nobody')\n"
        "print(json.dumps([found, [a.detail for a in seen]]))"
    )
    assert run_python(code) == ["libof_nobody.so.2", []]


def test_libraries_are_told_to_stay_offline_and_proxies_are_forgotten():
    environ = {"HF_HUB_OFFLINE": "0", "https_proxy": "http://proxy", "HTTP_PROXY": "x", "HOME": os.sep}
    environ |= {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector", "TORCH_COMPILE_STROBELIGHT": "1"}
    go_offline(environ)
    assert not {"OTEL_EXPORTER_OTLP_ENDPOINT", "TORCH_COMPILE_STROBELIGHT"} & set(environ)
    assert environ["HF_HUB_OFFLINE"] == "1"
    assert environ["HOME"] == os.sep
    assert not [name for name in environ if "proxy" in name.lower()]
