"""The server under systemd's protocols: sockets that are passed, readiness and signs of life, an upgrade under load."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from vashista.engine.errors import SettingsError
from vashista.server.listening import listen
from vashista.server.settings import Settings
from vashista.server.systemd import FIRST_FD, ServiceManager

ROOT = Path(__file__).parents[2]


@pytest.fixture
def manager_socket(tmp_path):
    """What systemd reads sd_notify(3) messages from, and its path."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(30)
        yield sock, str(path)


def test_a_passed_socket_is_for_the_process_that_is_named_alone():
    mine = {"LISTEN_FDS": "1", "LISTEN_PID": "7", "NOTIFY_SOCKET": "/x", "HOME": "/"}
    assert ServiceManager(mine, pid=7).passed_socket() == FIRST_FD
    assert mine == {"HOME": "/"}, "children would take what was not passed to them"
    assert ServiceManager({"LISTEN_FDS": "1", "LISTEN_PID": "8"}, pid=7).passed_socket() is None
    assert ServiceManager({"LISTEN_FDS": "x", "LISTEN_PID": "7"}, pid=7).passed_socket() is None
    assert ServiceManager({}, pid=7).passed_socket() is None


def test_several_passed_sockets_and_two_ways_to_listen_are_named_errors():
    with pytest.raises(SettingsError, match="2 listening sockets"):
        ServiceManager({"LISTEN_FDS": "2", "LISTEN_PID": "7"}, pid=7).passed_socket()
    with pytest.raises(SettingsError, match="setting host is given"):
        listen(Settings.model_validate({"model": "x", "host": "0.0.0.0"}), passed=3)


@pytest.mark.parametrize("name", ["path", "abstract"])
def test_messages_go_to_the_socket_that_is_named(tmp_path, name):
    address = str(tmp_path / "s") if name == "path" else f"@vashista-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0"))
        with closing(ServiceManager({"NOTIFY_SOCKET": address})) as manager:
            manager.tell("READY=1", "STATUS=x")
        assert sock.recv(100) == b"READY=1\nSTATUS=x"


def test_a_manager_that_does_not_listen_is_logged_and_survived(tmp_path, caplog):
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).tell("READY=1")
    assert "systemd cannot be told anything" in caplog.text


def test_a_manager_that_ends_is_logged_and_survived(manager_socket, caplog):
    sock, path = manager_socket
    with closing(ServiceManager({"NOTIFY_SOCKET": path})) as manager:
        sock.close()
        manager.tell("READY=1")
    assert "systemd cannot be told READY=1" in caplog.text


def test_signs_of_life_come_twice_in_each_watchdog_interval(manager_socket):
    sock, path = manager_socket

    async def live(pid: str) -> None:
        environ = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "40000", "WATCHDOG_PID": pid}
        with closing(ServiceManager(environ)) as manager:
            async with manager.signs_of_life():
                await asyncio.sleep(0.1)

    asyncio.run(live(str(os.getpid())))
    assert {sock.recv(100) for _ in range(3)} == {b"WATCHDOG=1"}
    sock.setblocking(False)
    while True:
        try:
            sock.recv(100)
        except BlockingIOError:
            break
    asyncio.run(live("1"))
    with pytest.raises(BlockingIOError):
        sock.recv(100)


def test_the_server_tells_when_it_is_ready_and_when_it_stops(start_server, manager_socket):
    sock, path = manager_socket
    server = start_server(environ={"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "60000000"}, drain_timeout_s=3).wait_ready()
    first = {sock.recv(500).decode() for _ in range(2)}
    assert first == {"WATCHDOG=1", "READY=1\nSTATUS=Serving reference-26m."}
    server.process.terminate()
    assert sock.recv(500).decode().splitlines()[:2] == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=18000000"]
    assert server.process.wait(30) == 0


def test_an_upgrade_behind_a_held_socket_loses_no_request(start_server, tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=512) as held:
        os.set_inheritable(held.fileno(), True)
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        statuses, failures, ended = [], [], threading.Event()

        def ask() -> None:
            while not ended.is_set():
                try:
                    body = {"model": "reference-26m", "prompt": "hello", "max_tokens": 2}
                    statuses.append(httpx.post(url + "/v1/completions", json=body, timeout=60).status_code)
                except httpx.HTTPError as error:
                    failures.append(repr(error))

        clients = [threading.Thread(target=ask) for _ in range(3)]
        state = str(tmp_path / "state")
        server = start_server(fd=held.fileno(), state_dir=state)
        for client in clients:
            client.start()
        try:
            for _ in range(2):
                server.wait_ready()
                before = len(statuses)
                server.wait_for(lambda count=before: len(statuses) > count + 20)
                server.process.terminate()
                assert server.process.wait(30) == 0
                server = start_server(fd=held.fileno(), state_dir=state)
            server.wait_ready()
        finally:
            ended.set()
            for client in clients:
                client.join()
    assert not failures
    assert set(statuses) == {200}


def test_an_idle_connection_is_closed_when_the_socket_is_left_to_the_next_server(start_server):
    with socket.create_server(("127.0.0.1", 0)) as held:
        os.set_inheritable(held.fileno(), True)
        server = start_server(fd=held.fileno()).wait_ready()
        with socket.create_connection(held.getsockname(), timeout=30) as idle:
            idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            reply = b""
            while not reply.endswith(b"}"):
                reply += idle.recv(1000)
            assert b"200 OK" in reply
            server.process.terminate()
            assert idle.recv(1000) == b""
        assert server.process.wait(30) == 0


def test_a_server_that_is_stopped_while_it_loads_ends(start_server):
    with socket.create_server(("127.0.0.1", 0)) as held:
        os.set_inheritable(held.fileno(), True)
        server = start_server(fd=held.fileno())
        server.wait_for(lambda: "engine process started" in server.log())
        server.process.terminate()
        assert server.process.wait(30) == 0


def test_a_server_that_systemd_starts_takes_its_socket_without_a_setting(tmp_path):
    listening = (
        "import os, socket, sys; s = socket.create_server(('127.0.0.1', 0)); os.dup2(s.fileno(), 3);"
        "os.set_inheritable(3, True); os.environ |= {'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())};"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    settings = f'{{"model": "{ROOT}/deploy/models/reference-26m", "state_dir": "{tmp_path}"}}'
    run = [str(Path(__file__).with_name("run_server.py")), "scripted", settings]
    with subprocess.Popen([sys.executable, "-c", listening, *run], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split(" at ")[1].split(" ")[0]
        assert httpx.get(url + "/ready").status_code == 200
        server.terminate()
        server.stdout.read()
