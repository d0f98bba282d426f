"""The scheduler without a GPU or torch: a fake model that appends tokens, and properties that hold at every step."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vashista.engine.messages import DENSE, AttentionMode, SamplingParams, Submit
from vashista.engine.pages import PageAllocator, root_hash
from vashista.engine.request import PATIENCE_S, PRIORITY_SECONDS, Request, Status
from vashista.engine.scheduler import Batch, Scheduler

PAGE = 4


def make_scheduler(num_pages: int = 32, running: int = 4, tokens: int = 16, caching: bool = True) -> Scheduler:
    return Scheduler(
        PageAllocator(num_pages),
        page_size=PAGE,
        max_running_requests=running,
        max_batch_tokens=tokens,
        prefix_caching=caching,
    )


SPARSE = AttentionMode(token_budget=16)


def make_request(
    name: str,
    prompt: list[int],
    max_tokens: int,
    arrival: float = 0.0,
    priority: int = 0,
    attention: AttentionMode = DENSE,
    due: float | None = None,
) -> Request:
    sampling = SamplingParams(seed=0, max_tokens=max_tokens)
    submit = Submit(name, prompt, sampling, arrival_s=arrival, priority=priority, attention=attention, due_s=due)
    return Request(submit, root_hash("model", salt=submit.cache_salt))


def run_step(scheduler: Scheduler) -> Batch:
    """One step of a model whose next token is the context length."""
    batch = scheduler.schedule()
    assert batch.num_tokens <= scheduler.max_batch_tokens
    assert len({item.request.id for item in batch.items}) == len(batch.items)
    for item in batch.items:
        assert item.start == item.request.num_computed_tokens
        assert item.num_tokens > 0
        assert item.end <= len(item.request.pages) * PAGE
        assert item.end <= item.request.num_known_tokens
        if item.request.is_sparse:
            num_prompt = item.request.num_prompt_tokens
            assert item.end <= num_prompt or item.num_tokens == 1, "a generated token attends alone"
    scheduler.complete(batch)
    for item in batch.items:
        request = item.request
        if request.num_computed_tokens == request.num_known_tokens:
            request.token_ids.append(request.num_known_tokens)
            if request.num_output_tokens >= request.sampling.max_tokens:
                scheduler.finish(request)
    scheduler.check()
    return batch


def run_all(scheduler: Scheduler, limit: int = 10_000) -> int:
    for step in range(limit):
        if not list(scheduler.requests):
            return step
        assert run_step(scheduler).items, "requests are there, but nothing was scheduled"
    raise AssertionError("requests did not end")


def test_a_long_prompt_is_computed_in_chunks_while_others_keep_decoding() -> None:
    scheduler = make_scheduler(tokens=8)
    scheduler.add(make_request("short", [1, 2], 20))
    run_step(scheduler)
    scheduler.add(make_request("long", list(range(40)), 2, arrival=1.0))
    for _ in range(5):
        batch = run_step(scheduler)
        assert batch.items[0].request.id == "short"
        assert batch.items[1].num_tokens == 7


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler = make_scheduler()
    prompt = list(range(10))
    scheduler.add(make_request("a", prompt, 2))
    run_all(scheduler)
    second = make_request("b", [*prompt, 99], 2)
    scheduler.add(second)
    batch = run_step(scheduler)
    assert (second.num_cached_tokens, batch.num_tokens) == (8, 3)


def test_the_last_prompt_token_is_computed_even_if_every_page_is_cached() -> None:
    scheduler = make_scheduler()
    prompt = list(range(8))
    scheduler.add(make_request("a", prompt, 1))
    run_all(scheduler)
    second = make_request("b", prompt, 1)
    scheduler.add(second)
    assert run_step(scheduler).num_tokens == 4
    assert second.num_cached_tokens == 4


def test_two_equal_prompts_at_once_are_computed_once() -> None:
    scheduler = make_scheduler(tokens=64)
    prompt = list(range(20))
    first, second = make_request("a", prompt, 2), make_request("b", prompt, 2, arrival=1.0)
    scheduler.add(first)
    scheduler.add(second)
    assert [item.request.id for item in run_step(scheduler).items] == ["a"]
    run_step(scheduler)
    assert second.num_cached_tokens == 16


def test_another_salt_shares_nothing() -> None:
    scheduler = make_scheduler()
    prompt = list(range(10))
    scheduler.add(make_request("a", prompt, 1))
    run_all(scheduler)
    other = Request(Submit("b", prompt, SamplingParams(seed=0, max_tokens=1), 0.0), root_hash("model", salt="mine"))
    scheduler.add(other)
    run_step(scheduler)
    assert other.num_cached_tokens == 0


def test_prompt_logprobs_read_no_cache() -> None:
    scheduler = make_scheduler()
    prompt = list(range(10))
    scheduler.add(make_request("a", prompt, 1))
    run_all(scheduler)
    sampling = SamplingParams(seed=0, max_tokens=1, prompt_logprobs=0)
    request = Request(Submit("b", prompt, sampling, 0.0), root_hash("model"))
    scheduler.add(request)
    assert run_step(scheduler).num_tokens == 10


def test_what_a_sparse_request_generates_is_not_shared() -> None:
    scheduler = make_scheduler()
    first = make_request("a", list(range(6)), 8, attention=SPARSE)
    scheduler.add(first)
    run_all(scheduler)
    for name, attention in (("dense", DENSE), ("sparse", SPARSE)):
        follower = make_request(name, [*first.token_ids, 99], 1, attention=attention)
        scheduler.add(follower)
        run_step(scheduler)
        assert follower.num_cached_tokens == 4, "the one full page of the prompt"
        run_all(scheduler)
        scheduler = make_scheduler()
        scheduler.add(again := make_request("b", list(range(6)), 8, attention=SPARSE))
        run_all(scheduler)
        assert again.token_ids == first.token_ids


def test_a_request_does_not_wait_for_pages_that_a_sparse_one_will_not_share() -> None:
    scheduler = make_scheduler(tokens=64)
    first = make_request("a", list(range(6)), 20, attention=SPARSE)
    scheduler.add(first)
    for _ in range(8):
        run_step(scheduler)
    second = make_request("b", [*first.token_ids, 50, 51], 2, arrival=1.0)
    scheduler.add(second)
    assert "b" in [item.request.id for item in run_step(scheduler).items]


def test_the_last_ranked_request_is_preempted_and_resumes() -> None:
    scheduler = make_scheduler(num_pages=6, caching=False)
    first, second = make_request("a", list(range(8)), 12), make_request("b", list(range(50, 58)), 12, arrival=1.0)
    scheduler.add(first)
    scheduler.add(second)
    preempted = []
    while list(scheduler.requests):
        preempted += [request.id for request in run_step(scheduler).preempted]
    assert "b" in preempted
    assert "a" not in preempted
    assert first.token_ids == [*range(8), *range(8, 20)]
    assert second.token_ids == [*range(50, 58), *range(8, 20)]
    assert scheduler.num_preemptions_total == len(preempted)


def test_a_better_priority_goes_first_but_is_worth_only_so_much_waiting() -> None:
    ordinary = make_request("ordinary", [1], 1, arrival=0.0)
    urgent = make_request("urgent", [1], 1, arrival=1.0, priority=-1)
    later = make_request("later", [1], 1, arrival=PRIORITY_SECONDS + 1.0, priority=-1)
    assert urgent.rank < ordinary.rank < later.rank


def test_a_deadline_takes_the_place_that_a_priority_would_give() -> None:
    ordinary = make_request("ordinary", [1], 1, arrival=0.0)
    soon = make_request("soon", [1], 1, arrival=1.0, due=PATIENCE_S - 1.0)
    late = make_request("late", [1], 1, arrival=0.0, priority=-1000, due=PATIENCE_S + 1.0)
    assert soon.rank < ordinary.rank < late.rank


@pytest.mark.parametrize("state", ["waiting", "running"])
def test_an_aborted_request_gives_its_pages_back_at_once(state: str) -> None:
    scheduler = make_scheduler(caching=False)
    request = make_request("a", list(range(10)), 5)
    scheduler.add(request)
    if state == "running":
        run_step(scheduler)
        assert scheduler.pages.num_held
    scheduler.finish(request)
    assert scheduler.pages.num_held == 0
    assert request.status is Status.FINISHED
    scheduler.check()


@given(
    st.integers(6, 20),
    st.integers(1, 6),
    st.booleans(),
    st.lists(
        st.tuples(st.integers(1, 14), st.integers(1, 8), st.integers(-1, 1), st.sampled_from([DENSE, SPARSE])),
        min_size=1,
        max_size=14,
    ),
    st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_everything_ends_with_the_tokens_it_gets_alone(
    num_pages: int, running: int, caching: bool, shapes: list[tuple[int, int, int, AttentionMode]], seed: int
) -> None:
    source = random.Random(seed)
    scheduler = make_scheduler(num_pages, running, max(running, 8), caching)
    requests = []
    for index, (length, max_tokens, priority, attention) in enumerate(shapes):
        prompt = [source.randrange(2) for _ in range(length)]
        request = make_request(str(index), prompt, max_tokens, float(index), priority, attention)
        requests.append((request, prompt))
        scheduler.add(request)
        if source.random() < 0.5:
            run_step(scheduler)
    run_all(scheduler)
    for (request, prompt), (length, max_tokens, _, _) in zip(requests, shapes, strict=True):
        assert request.token_ids == prompt + list(range(length, length + max_tokens))
    assert scheduler.pages.num_held == 0


class SchedulerMachine(RuleBasedStateMachine):
    """Submits, aborts and steps in any order; the first-ranked request advances whenever a step is made."""

    @initialize(num_pages=st.integers(4, 16), running=st.integers(1, 4), caching=st.booleans())
    def start(self, num_pages: int, running: int, caching: bool) -> None:
        self.scheduler = make_scheduler(num_pages, running, 8, caching)
        self.num_submitted = 0

    @rule(length=st.integers(1, 10), max_tokens=st.integers(1, 6), content=st.integers(0, 1))
    def submit(self, length: int, max_tokens: int, content: int) -> None:
        request = make_request(
            f"{self.num_submitted:04}", [content] * length, max_tokens, arrival=float(self.num_submitted)
        )
        self.num_submitted += 1
        self.scheduler.add(request)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        requests = list(self.scheduler.requests)
        if requests:
            self.scheduler.finish(data.draw(st.sampled_from(requests)))

    @rule()
    def step(self) -> None:
        requests = sorted(self.scheduler.requests, key=lambda request: request.rank)
        batch = run_step(self.scheduler)
        assert bool(batch.items) == bool(requests)
        if requests:
            assert requests[0] not in batch.preempted, "the first-ranked request lost its pages"
            assert any(item.request is requests[0] for item in batch.items), "the first-ranked request stood still"

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            run_all(self.scheduler)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
