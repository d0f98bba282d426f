"""A server under strace, every route asked: what it answers is all that it says."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from vashista.server.app import all_endpoints

FOLDER = Path(__file__).parents[2] / "bench/airgap"
PROMPT = {"model": "reference-26m", "prompt": "hello world", "max_tokens": 4}
MESSAGES = {"model": "reference-26m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [PROMPT, {**PROMPT, "stream": True}, {**PROMPT, "model": "other"}],
    "/v1/chat/completions": [MESSAGES, {**MESSAGES, "stream": True}],
    "/v1/messages": [MESSAGES, {**MESSAGES, "stream": True}],
    "/v1/predict": [PROMPT],
    "/tokenize": [{"prompt": "hello"}, MESSAGES],
    "/detokenize": [{"tokens": [5, 6]}],
}


@pytest.fixture
def system_calls(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("system_calls", FOLDER / "system_calls.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "system_calls", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def ask_everything(url: str) -> int:
    """Each route in each way; how many replies came."""
    count = 0
    with httpx.Client(base_url=url, timeout=60) as client:
        for endpoint in all_endpoints():
            path = endpoint.path.replace("{model}", "reference-26m").replace("{id}", "x")
            for body in BODIES.get(path, [None]):  # type: ignore[list-item]
                reply = client.request(endpoint.method, path, json=body)
                assert reply.status_code < 500, (path, reply.text)
                count += 1
        count += client.get("/no/such/route").status_code == 404
    return count


@pytest.fixture
def strace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system_calls: ModuleType) -> Path:
    if shutil.which("strace") is None:
        pytest.skip("there is no strace")
    if subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody trace")
    folder = tmp_path / "traces"
    folder.mkdir()
    monkeypatch.setenv("SERVER_WRAPPER", " ".join([*system_calls.COMMAND, str(folder / "trace")]))
    return folder


@pytest.mark.parametrize("engine", ["scripted", "real"])
def test_a_server_that_answers_every_route_makes_no_call_that_leads_outward(
    engine: str, start_server: Any, strace: Path, system_calls: ModuleType
) -> None:
    server = start_server(engine).wait_ready()
    assert ask_everything(server.url) > 15
    server.end()
    time.sleep(0.5)  # the tracer writes to the end by itself
    found = system_calls.read(strace)
    assert found.outward == []
    assert found.is_silent
    assert found.kinds["answer"] > 15
    assert found.kinds["try at the start"] >= 8, found.kinds


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("connect(5<TCP:[1]>, {sa_family=AF_INET, sin_port=htons(443)}, 16) = -1 ECONNREFUSED (x)", "outward"),
        ("connect(5<UNIX-STREAM:[1]>, {sa_family=AF_UNIX, sun_path=@\"x\"}, 8) = -1 X (x)", "try at the start"),
        ("connect(5<UNIX-STREAM:[1]>, {sa_family=AF_UNIX, sun_path=\"/run/x\"}, 8) = 0", "outward"),
        ("sendto(5<UDP:[1]>, \"\"..., 9, 0, {sa_family=AF_INET, sin_port=htons(53)}, 16) = 9", "outward"),
        ("sendto(5<TCP:[127.0.0.1:8000->127.0.0.1:51]>, \"\"..., 9, 0, NULL, 0) = 9", "answer"),
        ("write(5<TCP:[127.0.0.1:8000->127.0.0.1:51]>, \"\"..., 9) = 9", "answer"),
        ("write(5<TCP:[127.0.0.1:51->127.0.0.1:9000]>, \"\"..., 9) = 9", "outward"),
        ("socket(AF_INET, SOCK_DGRAM|SOCK_CLOEXEC, IPPROTO_IP) = 5<UDP:[1]>", "outward"),
        ("socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE) = 5<NETLINK:[1]>", "outward"),
        ("socket(AF_INET, SOCK_STREAM, IPPROTO_IP) = -1 EAFNOSUPPORT (x)", "try at the start"),
        ("openat(AT_FDCWD, \"/etc/resolv.conf\", O_RDONLY) = 5", "outward"),
        ("io_uring_setup(256, 0x1) = 5", "outward"),
        ("sendmsg(5<NETLINK:[1]>, {msg_name={sa_family=AF_NETLINK}}, 0) = 20", "outward"),
    ],
)  # fmt: skip
def test_a_call_that_leads_outward_is_found(line: str, kind: str, system_calls: ModuleType) -> None:
    calls = system_calls.Calls()
    system_calls.classify([line], {"8000"}, calls)
    assert calls.kinds == {kind: 1}
    assert bool(calls.outward) is (kind == "outward")
