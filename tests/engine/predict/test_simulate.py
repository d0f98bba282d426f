"""The simulation against the scheduler itself, which is stepped token by token."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vashista.engine.messages import SamplingParams, SchedulerRules, Submit
from vashista.engine.pace import Pace
from vashista.engine.pages import PageAllocator, root_hash
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.features import COLD_KEEP, COUNTS, FEW_TOKENS, KNOTS, StepFeatures, computed, idle_of
from vashista.engine.predict.simulate import Job, Machine, Simulation
from vashista.engine.predict.timeline import Timeline
from vashista.engine.request import Request
from vashista.engine.scheduler import Batch, BatchItem, Promise, Scheduler
from vashista.engine.work import WorkModel

WORK = WorkModel(weights=1000.0, head=300.0, pair=4.0, windows=((None, 4),))
COSTS = StepCoefficients(
    base_s=1.0,
    per_token_s=[0.01 + 0.001 * index for index in range(len(KNOTS))],
    counts_s=[0.002, 0.003, 0.0, 0.0, 0.0, 1e-4, 2e-5, 0.0, 0.0, 0.8, 0.25, 0.7],
    gap_s=0.05,
)
PAGE = 4
PROMPT_ROWS = ((), (20,), (4, 8, 16, 36, 64))


class Estimate:
    """What the costs say of a step."""

    def __init__(self, prompt_rows: tuple[int, ...]) -> None:
        self._items: list[BatchItem] = []
        self._prompt_rows = prompt_rows

    def add(self, item: BatchItem) -> None:
        self._items.append(item)

    def seconds(self, extra: BatchItem | None = None) -> float:
        batch = Batch([*self._items, *([extra] if extra else [])])
        return COSTS.step_s(features(batch, self._prompt_rows)) + COSTS.gap_s


class RealQueue:
    """A scheduler whose steps take what the costs say; requests are (arrival, prompt tokens, output tokens)."""

    def __init__(self, rules: SchedulerRules, asked: list[tuple[float, int, int]]) -> None:
        self.scheduler = Scheduler(
            PageAllocator(rules.num_pages),
            page_size=rules.page_size,
            max_running_requests=rules.max_running_requests,
            max_batch_tokens=rules.max_batch_tokens,
            prefix_caching=rules.prefix_caching,
            promise=None
            if rules.max_token_gap_s is None
            else Promise(Pace(rules.max_token_gap_s), lambda: Estimate(rules.prompt_rows)),
        )
        self.prompt_rows = rules.prompt_rows
        self.now_s = 0.0
        self.cold = 0.0
        self.num_steps = 0
        self.first_s: dict[str, float] = {}
        self.end_s: dict[str, float] = {}
        self.busy_s: dict[str, float] = {}
        self.to_come = sorted((at, f"{index:03}", prompt, output) for index, (at, prompt, output) in enumerate(asked))

    def run(self) -> None:
        while self.to_come or list(self.scheduler.requests):
            while self.to_come and self.to_come[0][0] <= self.now_s:
                at_s, name, prompt, output = self.to_come.pop(0)
                tokens = [int(name) * 1000 + token for token in range(prompt)]
                sampling = SamplingParams(seed=0, max_tokens=output)
                self.scheduler.add(Request(Submit(name, tokens, sampling, arrival_s=at_s), root_hash("m")))
            if not list(self.scheduler.requests):
                self.now_s = self.to_come[0][0]
                continue
            self.step()

    def step(self) -> None:
        batch = self.scheduler.schedule()
        counts = features(batch, self.prompt_rows)
        if batch.num_tokens > FEW_TOKENS:
            self.cold = 1.0
        else:
            counts.cold, self.cold = self.cold, self.cold * COLD_KEEP
        seconds = COSTS.step_s(counts)
        self.share(batch, seconds)
        self.now_s += seconds + COSTS.gap_s
        self.num_steps += 1
        self.scheduler.complete(batch)
        for item in batch.items:
            request = item.request
            if item.is_caught_up:
                request.token_ids.append(7)
                self.first_s.setdefault(request.id, self.now_s)
                if request.num_output_tokens == request.sampling.max_tokens:
                    self.end_s[request.id] = self.now_s
                    self.scheduler.finish(request)

    def share(self, batch: Batch, seconds: float) -> None:
        works = {
            item.request.id: WORK.item(item.num_tokens, int(item.is_caught_up), WORK.dense_pairs(item.start, item.end))
            for item in batch.items
        }
        for name, work in works.items():
            self.busy_s[name] = self.busy_s.get(name, 0.0) + seconds * work / sum(works.values())


def features(batch: Batch, prompt_rows: tuple[int, ...]) -> StepFeatures:
    num_single = sum(item.num_tokens == 1 for item in batch.items)
    num_tokens, is_split = computed(num_single, batch.num_tokens - num_single, prompt_rows)
    found = StepFeatures(num_tokens, num_requests=len(batch.items))
    found.split = float(is_split)
    for item in batch.items:
        pairs = WORK.dense_pairs(item.start, item.end)
        found.num_rows += item.is_caught_up
        if item.is_generated:
            found.decode_pairs += pairs
        else:
            found.prompt_pairs += pairs
    return found


def costs_of() -> tuple[float, float, float, float]:
    return COSTS.count_s("num_rows") + COSTS.count_s("num_requests"), 4 * COSTS.count_s("decode_pairs"), 0.0, 4.0


def simulated(rules: SchedulerRules, asked: list[tuple[float, int, int]], own: int) -> Timeline:
    machine = Machine(rules, COSTS, WORK)
    simulation = Simulation(machine, start_s=0.0, num_free_pages=float(rules.num_pages), max_own_events=10_000)
    for index, (at_s, prompt, output) in enumerate(asked):
        job = Job(
            (at_s, f"{index:03}"),
            computed=0,
            known=prompt,
            remaining=output,
            costs=costs_of(),
            own_tokens=output if index == own else 0,
        )
        simulation.add_waiting(job, at_s)
    return simulation.run()


def simulated_alone(
    num_prompt: int, num_tokens: int, cold_s: float | None = None, cold: float = 0.0, idle: float = 0.0
) -> Timeline:
    """cold_s: of the costs, where they are to be others."""
    counts_s = list(COSTS.counts_s)
    if cold_s is not None:
        counts_s[COUNTS.index("cold")] = cold_s
    machine = Machine(rules_of(tokens=64), msgspec.structs.replace(COSTS, counts_s=counts_s), WORK)
    simulation = Simulation(machine, start_s=0.0, num_free_pages=1e4, cold=cold, idle=idle)
    job = Job((0.0, ""), computed=0, known=num_prompt, remaining=num_tokens, costs=costs_of(), own_tokens=num_tokens)
    simulation.add_waiting(job, 0.0)
    return simulation.run()


def rules_of(
    num_pages: int = 10_000,
    running: int = 4,
    tokens: int = 16,
    gap_s: float | None = None,
    prompt_rows: tuple[int, ...] = (),
) -> SchedulerRules:
    return SchedulerRules(
        page_size=PAGE,
        num_pages=num_pages,
        max_running_requests=running,
        max_batch_tokens=tokens,
        prefix_caching=False,
        max_token_gap_s=gap_s,
        prompt_rows=prompt_rows,
    )


requests = st.lists(st.tuples(st.floats(0.0, 60.0), st.integers(2, 60), st.integers(1, 40)), min_size=1, max_size=10)


@settings(max_examples=150, deadline=None)
@given(
    requests,
    st.integers(1, 4),
    st.integers(0, 9),
    st.sampled_from(
        [(64, 1.7, ()), *((*limits, rows) for limits in ((16, None), (64, None), (64, 1.9)) for rows in PROMPT_ROWS)]
    ),
)
def test_with_known_lengths_it_tells_what_the_scheduler_does(
    asked: list[tuple[float, int, int]],
    running: int,
    own: int,
    limits: tuple[int, float | None, tuple[int, ...]],
) -> None:
    """A promise of 1.7 s, or 1.9 s to padded steps, cuts prompts beside streams: a step with 60 tokens takes 2.2 s, or
    2.45 s split. None is so short that a request waits for it before it starts, which the simulation leaves out."""
    tokens, gap_s, prompt_rows = limits
    rules = rules_of(running=running, tokens=tokens, gap_s=gap_s, prompt_rows=prompt_rows)
    own %= len(asked)
    asked = sorted(asked)
    real = RealQueue(rules, asked)
    real.run()
    timeline = simulated(rules, asked, own)
    name, num_tokens = f"{own:03}", asked[own][2]
    assert timeline.first_s == pytest.approx(real.first_s[name], rel=1e-9)
    assert timeline.at(num_tokens)[0] == pytest.approx(real.end_s[name], rel=1e-9)
    # Shares are taken at the middle of each stretch, where they bend: 0.6 % off for 2 and 60 tokens that grow by 40.
    assert timeline.at(num_tokens)[1] == pytest.approx(real.busy_s[name], rel=1e-2)


@settings(max_examples=60, deadline=None)
@given(requests, st.integers(0, 9))
def test_where_pages_run_out_it_comes_near(asked: list[tuple[float, int, int]], own: int) -> None:
    rules = rules_of(num_pages=40)
    own %= len(asked)
    asked = sorted(asked)
    real = RealQueue(rules, asked)
    real.run()
    timeline = simulated(rules, asked, own)
    end_s = timeline.at(asked[own][2])[0]
    assert math.isfinite(end_s)
    assert abs(math.log(end_s / real.end_s[f"{own:03}"])) < math.log(3)


def test_steps_after_a_prompt_are_cold_also_within_a_stretch() -> None:
    """The timeline has two points then, and bends between them."""
    timeline = simulated(rules_of(tokens=64), [(0.0, 40, 60)], own=0)
    assert timeline.num_points == 2
    cold_s = COSTS.count_s("cold")
    for num_tokens in (2, 5, 30, 59):
        warm_s = simulated_alone(40, 60, cold_s=0.0).at(num_tokens)[0]
        left_s = cold_s * sum(COLD_KEEP**step for step in range(num_tokens - 1))
        # What each token of context adds is spread evenly over the stretch.
        assert timeline.at(num_tokens)[0] == pytest.approx(warm_s + left_s, rel=2e-3)


def test_what_was_read_before_leaves_its_cold_to_a_request_that_comes() -> None:
    first_s, second_s = (simulated_alone(4, 30, cold=cold).at(30)[0] for cold in (0.0, 1.0))
    assert second_s - first_s == pytest.approx(COSTS.count_s("cold") * sum(COLD_KEEP**step for step in range(30)))


def test_after_a_pause_the_first_step_takes_longer_and_no_other() -> None:
    busy, rested = (simulated_alone(150, 30, idle=idle) for idle in (0.0, idle_of(0.1)))
    more_s = COSTS.count_s("idle") * idle_of(0.1)
    assert 0.0 < more_s < COSTS.count_s("idle")
    assert rested.first_s - busy.first_s == pytest.approx(more_s)  # of three chunks
    assert rested.at(30)[0] - busy.at(30)[0] == pytest.approx(more_s)


def test_a_request_alone_takes_its_chunks_and_its_tokens() -> None:
    timeline = simulated(rules_of(), [(0.0, 40, 11)], own=0)
    assert timeline.num_steps == 3 + 10
    assert timeline.runs_s == 0.0


def test_newcomers_make_the_others_slower() -> None:
    def total_s(every_s: float) -> float:
        simulation = Simulation(Machine(rules_of(), COSTS, WORK), start_s=0.0, num_free_pages=1e4)
        job = Job((0.0, ""), computed=0, known=10, remaining=50, costs=costs_of(), own_tokens=50)
        simulation.add_waiting(job, 0.0)

        def newcomer(at_s: float) -> Job:
            return Job((at_s, "z"), computed=0, known=12, remaining=20, costs=costs_of())

        return simulation.run(every_s, newcomer).at(50)[0]

    assert total_s(5.0) > total_s(20.0) > total_s(math.inf)


def test_after_some_events_the_mean_pace_goes_on() -> None:
    def total_s(max_own_events: int) -> float:
        machine = Machine(rules_of(), COSTS, WORK)
        simulation = Simulation(machine, start_s=0.0, num_free_pages=1e4, max_own_events=max_own_events)
        job = Job((0.0, ""), computed=0, known=10, remaining=300, costs=costs_of(), own_tokens=300)
        simulation.add_waiting(job, 0.0)

        def newcomer(at_s: float) -> Job:
            return Job((at_s, "z"), computed=0, known=12, remaining=5, costs=costs_of())

        return simulation.run(8.0, newcomer).at(300)[0]

    assert total_s(32) == pytest.approx(total_s(10_000), rel=0.05)


def test_a_long_queue_is_told_without_going_through_all_of_it() -> None:
    source = random.Random(1)
    asked = [(0.0, source.randint(2, 60), source.randint(1, 40)) for _ in range(3000)]
    timeline = simulated(rules_of(), [*asked, (0.0, 10, 5)], own=3000)
    assert timeline.num_events < 1000
    assert math.isfinite(timeline.at(5)[0])
