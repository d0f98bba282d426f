"""The contest: who takes part, taking turns, and the figures of many rounds.

`run.py` makes one Contest; `parts.py` measures with it. A contestant is named by runtime and dtype:
"vashista f32".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol import Worker
from tqdm import tqdm

RIVALS = {
    "f32": ("llama.cpp f32", "llama.cpp f32 flash", "transformers f32"),
    "bf16": ("llama.cpp bf16", "llama.cpp bf16 flash", "llama.cpp f16", "llama.cpp f16 flash", "transformers bf16"),
}
"""Whom ours of a dtype is compared with. llama.cpp keeps keys and values in the type of its weights; `flash` is its
flash attention, which is faster or slower with the context: both are measured, and the faster one counts."""


class Contest:
    """Settings, contestants and results of a run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.vocab_size = json.loads((Path(options.model_dir) / "config.json").read_text())["vocab_size"]
        self.results: dict[str, Any] = {"machine": machine(), "options": vars(options), "contestants": {}}
        self._workers: dict[str, Worker] = {}

    def worker(self, name: str) -> Worker:
        """The contestant `name`: vashista DTYPE, transformers DTYPE, or llama.cpp DTYPE; started when first used."""
        if name not in self._workers:
            self._workers[name] = self._start(name)
            self.results["contestants"][name] = self._workers[name].info
        return self._workers[name]

    def release(self, name: str) -> None:
        """End one contestant."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.close()

    def close(self) -> None:
        """End all contestants."""
        for name in list(self._workers):
            self.release(name)

    def _start(self, name: str) -> Worker:
        runtime, dtype, *flags = name.split()
        settings = {"num_threads": self.options.threads, "model_dir": self.options.model_dir, "dtype": dtype}
        if runtime != "llama.cpp":
            return Worker(name, sys.executable, f"{runtime}_worker.py", settings)
        settings |= {
            "gguf": str(self._gguf(dtype)),
            "kv_dtype": dtype,
            "flash_attention": "flash" in flags,
            "max_context": max(self.options.contexts) + 256,
        }
        return Worker(name, self.options.llama_python, "llama_worker.py", settings)

    def _gguf(self, dtype: str) -> Path:
        path = self.folder / f"{dtype}.gguf"
        if not path.exists():
            script = Path(__file__).with_name("gguf_export.py")
            subprocess.run([self.options.llama_python, script, self.options.model_dir, path, dtype], check=True)
        return path


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    model = {key.strip(): value.strip() for key, value in info.items()}.get("model name", platform.processor())
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def interleave(contest: Contest, label: str, measures: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Call each measure once a round, in a rotating order, after one round that does not count."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    for index in tqdm(range(contest.options.rounds + 1), desc=label, leave=False, file=sys.stderr):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            value = measures[name]()
            if index:
                values[name].append(value)
    return values


def spread(values: list[float], form: str = ".1f") -> str:
    """Median, and least to greatest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratio(values: list[float], others: list[float]) -> float:
    """Median of the ratios of each round."""
    return statistics.median(one / other for one, other in zip(values, others, strict=True))
