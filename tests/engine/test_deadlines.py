"""Requests that cannot be done by their deadline: found as early as is certain, ended with their own reason."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from vashista.engine.config import EngineConfig
from vashista.engine.deadlines import CAUTION, Deadlines
from vashista.engine.engine import Engine
from vashista.engine.messages import FinishReason, SamplingParams, Submit, TokenEvent
from vashista.engine.pages import PageAllocator, root_hash
from vashista.engine.request import Request
from vashista.engine.scheduler import BatchItem, Scheduler

MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"
PAGE = 4


class PerToken:
    """A step takes a second a token."""

    def __init__(self) -> None:
        self._num_tokens = 0

    def add(self, item: BatchItem) -> None:
        self._num_tokens += item.num_tokens

    def seconds(self, extra: BatchItem | None = None) -> float:
        return float(self._num_tokens + (extra.num_tokens if extra else 0))


def watched(stop_at: float | None, *, length: int = 10, **sampling: object) -> tuple[Scheduler, Deadlines, Request]:
    scheduler = Scheduler(PageAllocator(32), page_size=PAGE, max_running_requests=4, max_batch_tokens=6)
    deadlines = Deadlines(scheduler, PerToken)
    params = SamplingParams(seed=0, **{"max_tokens": 20, **sampling})  # type: ignore[arg-type]
    submit = Submit("r", list(range(length)), params, arrival_s=0.0, stop_at_s=stop_at)
    request = Request(submit, root_hash("m"))
    scheduler.add(request)
    deadlines.add(request)
    return scheduler, deadlines, request


@pytest.mark.parametrize(
    ("sampling", "least"),
    [
        ({}, 10),  # the prompt; its first token may be its last
        ({"min_tokens": 5}, 14),
        ({"ignore_eos": True}, 29),
        ({"ignore_eos": True, "stop": ("x",)}, 10),
    ],
)
def test_a_request_is_late_when_even_its_least_does_not_fit(sampling: dict[str, object], least: int) -> None:
    for left, is_late in ((CAUTION * least + 0.01, False), (CAUTION * least - 0.01, True)):
        _, deadlines, request = watched(100.0, **sampling)
        assert list(deadlines.late(100.0 - left)) == ([request] if is_late else [])
        assert list(deadlines.late(100.0 - left)) == [], "it is named once"
        assert list(deadlines.late(100.0)) == ([] if is_late else [request])


def test_what_did_not_ask_for_it_is_never_late() -> None:
    _, deadlines, _ = watched(None)
    assert list(deadlines.late(1e9)) == []


def test_what_is_cached_or_computed_does_not_count() -> None:
    scheduler, deadlines, request = watched(100.0)
    batch = scheduler.schedule()
    scheduler.complete(batch)
    assert request.num_computed_tokens == 6
    assert list(deadlines.late(100.0 - CAUTION * 4 - 0.01)) == []
    second = Request(
        Submit("s", list(range(10)), SamplingParams(seed=0, max_tokens=1), arrival_s=0.0, stop_at_s=100.0),
        root_hash("m"),
    )
    scheduler.add(second)
    deadlines.add(second)
    late = list(deadlines.late(100.0 - CAUTION * 6 - 0.01))
    assert late == [], "its first page is in the cache, six tokens are left"
    assert second in list(deadlines.late(100.0 - CAUTION * 6 + 0.01))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(
        EngineConfig(model_dir=str(MODEL), dtype="float32", num_threads=1, page_size=16, kv_cache_bytes=64 << 20)
    )


def run(engine: Engine, submit: Submit) -> list[TokenEvent]:
    engine.submit(submit)
    events = []
    while engine.has_work:
        events += engine.step()
        engine.check()
    return events


def test_the_engine_ends_a_running_request_at_its_deadline_and_keeps_its_text(engine: Engine) -> None:
    eos = engine.ready.eos_token_ids
    params = SamplingParams(seed=1, max_tokens=4000, logit_bias=dict.fromkeys(eos, -100.0))
    now = time.monotonic()
    events = run(engine, Submit("a", [5, 6, 7], params, arrival_s=now, stop_at_s=now + 0.4))
    assert events[-1].finish_reason is FinishReason.DEADLINE
    num_tokens = sum(len(event.token_ids) for event in events)
    assert 0 < num_tokens < 4000
    assert "".join(event.text for event in events)
    assert engine.stats.num_pages_used == 0


def test_the_engine_does_not_begin_what_cannot_be_done(engine: Engine) -> None:
    params = SamplingParams(seed=1, max_tokens=4000, ignore_eos=True)
    now = time.monotonic()
    (event,) = run(engine, Submit("b", [5, 6, 7], params, arrival_s=now, stop_at_s=now + 0.5))
    assert (event.finish_reason, event.token_ids) == (FinishReason.DEADLINE, [])


def test_an_engine_with_a_promise_cuts_prompts_beside_a_stream() -> None:
    config = EngineConfig(
        model_dir=str(MODEL),
        dtype="float32",
        num_threads=1,
        page_size=16,
        kv_cache_bytes=64 << 20,
        max_token_gap_s=0.05,
    )
    engine = Engine(config)
    assert engine.ready.rules is not None
    assert engine.ready.rules.max_token_gap_s == 0.05
    now = time.monotonic()
    long = SamplingParams(seed=1, max_tokens=6000, ignore_eos=True)  # a busy machine takes many steps
    engine.submit(Submit("stream", [5, 6, 7], long, arrival_s=now))
    for _ in range(40):
        engine.step()
    engine.submit(Submit("prompt", [i % 900 + 10 for i in range(1500)], SamplingParams(seed=1, max_tokens=1), now))
    num_steps = 0
    while engine._scheduler.get("prompt") is not None:
        names = {event.request_id for event in engine.step() if event.token_ids}
        assert "stream" in names, "the stream has a token in every step"
        num_steps += 1
    assert num_steps > 1500 / 512 + 1, "chunks are smaller than the token budget of a step"
    engine.abort("stream")
    engine.check()
