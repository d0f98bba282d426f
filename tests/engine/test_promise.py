"""The promised gap and the order of the queue, on a machine whose times are known: every step, every request."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vashista.engine.messages import SamplingParams, Submit
from vashista.engine.pace import LEAST_CHUNK, Pace, chunk_within
from vashista.engine.pages import PageAllocator, root_hash
from vashista.engine.request import PATIENCE_S, PRIORITY_SECONDS, Request
from vashista.engine.scheduler import Batch, BatchItem, Promise, Scheduler

PAGE, RUNNING, TOKENS = 4, 4, 64


class Machine:
    """A step takes a base, and so much for each token and for each token of its context."""

    def __init__(self, base: float = 1.0, token: float = 0.05, pair: float = 0.0005) -> None:
        self.base, self.token, self.pair = base, token, pair

    def step_s(self, items: list[BatchItem]) -> float:
        tokens = sum(item.num_tokens for item in items)
        pairs = sum(position + 1 for item in items for position in range(item.start, item.end))
        return self.base + self.token * tokens + self.pair * pairs

    def estimate(self) -> Estimate:
        return Estimate(self)


class Estimate:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._items: list[BatchItem] = []

    def add(self, item: BatchItem) -> None:
        self._items.append(item)

    def seconds(self, extra: BatchItem | None = None) -> float:
        return self._machine.step_s([*self._items, *([] if extra is None else [extra])])


class Bench:
    """A scheduler whose steps advance a clock."""

    def __init__(self, num_pages: int = 64, gap: float | None = 4.0, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()
        self.gap = gap
        promise = None if gap is None else Promise(Pace(gap), self.machine.estimate)
        self.scheduler = Scheduler(
            PageAllocator(num_pages),
            page_size=PAGE,
            max_running_requests=RUNNING,
            max_batch_tokens=TOKENS,
            promise=promise,
        )
        self.now = 0.0
        self.last_token_at: dict[str, float] = {}
        self.worst_gap = 0.0
        self.ended: dict[str, float] = {}
        self.started: list[str] = []

    def submit(
        self,
        name: str,
        length: int,
        max_tokens: int,
        *,
        priority: int = 0,
        deadline: float | None = None,
        word: int = -1,
    ) -> Request:
        prompt = [random.Random(name).randrange(1000) if word < 0 else word for _ in range(length)]
        submit = Submit(
            name,
            prompt,
            SamplingParams(seed=0, max_tokens=max_tokens),
            arrival_s=self.now,
            priority=priority,
            due_s=None if deadline is None else self.now + deadline,
        )
        request = Request(submit, root_hash("model"))
        self.scheduler.add(request)
        return request

    def step(self) -> Batch:
        batch = self.scheduler.schedule()
        seconds = self.machine.step_s(batch.items)
        self.now += seconds
        self.scheduler.complete(batch)
        for item in batch.items:
            request = item.request
            if request.id not in self.started:
                self.started.append(request.id)
            if request.num_computed_tokens < request.num_known_tokens:
                continue
            if request.id in self.last_token_at:
                self.worst_gap = max(self.worst_gap, self.now - self.last_token_at[request.id])
            self.last_token_at[request.id] = self.now
            request.token_ids.append(request.num_known_tokens)
            if request.num_output_tokens >= request.sampling.max_tokens:
                self.ended[request.id] = self.now
                self.scheduler.finish(request)
        self.scheduler.check()
        return batch

    def run(self, limit: int = 20_000) -> None:
        for _ in range(limit):
            if not list(self.scheduler.requests):
                return
            assert self.step().items, "requests are there, but nothing was scheduled"
        raise AssertionError("requests did not end")


@given(st.integers(0, 300), st.floats(0, 50), st.floats(0.001, 2))
def test_a_chunk_is_the_largest_that_fits(most: int, limit: float, each: float) -> None:
    def step_s(n: int) -> float:
        return 1.0 + each * n

    fitting = [n for n in range(1, most + 1) if step_s(n) <= limit]
    assert chunk_within(step_s, most, limit) == max(fitting, default=0)


def test_a_prompt_beside_a_stream_is_cut_to_the_promise_and_alone_it_is_not() -> None:
    bench = Bench()
    bench.submit("stream", 4, 60)
    bench.step()
    bench.submit("long", 150, 2)
    beside = bench.step()
    assert [item.request.id for item in beside.items] == ["stream", "long"]
    chunk = beside.items[1].num_tokens
    assert LEAST_CHUNK <= chunk < TOKENS - 1
    assert bench.machine.step_s(beside.items) <= 4.0
    beside.items[1].num_tokens += 1
    assert bench.machine.step_s(beside.items) > 4.0, "a larger chunk would have fitted"
    bench.scheduler.finish(bench.scheduler.get("stream"))  # type: ignore[arg-type]
    assert bench.step().items[0].num_tokens == TOKENS


def test_without_a_promise_chunks_are_whole() -> None:
    bench = Bench(gap=None)
    bench.submit("stream", 4, 60)
    bench.step()
    bench.submit("long", 150, 2)
    assert [item.num_tokens for item in bench.step().items] == [1, TOKENS - 1]


def test_a_request_that_would_break_the_promise_at_its_end_waits() -> None:
    bench = Bench(gap=3.0)
    bench.submit("stream", 4, 60)
    bench.step()
    bench.submit("huge", 200, 40)  # 240 tokens of context: fits alone, beside the stream a step would take 3.07
    bench.machine.pair = 0.005
    assert [item.request.id for item in bench.step().items] == ["stream"]
    bench.run()
    assert list(bench.ended) == ["stream", "huge"]


def test_under_a_promise_nobody_loses_pages() -> None:
    for gap, preempts in ((4.0, False), (None, True)):
        bench = Bench(num_pages=16, gap=gap)
        for name in "abc":
            bench.submit(name, 8, 30)
        bench.run()
        assert bool(bench.scheduler.num_preemptions_total) == preempts


def test_the_limit_follows_the_worst_of_late_and_comes_back() -> None:
    pace = Pace(1.0)
    pace.observe(0.5, 0.5)
    assert (pace.limit_s, pace.num_gaps_total, pace.num_broken_total) == (1.0, 1, 0)
    pace.observe(0.8, 1.2)
    assert pace.limit_s == pytest.approx(1 / 1.5)
    assert pace.num_broken_total == 1
    pace.observe(0.01, 0.03)  # a short step says little
    for _ in range(300):
        pace.observe(0.5, 0.5)
    assert pace.limit_s == pytest.approx(1.0, rel=0.01)


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 20), st.integers(-3, 3), st.integers(0, 12)),
        min_size=1,
        max_size=16,
    ),
    st.integers(24, 80),
)
@settings(max_examples=150, deadline=None)
def test_no_stream_waits_longer_than_promised(shapes: list[tuple[int, int, int, int]], num_pages: int) -> None:
    bench = Bench(num_pages=num_pages)
    for index, (length, max_tokens, priority, num_steps) in enumerate(shapes):
        bench.submit(f"{index:03}", length, max_tokens, priority=priority)
        for _ in range(num_steps):
            bench.step()
    bench.run()
    assert bench.worst_gap <= 4.0 + 1e-9
    assert bench.scheduler.num_preemptions_total == 0
    assert len(bench.ended) == len(shapes)


@pytest.mark.parametrize("gap", [None, 4.0])
@pytest.mark.parametrize(("newcomer", "ahead_s"), [({"priority": -2}, 0.0), ({"deadline": 20.0}, 20.0)])
def test_a_request_of_low_priority_runs_although_better_ones_keep_coming(
    gap: float | None, newcomer: dict[str, int], ahead_s: float
) -> None:
    """Twice as many better requests come as can run; those pass it that come `ahead_s` before it is due, no others."""
    assert PATIENCE_S - 2 * PRIORITY_SECONDS == 0.0
    bench = Bench(gap=gap)
    for number in range(RUNNING):
        bench.submit(f"first{number}", 20, 8)
    bench.step()
    low = bench.submit("low", 40, 8, priority=3)
    due = low.rank[0]
    came: dict[str, float] = {}
    while "low" not in bench.ended:
        name = f"new{len(came):05}"
        came[name] = bench.now
        bench.submit(name, 20, 8, **newcomer)  # type: ignore[arg-type]
        bench.step()
        assert bench.now < 1000, "starved"
    passed = [name for name in bench.started[: bench.started.index("low")] if name in came]
    assert passed == [name for name, came_at in came.items() if came_at + ahead_s <= due]


class PromiseMachine(RuleBasedStateMachine):
    """Requests of any priority and deadline come, leave and run; all that they are promised holds at every step."""

    @initialize(num_pages=st.integers(20, 60), gap=st.sampled_from([None, 3.0, 4.0]))
    def start(self, num_pages: int, gap: float | None) -> None:
        self.bench = Bench(num_pages, gap)
        self.num_submitted = 0
        self.bounds: dict[str, int] = {}
        self.num_steps = 0

    @rule(
        length=st.integers(1, 50),
        max_tokens=st.integers(1, 16),
        order=st.one_of(st.integers(-3, 3), st.floats(0, 200)),
        word=st.integers(-1, 1),
    )
    def submit(self, length: int, max_tokens: int, order: float, word: int) -> None:
        name = f"{self.num_submitted:04}"
        self.num_submitted += 1
        if isinstance(order, int):
            self.bench.submit(name, length, max_tokens, priority=order, word=word)
        else:
            self.bench.submit(name, length, max_tokens, deadline=order, word=word)
        requests = list(self.bench.scheduler.requests)
        # Whoever is first advances, or waits for what runs to end; nobody starts before the first who waits.
        worst = max(map(_num_steps, requests))
        for request in requests:
            before = [r for r in requests if r.rank <= request.rank]
            bound = self.num_steps + sum(_num_steps(r) + RUNNING * worst for r in before)
            self.bounds[request.id] = max(self.bounds.get(request.id, 0), bound)

    @rule(data=st.data())
    @precondition(lambda self: list(self.bench.scheduler.requests))
    def abort(self, data: st.DataObject) -> None:
        self.bench.scheduler.finish(data.draw(st.sampled_from(list(self.bench.scheduler.requests))))

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step()

    def _step(self) -> None:
        scheduler = self.bench.scheduler
        requests = sorted(scheduler.requests, key=lambda request: request.rank)
        waiting = [r for r in requests if not r.pages]
        batch = self.bench.step()
        self.num_steps += 1
        assert bool(batch.items) == bool(requests)
        items = {item.request.id for item in batch.items}
        if requests and requests[0].id not in items:
            assert requests[0] in waiting, "what runs and is of the first rank never stands still"
        if waiting and waiting[0].id not in items:
            shares = [r for r in waiting if r.id in items and r.token_ids[0] != waiting[0].token_ids[0]]
            assert not shares or _waits_for_shared_pages(waiting[0], requests), "passed by a request behind it"
        for request_id, bound in self.bounds.items():
            assert scheduler.get(request_id) is None or self.num_steps <= bound, "starved"

    @invariant()
    def promise_holds(self) -> None:
        if hasattr(self, "bench") and self.bench.gap is not None:
            assert self.bench.worst_gap <= self.bench.gap + 1e-9
            assert self.bench.scheduler.num_preemptions_total == 0

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            while list(self.bench.scheduler.requests):
                self._step()


def _num_steps(request: Request) -> int:
    """Steps that a request takes at most once it advances in each: preempted ones read what they said again."""
    tokens = request.num_tokens_at_most
    return -(-tokens // LEAST_CHUNK) + request.sampling.max_tokens + 1


def _waits_for_shared_pages(request: Request, requests: list[Request]) -> bool:
    return any(r is not request and r.pages and r.token_ids[:PAGE] == request.token_ids[:PAGE] for r in requests)


TestPromiseMachine = PromiseMachine.TestCase
TestPromiseMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
