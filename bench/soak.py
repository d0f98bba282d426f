"""Random load on a real server for a while: starts, stops, cancels, kills of the engine. Nothing may be left behind.

    python bench/soak.py --minutes 15

Clients send completions and chats of random size and sampling, stream or not, and go away at random; now and then the
engine is killed with SIGKILL. At the end every request must have ended, with an answer or with one of the errors that
such days allow; no KV page may be held; the server's memory must be stable. Exit status 1 and the reasons if not.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

MODEL = Path(__file__).parents[1] / "deploy/models/reference-26m"
ALLOWED_ERRORS = {"engine_died", "engine_not_ready", "queue_full"}
STUCK_S = 120.0
GROWTH_BYTES = 24 << 20
"""Growth of the server's memory from the second quarter to the last that still counts as stable."""


class Soak:
    """One run: its server, its clients, and what they saw."""

    def __init__(self, seconds: float, num_clients: int, kill_every_s: float, seed: int) -> None:
        self.end_s = time.monotonic() + seconds
        self.num_clients = num_clients
        self.kill_every_s = kill_every_s
        self.random = random.Random(seed)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.memory: list[int] = []
        self.num_kills = 0

    async def run(self) -> bool:
        """True if nothing was wrong."""
        with tempfile.TemporaryDirectory() as state:
            self.server = start_server(state)
            try:
                url = await asyncio.to_thread(wait_for_address, self.server)
                async with httpx.AsyncClient(base_url=url, timeout=STUCK_S) as self.http:
                    clients = [self.client(index) for index in range(self.num_clients)]
                    await asyncio.gather(*clients, self.killer(), self.watch_memory())
                    await self.check_nothing_is_left()
            finally:
                self.server.send_signal(signal.SIGTERM)
                if self.server.wait(30) != 0:
                    self.problems.append(f"the server ended with status {self.server.returncode}")
        return self.report()

    async def client(self, index: int) -> None:
        """One client after another on the same place."""
        source = random.Random(self.random.random())
        while time.monotonic() < self.end_s:
            path, body = random_request(source)
            patience = source.expovariate(0.5) if source.random() < 0.3 else None
            started = time.monotonic()
            try:
                outcome = await asyncio.wait_for(self.send(path, body), patience or STUCK_S)
            except TimeoutError:
                outcome = "cancelled"
                if patience is None:
                    self.problems.append(f"client {index}: {path} stuck for {STUCK_S:.0f} s: {body}")
            except httpx.HTTPError as error:
                outcome = f"transport {type(error).__name__}"
                self.problems.append(f"client {index}: {error!r} after {time.monotonic() - started:.1f} s")
            self.outcomes[outcome] += 1
            if outcome in ALLOWED_ERRORS:
                await asyncio.sleep(0.2)

    async def send(self, path: str, body: dict[str, object]) -> str:
        """Send one request and read all of its answer; what came of it."""
        async with self.http.stream("POST", path, json=body) as response:
            text = (await response.aread()).decode()
        if response.status_code != 200:
            code = json.loads(text)["error"]["code"]
            if code not in ALLOWED_ERRORS:
                self.problems.append(f"{response.status_code} {text[:300]} for {str(body)[:300]}")
            return str(code)
        if not body["stream"]:
            return "answered"
        if match := re.search(r'"code": ?"([a-z_]+)"', text):
            if match[1] not in ALLOWED_ERRORS:
                self.problems.append(f"error in a stream: {match[1]}")
            return match[1]
        if not text.rstrip().endswith("data: [DONE]"):
            self.problems.append(f"a stream ended without [DONE]: ...{text[-200:]}")
        return "streamed"

    async def killer(self) -> None:
        """Kill the engine now and then, and wait until it is back."""
        while True:
            next_s = time.monotonic() + self.random.uniform(0.5, 1.5) * self.kill_every_s
            if next_s >= self.end_s:
                return
            await asyncio.sleep(next_s - time.monotonic())
            [engine] = child_processes(self.server.pid)
            os.kill(engine, signal.SIGKILL)
            self.num_kills += 1
            killed_s = time.monotonic()
            while (await self.http.get("/ready")).status_code == 200 and time.monotonic() - killed_s < 5:
                await asyncio.sleep(0.02)
            while (await self.http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.1)
                if time.monotonic() - killed_s > 60:
                    self.problems.append("the engine was not back within 60 s")
                    return

    async def watch_memory(self) -> None:
        """Record the server's resident memory twice a second."""
        while time.monotonic() < self.end_s:
            self.memory.append(resident_bytes(self.server.pid))
            await asyncio.sleep(0.5)

    async def check_nothing_is_left(self) -> None:
        """After the last client: no running or waiting request, no held page."""
        names = ('vashista_kv_pages{state="used"}', "vashista_requests_running", "vashista_requests_waiting")
        for _ in range(50):
            metrics = (await self.http.get("/metrics")).text
            left = {name: metric(metrics, name) for name in names}
            if not any(left.values()):
                return
            await asyncio.sleep(0.2)
        self.problems.append(f"left behind: {left}")

    def report(self) -> bool:
        """Print what happened."""
        quarter = len(self.memory) // 4
        early, late = (statistics.median(part) for part in (self.memory[quarter : 2 * quarter], self.memory[-quarter:]))
        if late - early > GROWTH_BYTES:
            self.problems.append("the server's memory grew")
        print(f"requests: {dict(self.outcomes)}")
        print(f"kills of the engine: {self.num_kills}")
        print(f"server memory: {early / 2**20:.1f} MiB in the second quarter, {late / 2**20:.1f} MiB in the last")
        for problem in self.problems[:20]:
            print(f"PROBLEM: {problem}")
        print("nothing left behind" if not self.problems else f"{len(self.problems)} problems")
        return not self.problems


def random_request(source: random.Random) -> tuple[str, dict[str, object]]:
    """A path and a valid body."""
    body: dict[str, object] = {
        "model": "reference-26m",
        "max_tokens": source.randrange(1, 64),
        "stream": source.random() < 0.6,
        "temperature": source.choice([0, 0.7, 1.0]),
        "top_p": source.choice([1.0, 0.9]),
        "seed": source.randrange(1000),
    }
    if source.random() < 0.2:
        body["n"] = 2
    if source.random() < 0.2:
        body["stop"] = ["the", "\n\n"]
    if source.random() < 0.3:
        attention = source.choice([{"mode": "sparse", "token_budget": 256}, {"max_dropped_mass": 0.2}])
        body["vashista"] = {"attention": attention}
    if source.random() < 0.3:
        question = " ".join(source.choice(["what", "is", "the", "code", "of", "elephant", "?"]) for _ in range(30))
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": question}]}
    length = min(int(source.lognormvariate(5, 1.3)) + 1, 3000)
    shared = [7] * min(length, 128) if source.random() < 0.5 else []
    prompt = shared + [source.randrange(1, 8192) for _ in range(length - len(shared))]
    return "/v1/completions", body | {"prompt": prompt}


def start_server(state_dir: str) -> subprocess.Popen[str]:
    """A server with a cache small enough that requests are preempted."""
    options = ["--model", str(MODEL), "--port", "0", "--state-dir", state_dir, "--page-size", "16"]
    options += ["--kv-cache-bytes", "64MiB", "--max-context", "4096", "--max-engine-restarts", "1000"]
    options += ["--dense-below", "0", "--audit-rate", "0.05"]
    command = [str(Path(sys.executable).with_name("vashista")), "serve", *options, "--log-level", "error"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for_address(server: subprocess.Popen[str]) -> str:
    """The URL that the server prints once it is ready."""
    assert server.stdout is not None
    for line in server.stdout:
        if match := re.search(r"http://127\.0\.0\.1:\d+", line):
            return match[0]
    raise SystemExit("the server did not start")


def child_processes(pid: int) -> list[int]:
    """Direct children of all threads of a process, but for those with a name of their own, such as
    the supervisor of the kernel's filter."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for file in files for child in file.read_text().split()]
    return [child for child in found if not Path(f"/proc/{child}/comm").read_text().startswith("vashista-")]


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def metric(text: str, name: str) -> float:
    """One sample of a metrics page."""
    for line in text.splitlines():
        if line.startswith(name + " "):
            return float(line.rsplit(" ", 1)[1])
    raise SystemExit(f"/metrics has no {name}")


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    soak = Soak(options.minutes * 60, options.clients, options.kill_every, options.seed)
    return 0 if asyncio.run(soak.run()) else 1


if __name__ == "__main__":
    sys.exit(main())
