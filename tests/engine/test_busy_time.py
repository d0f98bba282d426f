"""Shares of the busy time over random lives of requests: with aborts, failures, preemptions and sparse requests."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vashista.engine.busy_time import BusyTime
from vashista.engine.messages import DENSE, AttentionMode, SamplingParams, Submit
from vashista.engine.pages import PageAllocator, root_hash
from vashista.engine.predict.features import COLD_KEEP, idle_of
from vashista.engine.request import Request
from vashista.engine.scheduler import Batch, BatchItem, Scheduler
from vashista.engine.support import SpanSupport
from vashista.engine.work import WorkModel

MODEL = WorkModel(weights=1000.0, head=300.0, pair=4.0, windows=((None, 4), (16, 4)))
PAGE = 4


class FakeEngine:
    """The scheduler with a model that appends tokens; steps take random times."""

    def __init__(self, source: random.Random, num_pages: int) -> None:
        self.source = source
        self.scheduler = Scheduler(
            PageAllocator(num_pages), page_size=PAGE, max_running_requests=4, max_batch_tokens=12, prefix_caching=True
        )
        self.busy = BusyTime(MODEL)
        self.receipts: dict[str, float] = {}

    def submit(self, number: int) -> None:
        name = f"r{number}"
        sampling = SamplingParams(seed=0, max_tokens=self.source.randint(1, 12))
        attention = self.source.choice([DENSE, AttentionMode(token_budget=16)])
        prompt = [self.source.randint(0, 2) for _ in range(self.source.randint(1, 20))]
        submit = Submit(name, prompt, sampling, arrival_s=number, attention=attention)
        self.receipts[name] = 0.0
        self.scheduler.add(Request(submit, root_hash("m")))

    def step(self) -> Batch:
        batch = self.scheduler.schedule()
        if not batch.items:
            self.busy.rest()
            return batch
        support = {
            item.request.id: SpanSupport(0, 8, 8 * item.end, 0.0, 0.0, 0.0, [])
            for item in batch.items
            if item.request.is_sparse and item.is_generated
        }
        works = self.busy.weigh(batch, support)
        self.scheduler.complete(batch)
        for item in batch.items:
            if item.is_caught_up:
                item.request.token_ids.append(1)
                if item.request.num_output_tokens >= item.request.sampling.max_tokens or self.source.random() < 0.05:
                    self.scheduler.finish(item.request)  # ended, or failed
        self.busy.book(works, self.source.expovariate(100.0))
        for name, share in self.busy.shares.items():
            self.receipts[name] += share
        return batch

    def abort(self) -> None:
        requests = list(self.scheduler.requests)
        if requests:
            self.scheduler.finish(self.source.choice(requests))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(9, 30))
def test_the_shares_of_all_requests_add_up_to_the_busy_time(seed: int, num_pages: int) -> None:
    engine = FakeEngine(random.Random(seed), num_pages)
    for number in range(12):
        engine.submit(number)
        for _ in range(engine.source.randint(0, 3)):
            engine.step()
        if engine.source.random() < 0.3:
            engine.abort()
        assert math.isclose(sum(engine.receipts.values()), engine.busy.total_s, rel_tol=1e-9)
    while list(engine.scheduler.requests):
        engine.step()
    assert math.isclose(sum(engine.receipts.values()), engine.busy.total_s, rel_tol=1e-9)
    assert engine.busy.total_s > 0


def test_preempted_requests_pay_for_what_is_computed_again() -> None:
    engine = FakeEngine(random.Random(3), num_pages=9)
    for number in range(12):
        engine.submit(number)
    while list(engine.scheduler.requests):
        engine.step()
    assert engine.scheduler.num_preemptions_total > 0
    assert math.isclose(sum(engine.receipts.values()), engine.busy.total_s, rel_tol=1e-9)


def test_a_step_is_divided_by_work_and_not_by_head() -> None:
    engine = FakeEngine(random.Random(0), num_pages=30)
    for name, length in (("short", 1), ("long", 11)):
        submit = Submit(name, list(range(length)), SamplingParams(seed=0, max_tokens=1), arrival_s=0.0)
        engine.scheduler.add(Request(submit, root_hash("m")))
    batch = engine.scheduler.schedule()
    works = engine.busy.weigh(batch, {})
    engine.busy.book(works, 1.0)
    # 1000 a token, 300 for logits, 4 for each of 8 heads and each token seen.
    assert works == {"short": 1000 + 300 + 4 * 8, "long": 11000 + 300 + 4 * 8 * 66}
    assert math.isclose(engine.busy.shares["short"], 1332 / (1332 + 13412))


def test_steps_after_a_prompt_are_counted_as_cold_and_ever_less() -> None:
    engine = FakeEngine(random.Random(0), num_pages=30)
    seen = []
    for name, length in (("long", 11), ("short", 2)):
        submit = Submit(name, list(range(length)), SamplingParams(seed=0, max_tokens=3), arrival_s=0.0)
        engine.scheduler.add(Request(submit, root_hash("m")))
        while list(engine.scheduler.requests):
            batch = engine.scheduler.schedule()
            engine.busy.weigh(batch, {})
            seen.append((batch.num_tokens, engine.busy.features.cold))
            engine.scheduler.complete(batch)
            request = batch.items[0].request
            request.token_ids.append(1)
            if request.num_output_tokens == 3:
                engine.scheduler.finish(request)
    # Two tokens are a prompt that fits beside the weights.
    assert [count for count, _ in seen] == [11, 1, 1, 2, 1, 1]
    assert [cold for _, cold in seen] == [0.0, *(COLD_KEEP**step for step in range(5))]
    assert engine.busy.cold == pytest.approx(COLD_KEEP**5)


def test_prompts_count_as_what_they_are_padded_to() -> None:
    prompts = [Request(Submit(name, [1] * 90, SamplingParams(seed=0, max_tokens=3), arrival_s=0.0), root_hash("m"))
               for name in "abc"]  # fmt: skip
    stream, more = BatchItem(prompts[0], 89, 1), BatchItem(prompts[1], 0, 30)
    for rows, items, count in (
        ((16, 64), [more], 64), ((16, 64), [more, stream], 65), ((16, 64), [more, BatchItem(prompts[2], 0, 35)], 65),
        ((16, 30), [more], 30), ((16, 64), [stream], 1), ((), [more, stream], 31),
    ):  # fmt: skip
        busy = BusyTime(MODEL, rows)
        busy.weigh(Batch(items), {})
        assert busy.features.num_tokens == count


def test_steps_of_streams_and_short_prompts_are_counted_as_split_and_those_after_a_pause_as_idle() -> None:
    requests = []
    for name, length in (("stream", 4), ("prompt", 6)):
        submit = Submit(name, list(range(length)), SamplingParams(seed=0, max_tokens=3), arrival_s=0.0)
        requests.append(Request(submit, root_hash("m")))
    stream, prompt = (BatchItem(requests[0], 3, 1), BatchItem(requests[1], 0, 6))
    for rows, items, split in (
        ((6,), [stream, prompt], 1.0), ((5,), [stream, prompt], 0.0), ((6,), [stream], 0.0), ((6,), [prompt], 0.0),
    ):  # fmt: skip
        busy = BusyTime(MODEL, rows)
        busy.weigh(Batch(items), {}, pause_s=0.5)
        assert (busy.features.split, busy.features.idle) == (split, idle_of(0.5))
        busy.weigh(Batch(items), {})
        assert busy.features.idle == 0.0


def test_a_step_without_requests_leaves_no_shares() -> None:
    engine = FakeEngine(random.Random(0), num_pages=30)
    engine.submit(0)
    engine.step()
    assert engine.busy.shares
    engine.busy.rest()
    assert engine.busy.shares == {}


def test_logits_of_a_whole_prompt_are_paid_by_who_asked() -> None:
    engine = FakeEngine(random.Random(0), num_pages=30)
    submit = Submit("r", list(range(5)), SamplingParams(seed=0, max_tokens=1, prompt_logprobs=1), arrival_s=0.0)
    engine.scheduler.add(Request(submit, root_hash("m")))
    batch = engine.scheduler.schedule()
    alone = engine.busy.weigh(batch, {})["r"]
    assert engine.busy.weigh(batch, {}, lambda item: True)["r"] == alone + 4 * 300
