"""Vashista's engine as a contestant: the same `Engine` that the engine process runs, in this process."""

from __future__ import annotations

import json
import sys
import time
from itertools import count
from typing import Any

from protocol import context_ids, serve

from vashista.engine.config import EngineConfig
from vashista.engine.engine import Engine
from vashista.engine.messages import SamplingParams, Submit


class Contestant:
    """Greedy decoding at batch 1, and batches."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._engine = Engine(
            EngineConfig(
                model_dir=settings["model_dir"],
                device="cpu",
                dtype={"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[settings["dtype"]],
                num_threads=settings["num_threads"],
                kv_cache_bytes=1 << 30,
            )
        )
        self._names = count()
        self.info = {"runtime": f"vashista, {self._engine.ready.device_name}", "dtype": self._engine.ready.dtype}

    def _submit(self, prompt: list[int], num_tokens: int, salt: str = "") -> str:
        name = str(next(self._names))
        sampling = SamplingParams(seed=0, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        self._engine.submit(Submit(name, prompt, sampling, time.monotonic(), cache_salt=salt))
        return name

    def greedy(self, prompt: list[int], num_tokens: int, salt: str = "") -> dict[str, Any]:
        """Tokens and seconds of one request."""
        begin_s = time.perf_counter()
        self._submit(prompt, num_tokens, salt)
        tokens: list[int] = []
        while self._engine.has_work:
            for event in self._engine.step():
                tokens += event.token_ids
        return {"tokens": tokens, "seconds": time.perf_counter() - begin_s}

    def decode(self, context: int, num_tokens: int) -> dict[str, Any]:
        """Seconds of each decode step behind a context; the context itself comes from the prefix cache when it can."""
        self._submit(context_ids(context, self._engine.ready.vocab_size), num_tokens + 1)
        while not any(event.token_ids for event in self._engine.step()):
            pass
        return {"step_s": [_seconds_of(self._engine.step) for _ in range(num_tokens)]}

    def batch(self, requests: list[tuple[list[int], int]]) -> dict[str, Any]:
        """Seconds from handing over all requests to the last token; nothing is taken from the prefix cache."""
        salt = str(next(self._names))
        begin_s = time.perf_counter()
        for index, (prompt, num_tokens) in enumerate(requests):
            self._submit(prompt, num_tokens, f"{salt}/{index}")
        num_tokens = 0
        while self._engine.has_work:
            num_tokens += sum(len(event.token_ids) for event in self._engine.step())
        return {"seconds": time.perf_counter() - begin_s, "num_tokens": num_tokens}


def _seconds_of(step: Any) -> float:
    begin_s = time.perf_counter()
    step()
    return time.perf_counter() - begin_s


if __name__ == "__main__":
    contestant = Contestant(json.loads(sys.argv[1]))
    serve(contestant.info, {"greedy": contestant.greedy, "decode": contestant.decode, "batch": contestant.batch})
