"""Kills server and engine under load, again and again: is there an answered request without its receipt?

    python bench/ledger_kills.py --server-kills 200 --engine real
    python bench/ledger_kills.py --server-kills 5 --engine scripted

Clients send requests of all kinds without pause: whole and streamed, good and bad, some that leave. A request counts as
answered when its whole reply is there: the body, or the last event of a stream. In each round the engine is killed
with SIGKILL some times and then the server, at random moments. Then the ledger must verify, every answered request must
have its receipt, and the next server must start on what the last one left. Stops at the first loss.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import httpx

from vashista.server.ledger.reader import reading
from vashista.server.ledger.receipt import decode
from vashista.server.ledger.verify import verify

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "deploy" / "models" / "reference-26m"
RUN_SERVER = ROOT / "tests" / "server" / "run_server.py"
NUM_CLIENTS = 8
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/messages")


class Served:
    """A server process on a state folder that outlives it."""

    def __init__(self, engine: str, state: Path) -> None:
        settings = {"model": str(MODEL), "state_dir": str(state), "port": 0, "max_engine_restarts": 1000}
        if engine == "real":
            settings |= {"num_threads": 1, "kv_cache_bytes": 64 << 20}
        self.process = subprocess.Popen(
            [sys.executable, str(RUN_SERVER), engine, json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "SCRIPTED_STEP_S": "0.001"},
        )
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if line.startswith("Vashista serves")), None)
        assert line is not None, "the server does not start on the ledger that the killed one left"
        self.url = line.split(" at ")[1].split(" ")[0]

    def kill_engine(self) -> None:
        """SIGKILL to the engine, if there is one at this moment."""
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for child in task.read_text().split():
                if not Path(f"/proc/{child}/comm").read_text().startswith("vashista-"):  # others have names
                    os.kill(int(child), signal.SIGKILL)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Client(threading.Thread):
    """Sends one request after the other until the server is gone."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._source = random.Random(seed)
        self.answered: list[str] = []

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while True:
                try:
                    self._ask(client)
                except httpx.ConnectError:
                    return
                except httpx.HTTPError:
                    continue  # cut off in the middle: not answered

    def _ask(self, client: httpx.Client) -> None:
        path, source = self._source.choice(PATHS), self._source
        body: dict[str, Any] = {"model": "reference-26m", "max_tokens": source.randint(1, 24)}
        text = "hello " * source.randint(1, 40)
        body |= {"prompt": text} if path == PATHS[0] else {"messages": [{"role": "user", "content": text}]}
        if source.random() < 0.1:
            body["unknown"] = 1
        streams = body["stream"] = source.random() < 0.5
        leaves = source.random() < 0.1
        request_id = uuid.uuid4().hex
        with client.stream("POST", path, json=body, headers={"x-request-id": request_id}) as reply:
            data = b""
            for part in reply.iter_bytes():
                data += part
                if leaves:
                    return
        if not (streams and reply.status_code == 200) or _has_ended(data):
            self.answered.append(request_id)


def _has_ended(data: bytes) -> bool:
    return data.endswith(b"data: [DONE]\n\n") or b"event: message_stop" in data or b"event: error" in data


def kill_rounds(num_kills: int, engine: str, state: Path, seed: int) -> dict[str, Any]:
    """Kill so often; the figures of what happened. AssertionError at the first loss."""
    source = random.Random(seed)
    figures = {"server_kills": 0, "engine_kills": 0, "answered": 0, "receipts": 0, "lost": 0}
    last_seq = 0
    while figures["server_kills"] + figures["engine_kills"] < num_kills:
        served = Served(engine, state)
        clients = [Client(served.url, source.randrange(1 << 30)) for _ in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        for _ in range(source.choice([0, 0, 1, 2])):
            time.sleep(source.uniform(0.05, 1.0))
            served.kill_engine()
            figures["engine_kills"] += 1
        time.sleep(source.uniform(0.05, 1.5))
        served.kill()
        figures["server_kills"] += 1
        for client in clients:
            client.join(60)
            assert not client.is_alive()
        verdict = verify(state / "ledger.db")
        assert verdict.damage is None, verdict.damage
        written, last_seq = ids_after(state / "ledger.db", last_seq)
        lost = [request_id for client in clients for request_id in client.answered if request_id not in written]
        assert not lost, f"answered without a receipt: {lost}"
        figures["answered"] += sum(len(client.answered) for client in clients)
        figures["receipts"] = verdict.num_receipts
    return figures


def ids_after(path: Path, last: int) -> tuple[set[str], int]:
    """Ids of the requests with receipts after this number, and the new last number."""
    with reading(path) as connection:
        rows = connection.execute("select seq, body from receipts where seq > ? order by seq", (last,)).fetchall()
    return {decode(body, seq).request_id for seq, body in rows}, rows[-1][0] if rows else last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--server-kills", type=int, default=200, metavar="N", help="kills of server and engine together"
    )
    parser.add_argument("--engine", choices=["real", "scripted"], default="real")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--state", type=Path, help="folder of the ledger; a temporary one unless given")
    options = parser.parse_args()
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        figures = kill_rounds(options.server_kills, options.engine, options.state or Path(made), options.seed)
    print(json.dumps({"engine": options.engine, **figures, "took_s": round(time.monotonic() - begin_s, 1)}, indent=2))


if __name__ == "__main__":
    main()
