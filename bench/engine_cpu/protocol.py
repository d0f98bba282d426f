"""How `run.py` talks to the contestants: one process each, one JSON object a line, one answer a question.

A process of its own keeps one runtime's threads, allocator and interpreter out of another's measurement. Both ends are
here; the standard library alone is used, since llama.cpp runs in another environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Worker:
    """One contestant: started with its settings, asked for `greedy`, `decode` or `batch`."""

    def __init__(self, name: str, python: str, script: str, settings: dict[str, Any]) -> None:
        self.name = name
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
        environment |= {"OMP_NUM_THREADS": str(settings["num_threads"]), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.info = self._read()

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Run one operation there. Raises RuntimeError when the process ends."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"operation": operation} | arguments) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(info: dict[str, Any], operations: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """The contestant's end: answer until stdin closes."""
    print(json.dumps(info), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(operations[question.pop("operation")](**question)), flush=True)


def context_ids(num_tokens: int, vocab_size: int, seed: int = 0) -> list[int]:
    """A prompt of arbitrary ordinary token ids, the same for all contestants."""
    return [(7919 * (position + 1) + 104_729 * seed) % (vocab_size - 16) + 16 for position in range(num_tokens)]
