"""The parts that need the running server: what HTTP adds to a completion, 64 streams at once, time until ready.

Called by `run.py`. The server is started as an operator starts it; requests come from the client of
`vashista bench serve`, whose own cost a chunk is in bench/loadgen_overhead.py.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from vashista.server.loadgen.client import OpenAIClient, Prompt, RequestShape
from vashista.server.loadgen.connection import ConnectionPool, Endpoint
from vashista.server.loadgen.outcome import Outcome
from vashista.server.loadgen.runner import LoadPoint, Plan, PointResult, Watcher, run_plan
from vashista.server.loadgen.target import find_model

START_LIMIT_S = 120.0


class Server:
    """`vashista serve` on a free port, with a state folder of its own; ended at the end of the with block."""

    def __init__(self, model_dir: str, num_threads: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._state = tempfile.TemporaryDirectory()
        self._command = [
            *(str(Path(sys.executable).with_name("vashista")), "serve", "--model", model_dir),
            *("--port", str(self.port), "--state-dir", self._state.name, "--device", "cpu", "--dtype", "float32"),
            *("--num-threads", str(num_threads), "--kv-cache-bytes", "1GiB", "--log-level", "warning"),
        ]
        self.ready_s = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("VASHISTA_")}
        begin_s = time.perf_counter()
        self._process = subprocess.Popen(self._command, env=environment, stdout=subprocess.DEVNULL)
        while not self._is_ready():
            if self._process.poll() is not None or time.perf_counter() - begin_s > START_LIMIT_S:
                self.__exit__(None, None, None)
                raise RuntimeError(f"the server did not become ready: {' '.join(self._command)}")
            time.sleep(0.01)
        self.ready_s = time.perf_counter() - begin_s
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        self._state.cleanup()

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


class HttpClient:
    """Requests from token ids, one at a time or many at once."""

    def __init__(self, url: str) -> None:
        self._endpoint = Endpoint.parse(url)

    async def _with_client(self, work: Any) -> Any:
        pool = ConnectionPool(self._endpoint, api_key=None)
        try:
            client = OpenAIClient(pool, timeout_s=600)
            return await work(client, await find_model(client, None))
        finally:
            pool.close()

    def complete(self, prompt: list[int], num_tokens: int, *, salt: str, is_streaming: bool) -> float:
        """Seconds of one completion, as the client sees it. Raises RuntimeError when it fails."""

        async def work(client: OpenAIClient, model: str) -> float:
            extra = {"prompt": prompt, "cache_salt": salt}
            shape = RequestShape(model=model, endpoint="completions", is_streaming=is_streaming, extra_body=extra)
            outcome = Outcome(index=0, intended_s=0.0)
            await client.send(shape, Prompt(num_tokens, text=""), outcome, origin_s=time.perf_counter())
            if not outcome.is_ok or outcome.num_output_tokens != num_tokens:
                raise RuntimeError(f"the completion failed: {outcome.error_code} {outcome.error_message}")
            return outcome.e2e_s

        return float(asyncio.run(self._with_client(work)))

    def sustain(self, num_streams: int, num_requests: int, num_prompt_words: int, num_tokens: int) -> PointResult:
        """Closed loop of so many streams."""

        async def work(client: OpenAIClient, model: str) -> PointResult:
            plan = Plan(
                shape=RequestShape(model=model, endpoint="completions"),
                points=[LoadPoint("closed", num_streams, num_requests, None)],
                limits=None,
                num_warmup=1,
                seed=1,
            )
            workload = _RandomNumbers(num_prompt_words, num_tokens)
            (result,) = await run_plan(client, workload, plan, Watcher())
            return result

        result = asyncio.run(self._with_client(work))
        assert isinstance(result, PointResult)
        return result


class _RandomNumbers:
    """Short prompts that differ."""

    def __init__(self, num_words: int, num_tokens: int) -> None:
        self._num_words = num_words
        self._num_tokens = num_tokens

    async def draw(self, rng: random.Random) -> Prompt:
        words = (str(rng.randrange(10)) for _ in range(self._num_words))
        return Prompt(self._num_tokens, text=" ".join(words))
