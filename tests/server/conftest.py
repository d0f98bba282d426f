"""Servers under test: real processes on loopback, with a scripted engine or the real one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "deploy" / "models" / "reference-26m"
PLAIN_MODEL = HERE.parent / "data" / "plain" / "reference-26m"
"""For the scripted engine, which needs no weights: its tokenizer puts nothing before a text."""
DEADLINE_S = 60.0


class ServerProcess:
    """A started server. `url` is known once it is ready."""

    def __init__(self, engine: str, folder: Path, environ: dict[str, str], **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_path, self.engine_log = folder / "server.log", folder / "engine.jsonl"
        self.engine_log.touch()
        values = {
            "model": str(MODEL if engine == "real" else PLAIN_MODEL),
            "state_dir": str(folder / "state"),
            **settings,
        }
        if not {"fd", "uds"} & set(values):
            values.setdefault("port", 0)
        self._log = self.log_path.open("wb")
        fds = [int(values["fd"])] if "fd" in values else []
        wrapper = os.environ.get("SERVER_WRAPPER", "").split()  # such as strace, for bench/airgap/silent.py
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, str(HERE / "run_server.py"), engine, json.dumps(values)],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "SCRIPTED_LOG": str(self.engine_log), "OMP_NUM_THREADS": "1", **environ},
            pass_fds=fds,
        )
        self.url = ""
        self.announcement = ""

    def wait_ready(self) -> ServerProcess:
        """Read stdout until the announcement is complete."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.announcement += line
            if line.startswith("Vashista serves"):
                self.url = line.split(" at ")[1].split(" ")[0]
            if "curl " in line:
                return self
        raise AssertionError(f"the server ended before it was ready:\n{self.log()}")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def engine_messages(self, kind: str) -> list[dict[str, Any]]:
        """What the scripted engine has received."""
        lines = self.engine_log.read_text().splitlines()
        return [message for line in lines if (message := json.loads(line))["kind"] == kind]

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """The first truthy value of the condition; fails after a deadline."""
        end_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < end_s:
            if value := condition():
                return value
            time.sleep(0.01)
        raise AssertionError(f"it did not become true\n{self.log()}")

    def metric(self, name: str) -> float:
        """One value of /metrics; 0 when the series is not there."""
        for line in httpx.get(self.url + "/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.split()[-1])
        return 0.0

    def complete(self, **fields: Any) -> httpx.Response:
        """POST /v1/completions."""
        body = {"model": "reference-26m", "prompt": "hello world", "max_tokens": 4, **fields}
        return httpx.post(self.url + "/v1/completions", json=body, timeout=DEADLINE_S)

    def chat(self, **fields: Any) -> httpx.Response:
        """POST /v1/chat/completions."""
        messages = [{"role": "user", "content": "hello world"}]
        body = {"model": "reference-26m", "messages": messages, "max_tokens": 4, **fields}
        return httpx.post(self.url + "/v1/chat/completions", json=body, timeout=DEADLINE_S)

    def engine_pid(self) -> int:
        """The engine that runs: the server's only child but for those with a name of their own, the supervisor of the
        kernel's filter and the process of the chat template."""
        texts = [path.read_text() for path in Path(f"/proc/{self.process.pid}/task").glob("*/children")]
        found = [int(child) for text in texts for child in text.split()]
        (engine,) = [pid for pid in found if not Path(f"/proc/{pid}/comm").read_text().startswith("vashista-")]
        return engine

    def end(self) -> int:
        """Stop it if it runs; its exit status."""
        self.process.terminate()
        try:
            self.process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        finally:
            self._log.close()
        return self.process.returncode


@pytest.fixture(scope="session")
def script() -> type:
    """The seeds with a meaning to the scripted engine."""
    return load_module("scripted_engine").Script


def load_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


StartServer = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Starts servers that end with the module's tests."""
    with contextlib.ExitStack() as stack:

        def start(engine: str = "scripted", environ: dict[str, str] | None = None, **settings: Any) -> ServerProcess:
            server = ServerProcess(engine, tmp_path_factory.mktemp("server"), environ or {}, **settings)
            stack.callback(server.end)
            return server

        yield start


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server with a scripted engine, shared by all tests that only talk to it."""
    server = ServerProcess("scripted", tmp_path_factory.mktemp("server"), {}, max_body_bytes=1 << 20, drain_timeout_s=5)
    try:
        yield server.wait_ready()
    finally:
        server.end()
    # At its place in a line: a request's path may hold any words, and fuzzers take theirs from the source.
    unexpected = re.findall(r"^\S+Z error server\.\w+: unexpected error.*", server.log(), re.MULTILINE)
    assert not unexpected, server.log()[-5000:]
