"""Clients of the server that bench/airgap/install.sh installs; they run on the other host of its LAN. Prints JSON.

    python install_client.py first HOST:PORT          asks until a first completion comes
    python install_client.py load HOST:PORT FILE      three clients ask without pause until FILE is there

A request is refused when no connection is made, and lost when it gets no whole completion of status 200. Every
request has a connection of its own. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from pathlib import Path

NUM_CLIENTS = 3
TIMEOUT_S = 120.0
MAX_TOKENS = 8
BODY = json.dumps({"model": "reference-26m", "prompt": "It was a dark", "max_tokens": MAX_TOKENS, "temperature": 0})


def ask(address: str) -> str:
    """One completion; its text. ConnectionError or OSError when it is refused or lost."""
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    try:
        connection.connect()
    except OSError as error:
        raise ConnectionRefusedError(str(error)) from error
    try:
        connection.request("POST", "/v1/completions", BODY, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        text = reply.read().decode()
        if reply.status != 200 or json.loads(text)["usage"]["completion_tokens"] != MAX_TOKENS:
            raise ConnectionAbortedError(f"{reply.status} {text[:300]}")
        return str(json.loads(text)["choices"][0]["text"])
    except (http.client.HTTPException, ValueError, KeyError) as error:
        raise ConnectionAbortedError(repr(error)) from error
    finally:
        connection.close()


def first(address: str) -> dict[str, object]:
    """Ask until it answers, at most two minutes, since before the installation nothing listens."""
    give_up_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return {"text": ask(address), "at": time.time()}
        except OSError as error:
            if time.monotonic() > give_up_s:
                return {"error": str(error)}
            time.sleep(0.05)


class Load:
    """What came of the requests of all clients."""

    def __init__(self, address: str, end: Path) -> None:
        self.address, self.end = address, end
        self.lock = threading.Lock()
        self.counts = {"requests": 0, "refused": 0, "lost": 0}
        self.slowest_s = 0.0
        self.failures: list[str] = []

    def client(self) -> None:
        """One client, until the file is there."""
        while not self.end.exists():
            start_s, outcome = time.monotonic(), None
            try:
                ask(self.address)
            except ConnectionRefusedError as error:
                outcome, why = "refused", str(error)
            except OSError as error:
                outcome, why = "lost", repr(error)
            with self.lock:
                self.counts["requests"] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - start_s)
                if outcome is not None:
                    self.counts[outcome] += 1
                    self.failures.append(f"{outcome}: {why}")

    def run(self) -> dict[str, object]:
        """All clients to their end."""
        threads = [threading.Thread(target=self.client) for _ in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {**self.counts, "slowest_s": round(self.slowest_s, 2), "failures": self.failures[:5]}


def main(words: list[str]) -> int:
    """Do what the command line asks for."""
    if words[0] == "first":
        report = first(words[1])
        print(json.dumps(report))
        return 1 if "error" in report else 0
    report = Load(words[1], Path(words[2])).run()
    print(json.dumps(report))
    return 1 if report["refused"] or report["lost"] or not report["requests"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
