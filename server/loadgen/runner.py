"""Runs loads: looks at the server, prepares prompts, warms up, then sends each load point's requests and collects them.

`commands/bench.py` makes a Plan and calls `run_plan`; each finished point goes to `report.py`. Two kinds of load:

- closed loop: `concurrency` clients, each sends its next request when its last one has ended. Shows capacity; hides
  queueing, since a slow server is asked less often.
- open loop: requests arrive as a Poisson process of `rate` per second, whatever the server does. Arrival times are
  drawn beforehand, and latencies are given from them too, so a client that falls behind cannot make the server look
  better (coordinated omission).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Literal

import msgspec

from vashista.engine.errors import WarmUpFailedError
from vashista.server.loadgen.client import OpenAIClient, Prompt, RequestShape
from vashista.server.loadgen.outcome import Outcome
from vashista.server.loadgen.statistics import Limits, Summary, summarize
from vashista.server.loadgen.workload import Workload


class LoadPoint(msgspec.Struct, frozen=True):
    """One load to put on the server."""

    kind: Literal["closed", "open"]
    level: float
    """Concurrent clients in closed loop; requests per second in open loop."""
    num_requests: int | None
    """None: go on for `duration_s`."""
    duration_s: float | None
    """No request is sent later than this; those in flight then are waited for."""

    @property
    def label(self) -> str:
        """Short name for tables and bars."""
        return f"c={self.level:g}" if self.kind == "closed" else f"{self.level:g}/s"


class PointResult(msgspec.Struct, frozen=True):
    """What came of one load point."""

    point: LoadPoint
    summary: Summary
    outcomes: list[Outcome]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run against one server."""

    shape: RequestShape
    points: list[LoadPoint]
    limits: Limits | None
    num_warmup: int
    seed: int
    max_in_flight: int | None = None
    """Open loop: no more requests at once; the others wait in the client, and that wait is shown."""


class Watcher(msgspec.Struct, frozen=True):
    """Told what happens while a run goes on; the defaults keep quiet."""

    on_prepare: Callable[[LoadPoint, int, int], None] = lambda point, done, total: None
    on_begin: Callable[[LoadPoint], None] = lambda point: None
    on_outcome: Callable[[Outcome], None] = lambda outcome: None
    on_end: Callable[[PointResult], None] = lambda result: None


async def run_plan(client: OpenAIClient, workload: Workload, plan: Plan, watcher: Watcher) -> list[PointResult]:
    """Warm up and run every point. Raises WarmUpFailedError."""
    await warm_up(client, workload, plan)
    results = []
    for index, point in enumerate(plan.points):
        rng = random.Random(f"{plan.seed}/{index}")
        run = PointRun(client, workload, plan, point, rng)
        await run.prepare(watcher.on_prepare)
        watcher.on_begin(point)
        results.append(await run.execute(watcher.on_outcome))
        watcher.on_end(results[-1])
    return results


async def warm_up(client: OpenAIClient, workload: Workload, plan: Plan) -> None:
    """Send requests that are not measured, all at once."""
    rng = random.Random(f"{plan.seed}/warmup")
    prompts = [await workload.draw(rng) for _ in range(plan.num_warmup)]
    outcomes = [Outcome(index=index, intended_s=0.0) for index in range(len(prompts))]
    origin_s = time.perf_counter()
    await asyncio.gather(
        *(client.send(plan.shape, *pair, origin_s=origin_s) for pair in zip(prompts, outcomes, strict=True))
    )
    failed = [outcome for outcome in outcomes if not outcome.is_ok]
    if failed:
        raise WarmUpFailedError(
            f"{len(failed)} of {len(outcomes)} warm-up requests failed; the first with {failed[0].error_code}: "
            f"{failed[0].error_message}"
        )


class PointRun:
    """One load point on its way."""

    def __init__(
        self, client: OpenAIClient, workload: Workload, plan: Plan, point: LoadPoint, rng: random.Random
    ) -> None:
        self._client = client
        self._workload = workload
        self._plan = plan
        self._point = point
        self._rng = rng
        self._prompts: list[Prompt] = []
        self._arrivals_s: list[float] = []
        self._outcomes: list[Outcome] = []
        self._origin_s = 0.0

    async def prepare(self, on_prepare: Callable[[LoadPoint, int, int], None]) -> None:
        """Draw arrivals and prompts, so that nothing is computed or asked for while the load runs.

        A closed loop over a duration needs an unknown number: two prompts a client are ready at its start, and the
        others are made while it runs, always that far ahead.
        """
        point = self._point
        if point.kind == "open":
            self._arrivals_s = draw_arrivals(point, self._rng)
        total = self._num_ahead if self._is_endless else len(self._arrivals_s) or point.num_requests or 0
        for done in range(total):
            self._prompts.append(await self._workload.draw(self._rng))
            on_prepare(point, done + 1, total)

    async def execute(self, on_outcome: Callable[[Outcome], None]) -> PointResult:
        """Run the load to its end and reduce it."""
        self._origin_s = time.perf_counter()
        await (self._run_open(on_outcome) if self._point.kind == "open" else self._run_closed(on_outcome))
        elapsed_s = self._now()
        self._outcomes.sort(key=lambda outcome: outcome.index)
        summary = summarize(self._outcomes, self._plan.limits, elapsed_s=elapsed_s)
        return PointResult(self._point, summary, self._outcomes)

    @property
    def _is_endless(self) -> bool:
        return self._point.kind == "closed" and self._point.num_requests is None

    @property
    def _num_ahead(self) -> int:
        return 2 * int(self._point.level)

    def _now(self) -> float:
        return time.perf_counter() - self._origin_s

    async def _send(self, prompt: Prompt, outcome: Outcome, on_outcome: Callable[[Outcome], None]) -> None:
        await self._client.send(self._plan.shape, prompt, outcome, origin_s=self._origin_s)
        self._outcomes.append(outcome)
        on_outcome(outcome)

    async def _run_closed(self, on_outcome: Callable[[Outcome], None]) -> None:
        feed = PromptFeed(self._prompts, self._draw if self._is_endless else None)

        async def work() -> None:
            while self._point.duration_s is None or self._now() < self._point.duration_s:
                entry = await feed.take()
                if entry is None:
                    return
                index, prompt = entry
                await self._send(prompt, Outcome(index=index, intended_s=self._now()), on_outcome)

        try:
            await _gather(work() for _ in range(int(self._point.level)))
        finally:
            await feed.close()

    async def _run_open(self, on_outcome: Callable[[Outcome], None]) -> None:
        gate = asyncio.Semaphore(self._plan.max_in_flight or len(self._prompts))

        async def work(index: int, prompt: Prompt, arrival_s: float) -> None:
            await asyncio.sleep(max(0.0, arrival_s - self._now()))
            async with gate:
                await self._send(prompt, Outcome(index=index, intended_s=arrival_s), on_outcome)

        pairs = zip(self._prompts, self._arrivals_s, strict=True)
        await _gather(work(index, prompt, arrival_s) for index, (prompt, arrival_s) in enumerate(pairs))

    async def _draw(self) -> Prompt:
        return await self._workload.draw(self._rng)


class PromptFeed:
    """Hands each prompt to one client. With `draw` it never runs dry: for each one taken another one is made."""

    def __init__(self, prompts: list[Prompt], draw: Callable[[], Awaitable[Prompt]] | None) -> None:
        self._ready: deque[Prompt | asyncio.Task[Prompt]] = deque(prompts)
        self._draw = draw
        self._lock = asyncio.Lock()
        self._num_taken = 0

    async def take(self) -> tuple[int, Prompt] | None:
        """(index, prompt), or None when there are no more. Raises what drawing raised."""
        if not self._ready:
            return None
        index, entry = self._num_taken, self._ready.popleft()
        self._num_taken += 1
        if self._draw is not None:
            self._ready.append(asyncio.create_task(self._draw_in_turn(self._draw)))
        return index, await entry if isinstance(entry, asyncio.Task) else entry

    async def close(self) -> None:
        """Stop making prompts."""
        tasks = [entry for entry in self._ready if isinstance(entry, asyncio.Task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _draw_in_turn(self, draw: Callable[[], Awaitable[Prompt]]) -> Prompt:
        async with self._lock:  # one random source: in turn, so that the same seed makes the same prompts
            return await draw()


def draw_arrivals(point: LoadPoint, rng: random.Random) -> list[float]:
    """Arrival times of a Poisson process in seconds: `num_requests` of them, or those before `duration_s`."""
    arrivals: list[float] = []
    now = 0.0
    while point.num_requests is None or len(arrivals) < point.num_requests:
        now += rng.expovariate(point.level)
        if point.duration_s is not None and now >= point.duration_s:
            break
        arrivals.append(now)
    return arrivals


async def _gather(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; when one raises, cancel the others and raise its exception itself."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
