"""The engine in this process, on the bundled model: what a request gets does not depend on what runs beside it."""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vashista.engine.config import EngineConfig
from vashista.engine.engine import MAX_SHORTAGES, Engine
from vashista.engine.errors import (
    CacheCapacityError,
    ContextLengthError,
    EmptyPromptError,
    GrammarError,
    InvalidRequestError,
    NotEnoughMemoryError,
    SettingsError,
    TokenOutOfVocabularyError,
    VashistaError,
)
from vashista.engine.grammar import compile_response_format
from vashista.engine.messages import FinishReason, SamplingParams, Submit, TokenEvent
from vashista.engine.prompt_logprobs import unpacked

MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"
STORY = "It was a dark and stormy night, and the old captain"


def make_engine(**values: Any) -> Engine:
    defaults = {"dtype": "float32", "num_threads": 2, "page_size": 16, "max_context": 8192, "kv_cache_bytes": 256 << 20}
    return Engine(EngineConfig(model_dir=str(MODEL), **defaults | values))


@pytest.fixture(scope="module")
def shared_engine() -> Engine:
    return make_engine()


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    yield shared_engine
    shared_engine.check()
    left = [request.id for request in shared_engine._scheduler.requests]
    for request_id in left:  # of a test that failed: the next one begins without them
        shared_engine.abort(request_id)
    assert not left
    assert not shared_engine.has_work
    assert shared_engine.stats.num_pages_used == 0


def request(name: str, prompt: list[int], arrival: float = 0.0, salt: str = "", **values: Any) -> Submit:
    sampling = SamplingParams(**{"seed": 7, "max_tokens": 16, "temperature": 0.0, **values})
    return Submit(name, prompt, sampling, arrival_s=arrival, cache_salt=salt)


def run(engine: Engine, submits: list[Submit], steps_between: int = 0) -> dict[str, list[TokenEvent]]:
    """Submit one after the other, with steps between, and run to the end."""
    events: dict[str, list[TokenEvent]] = {submit.request_id: [] for submit in submits}

    def step() -> None:
        for event in engine.step():
            events[event.request_id].append(event)
        engine.check()

    for submit in submits:
        engine.submit(submit)
        for _ in range(steps_between):
            step()
    while engine.has_work:
        step()
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def story(engine: Engine) -> list[int]:
    return engine._tokenizer.encode(STORY)


def mixed_requests(source: random.Random) -> list[Submit]:
    """32 requests: prompts of 1 to 4,096 tokens, some with common beginnings, each with its own way of sampling."""
    common = [source.randrange(1, 8192) for _ in range(4096)]
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
        {"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 0.0, "logprobs": 2, "logit_bias": {33: 2.0}},
        {"temperature": 0.0, "prompt_logprobs": 1},
        {"temperature": 0.8, "min_tokens": 10, "stop": ("the", "\n")},
    ]
    requests = []
    for index in range(32):
        length = [4096, 1, 15, 16, 17][index] if index < 5 else int(2 ** source.uniform(0, 11))
        prompt = common[:length] if index % 3 else [source.randrange(1, 8192) for _ in range(length)]
        requests.append(
            request(
                f"r{index}", prompt, float(index), seed=index, max_tokens=source.randrange(16, 50), **ways[index % 8]
            )
        )
    return requests


def test_steps_after_a_pause_are_counted_as_idle(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(engine.stats.step_ended_s + 5.0, 1e-3)
    monkeypatch.setattr(engine, "_clock", clock.__next__)
    seen = []
    engine.submit(request("a", [5, 6, 7], max_tokens=3))
    while engine.has_work:
        engine.step()
        seen.append(engine._busy.features.idle)
    assert seen[0] == pytest.approx(1.0)
    assert seen[1:] == [0.0, 0.0]


def test_a_cpu_has_no_graphs_that_prompts_are_parted_for() -> None:
    assert make_engine(device="cpu").ready.rules.prompt_rows == ()


def test_a_mixed_batch_gives_each_request_what_it_gets_alone() -> None:
    requests = mixed_requests(random.Random(3))
    alone = make_engine(prefix_caching=False, max_batch_tokens=4096)
    expected = {submit.request_id: run(alone, [submit])[submit.request_id] for submit in requests}
    # 4,480 tokens of cache for 32 requests of up to 4,176: pages run out, requests are preempted.
    page_bytes = alone.ready.kv_bytes // alone.ready.num_pages
    small = make_engine(kv_cache_bytes=280 * page_bytes, max_running_requests=16, max_batch_tokens=300)
    together = run(small, requests, steps_between=1)
    assert small.stats.num_preemptions_total > 0
    assert small.stats.num_pages_used == 0
    num_cached = sum(events[0].num_cached_tokens or 0 for events in together.values())
    assert num_cached > 0, "no prefix was shared"
    for submit in requests:
        ours, theirs = together[submit.request_id], expected[submit.request_id]
        assert tokens(ours) == tokens(theirs), submit.request_id
        assert text(ours) == text(theirs)
        assert ours[-1].finish_reason == theirs[-1].finish_reason
        scored = [unpacked(events[0].prompt_logprobs or []) for events in (ours, theirs)]
        for a, b in zip(*scored, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or math.isclose(a.logprob, b.logprob, abs_tol=1e-3)


def test_a_seed_repeats_and_another_seed_differs(engine: Engine) -> None:
    prompt = story(engine)
    first, again, other = (
        tokens(run(engine, [request("a", prompt, temperature=1.0, seed=seed)])["a"]) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_cache_is_used_for_a_repeated_prompt_and_not_across_salts(engine: Engine) -> None:
    prompt = list(range(100, 200))
    cached = [run(engine, [request("a", prompt, salt=salt)])["a"][0].num_cached_tokens for salt in ("x", "x", "y")]
    assert cached == [0, 96, 0]


def test_a_stop_string_over_token_borders_ends_the_text_before_it(engine: Engine) -> None:
    plain = text(run(engine, [request("a", story(engine))])["a"])
    stop = plain[5:12]
    events = run(engine, [request("a", story(engine), stop=(stop,))])["a"]
    assert text(events) == plain[:5]
    assert (events[-1].finish_reason, events[-1].stop_reason) == (FinishReason.STOP, stop)


def test_a_stop_id_ends_the_text_before_it_and_is_named(engine: Engine) -> None:
    said = tokens(run(engine, [request("a", story(engine))])["a"])
    events = run(engine, [request("a", story(engine), stop_token_ids=(said[3],))])["a"]
    assert tokens(events) == said[: said.index(said[3]) + 1]
    assert events[-1].stop_reason == said[3]
    assert text(events) == engine._tokenizer.decode(said[: said.index(said[3])])


def test_min_tokens_holds_the_end_back(engine: Engine) -> None:
    said = tokens(run(engine, [request("a", story(engine))])["a"])
    events = run(engine, [request("a", story(engine), stop_token_ids=(said[0],), min_tokens=5)])["a"]
    assert said[0] not in tokens(events)[:5]
    assert len(tokens(events)) >= 5


def test_the_end_of_sequence_ends_a_request_unless_ignored(engine: Engine) -> None:
    [eos] = engine.ready.eos_token_ids
    forced = {"logit_bias": {eos: 1000.0}}
    events = run(engine, [request("a", story(engine), **forced)])["a"]
    assert (tokens(events), text(events), events[-1].finish_reason) == ([eos], "", FinishReason.STOP)
    events = run(engine, [request("a", story(engine), ignore_eos=True, max_tokens=3, **forced)])["a"]
    assert (tokens(events), events[-1].finish_reason) == ([eos] * 3, FinishReason.LENGTH)


def test_logprobs_are_reported_for_output_and_prompt(engine: Engine) -> None:
    prompt = story(engine)
    events = run(engine, [request("a", prompt, logprobs=3, prompt_logprobs=2, max_tokens=4)])["a"]
    reported = list(unpacked(events[0].prompt_logprobs or []))
    assert reported[0] is None
    assert [entry.token_id for entry in reported[1:] if entry is not None] == prompt[1:]
    assert all(event.prompt_logprobs is None for event in events[1:])
    for event in events:
        [entry] = event.logprobs or []
        assert [entry.token_id] == event.token_ids
        assert entry.rank == 1, "greedy"
        assert entry.top[0] == (entry.token_id, entry.logprob)
        assert len(entry.top) == 3


def test_a_prompt_can_be_scored_without_any_output(engine: Engine) -> None:
    [event] = run(engine, [request("a", story(engine), max_tokens=0, prompt_logprobs=0)])["a"]
    assert event.token_ids == []
    assert event.finish_reason is FinishReason.LENGTH
    assert len(list(unpacked(event.prompt_logprobs or []))) == len(story(engine))


def test_a_grammar_makes_the_output_match_its_schema(engine: Engine) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    grammar = compile_response_format(response_format)
    for seed in range(3):
        submit = request("a", story(engine), temperature=1.0, seed=seed, grammar=grammar, max_tokens=200)
        events = run(engine, [submit])["a"]
        assert events[-1].finish_reason is FinishReason.STOP
        assert json.loads(text(events)) in ({"ok": True}, {"ok": False})


def test_an_abort_frees_everything_at_once(engine: Engine) -> None:
    engine.submit(request("a", story(engine)))
    engine.step()
    assert engine.stats.num_pages_used > 0
    engine.abort("a")
    assert engine.stats.num_pages_used == 0
    engine.abort("a")


@pytest.mark.parametrize(
    ("submit", "error"),
    [
        (request("a", []), EmptyPromptError),
        (request("a", [8192]), TokenOutOfVocabularyError),
        (request("a", [-1]), TokenOutOfVocabularyError),
        (request("a", [1] * 8192, max_tokens=1), ContextLengthError),
        (request("a", [1], grammar="no grammar"), GrammarError),
    ],
)
def test_a_request_that_can_never_run_is_refused(engine: Engine, submit: Submit, error: type[VashistaError]) -> None:
    with pytest.raises(error):
        engine.submit(submit)


def test_a_request_larger_than_the_whole_cache_is_refused() -> None:
    page_bytes = 16 * 8 * 2 * 2 * 64 * 4
    engine = make_engine(kv_cache_bytes=4 * page_bytes, attention="dense")
    with pytest.raises(CacheCapacityError, match="5 KV pages; there are 4"):
        engine.submit(request("a", [1] * 60, max_tokens=5))


def test_an_id_in_use_is_refused(engine: Engine) -> None:
    engine.submit(request("a", [1]))
    with pytest.raises(InvalidRequestError, match="in use"):
        engine.submit(request("a", [1]))
    engine.abort("a")


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"kv_cache_bytes": 1000, "attention": "dense"}, NotEnoughMemoryError, "needs 131072 bytes"),
        ({"kv_cache_bytes": 1 << 50}, NotEnoughMemoryError, "are free"),
        ({"max_context": 40000}, SettingsError, "made for 32768"),
        ({"attention": "magic", "device": "cpu"}, SettingsError, "on cpu there is auto, dense"),
        ({"dtype": "int3"}, SettingsError, "possible are auto, float32"),
        ({"device": "tpu"}, VashistaError, "possible are auto, cpu, cuda"),
        ({"max_batch_tokens": 8}, SettingsError, "needs a token in every step"),
    ],
)
def test_an_engine_that_cannot_work_says_what_is_possible(
    values: dict[str, Any], error: type[VashistaError], words: str
) -> None:
    with pytest.raises(error, match=words):
        make_engine(**values)


# --- memory that ends within a step


def refuse(times: int, instead: Callable[..., Any]) -> Callable[..., Any]:
    """The call, the first times without memory."""
    left = [times]

    def call(*arguments: Any, **values: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return instead(*arguments, **values)

    return call


@pytest.mark.parametrize("place", ["model", "attention", "logits"])
def test_a_step_without_memory_ends_its_requests_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], place: str
) -> None:
    prompts = {name: engine._tokenizer.encode(f"{name}: {STORY}") for name in ("a", "b", "c")}
    expected = run(engine, [request(name, prompt, salt="before") for name, prompt in prompts.items()])
    runner = engine._runner
    owner, name = {
        "model": (runner.model, "forward"),
        "attention": (runner.attention, "forward"),
        "logits": (runner, "logits"),
    }[place]
    for name_of, prompt in prompts.items():
        engine.submit(request(name_of, prompt, salt="after"))
        if name_of == "b":
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, refuse(1, getattr(owner, name)))
                if place == "attention":  # what a GPU replays calls nothing
                    patch.setattr(runner.model, "_graphs", None)
                events = engine.step()
            assert [(event.request_id, event.error_code) for event in events] == [
                ("a", "step_out_of_memory"),
                ("b", "step_out_of_memory"),
            ]
            assert str(events[0].error_message).endswith(" tokens of 2 requests.")
            assert engine.shares == {}
            engine.check()
    assert "tokens of 2 requests: DefaultCPUAllocator: can't allocate memory" in capfd.readouterr().err
    left = [event for _ in range(16) for event in engine.step()]
    assert [event.token_ids for event in left] == [event.token_ids for event in expected["c"]]
    again = run(engine, [request(name, prompt, salt="after") for name, prompt in prompts.items()])
    assert text_of(again) == text_of(expected)


def text_of(events: dict[str, list[TokenEvent]]) -> dict[str, str]:
    return {name: "".join(event.text for event in own) for name, own in events.items()}


def test_a_request_that_was_done_in_a_step_without_memory_hears_of_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end was made, but the events of the step were lost."""
    prompt = engine._tokenizer.encode(STORY)
    engine.submit(request("scored", prompt, max_tokens=0, prompt_logprobs=1, salt="x"))
    engine.submit(request("other", prompt, salt="y"))
    with monkeypatch.context() as patch:
        patch.setattr("vashista.engine.engine._sampled_logprobs", refuse(1, lambda *_: {}))
        events = engine.step()
    assert {event.request_id: event.finish_reason for event in events} == {
        "scored": FinishReason.ERROR,
        "other": FinishReason.ERROR,
    }


def test_steps_that_fail_one_after_the_other_end_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = engine._tokenizer.encode(STORY)

    def fail(times: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "logits", refuse(times, engine._runner.logits))
            for index in range(times):
                engine.submit(request(f"r{index}", prompt))
                assert engine.step()[-1].error_code == "step_out_of_memory"

    run(engine, [request("well", prompt)])
    fail(MAX_SHORTAGES)
    run(engine, [request("well", prompt)])
    fail(MAX_SHORTAGES)
    with pytest.raises(NotEnoughMemoryError, match="4 steps in a row ran out of memory: Default"):
        fail(1)
    engine.abort("r0")
    run(engine, [request("well", prompt)])


def test_other_errors_of_a_step_are_not_taken_for_a_shortage(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a bug")

    engine.submit(request("a", engine._tokenizer.encode(STORY)))
    monkeypatch.setattr(engine._runner, "logits", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        engine.step()
    engine.abort("a")
