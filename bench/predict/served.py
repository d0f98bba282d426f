"""A real server for the benchmark, and the client that loads it: open loop, one connection a request."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

START_LIMIT_S = 300.0
TIMEOUT_S = 280.0
MODEL_NAME = "model"


class Server:
    """`vashista serve` on a free port; ended at the end of the with block."""

    def __init__(self, model_dir: str, state_dir: Path, flags: Sequence[str] = ()) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._command = [
            *(str(Path(sys.executable).with_name("vashista")), "serve", "--model", model_dir),
            *(
                "--served-model-name",
                MODEL_NAME,
                "--port",
                str(self.port),
                "--state-dir",
                str(state_dir),
                "--log-level",
                "warning",
                *flags,
            ),
        ]

    def __enter__(self) -> Server:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("VASHISTA_")}
        begin_s = time.perf_counter()
        self._process = subprocess.Popen(self._command, env=environment, stdout=subprocess.DEVNULL)
        while not self._is_ready():
            if self._process.poll() is not None or time.perf_counter() - begin_s > START_LIMIT_S:
                self.__exit__(None, None, None)
                raise RuntimeError(f"the server did not become ready: {' '.join(self._command)}")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def get(self, path: str) -> dict[str, Any]:
        """The JSON of a path."""
        found: dict[str, Any] = msgspec.json.decode(self.text(path))
        return found

    def text(self, path: str) -> str:
        """What a path answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as reply:
            text: str = reply.read().decode()
            return text

    def _is_ready(self) -> bool:
        try:
            self.get("/ready")
        except OSError:
            return False
        return True


async def complete(port: int, body: dict[str, Any]) -> dict[str, Any]:
    """One completion, whole; its usage, with the client's own `client_s`. RuntimeError for anything but a 200."""
    begin_s = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = msgspec.json.encode(body | {"model": MODEL_NAME})
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
        )
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        reply = await asyncio.wait_for(reader.read(), TIMEOUT_S)
    finally:
        writer.close()
    header, _, content = reply.partition(b"\r\n\r\n")
    if b" 200 " not in header.split(b"\r\n")[0]:
        raise RuntimeError(f"{header.decode(errors='replace')}\n{content[:400].decode(errors='replace')}")
    usage: dict[str, Any] = msgspec.json.decode(content)["usage"]
    return usage | {"client_s": time.perf_counter() - begin_s}


async def open_loop(
    port: int, bodies: Sequence[dict[str, Any]], rate: float, source: random.Random
) -> list[dict[str, Any]]:
    """Send them as a Poisson process of `rate` a second; their usages, in order."""
    tasks = []
    due_s = time.perf_counter()
    for body in bodies:
        due_s += source.expovariate(rate)
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(complete(port, body)))
    return list(await asyncio.gather(*tasks))


async def one_by_one(port: int, bodies: Sequence[dict[str, Any]], pause_s: float = 0.05) -> list[dict[str, Any]]:
    """Each alone in the server."""
    found = []
    for body in bodies:
        found.append(await complete(port, body))
        await asyncio.sleep(pause_s)
    return found


async def throughput(port: int, bodies: Sequence[dict[str, Any]], concurrency: int) -> float:
    """Requests a second when so many clients never pause: what is taken for capacity."""
    waiting = list(bodies)

    async def client() -> None:
        while waiting:
            await complete(port, waiting.pop())

    begin_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return len(bodies) / (time.perf_counter() - begin_s)
