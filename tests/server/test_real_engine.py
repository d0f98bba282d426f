"""The whole path with the real engine and the bundled model: text, streams, stops, JSON, death and recovery."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import httpx
import openai
import pytest

PROMPT = "It was a dark and stormy night, and the old captain"


@pytest.fixture(scope="module")
def real(start_server):
    return start_server("real", num_threads=1, kv_cache_bytes=96 << 20, dense_below=0, audit_rate=0.25).wait_ready()


@pytest.fixture
def client(real):
    with openai.OpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_greedy_text_is_the_models_and_a_stream_gives_the_same(client):
    fields = {"model": "reference-26m", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**fields)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**fields, stream=True))
    # What transformers 5.23 generates greedily in float32.
    assert whole.choices[0].text == ", who had been so long in the cabin, was now"
    assert streamed == whole.choices[0].text


def test_a_chat_recalls_the_code_it_was_told(client):
    reply = client.chat.completions.create(
        model="reference-26m",
        temperature=0,
        max_tokens=24,
        stop=["."],
        messages=[
            {"role": "system", "content": "The code of elephant is 48213."},
            {"role": "user", "content": "what is the code of elephant?"},
        ],
    )
    assert "48213" in reply.choices[0].message.content


def test_a_repeated_prompt_is_taken_from_the_prefix_cache(client):
    fields = {"model": "reference-26m", "prompt": PROMPT * 12, "max_tokens": 1, "extra_body": {"cache_salt": "once"}}
    first = client.completions.create(**fields).usage
    second = client.completions.create(**fields).usage
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.prompt_tokens_details.cached_tokens < second.prompt_tokens


def test_a_seed_gives_the_same_text_again_and_choices_differ(client):
    fields = {"model": "reference-26m", "prompt": PROMPT, "max_tokens": 16, "seed": 7, "n": 2, "temperature": 1}
    first = [choice.text for choice in client.completions.create(**fields).choices]
    second = [choice.text for choice in client.completions.create(**fields).choices]
    assert first == second
    assert first[0] != first[1]


def test_a_json_schema_is_obeyed(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    reply = client.chat.completions.create(
        model="reference-26m",
        max_tokens=200,
        response_format=form,
        messages=[{"role": "user", "content": "Who?"}],
        seed=1,
    )
    value = json.loads(reply.choices[0].message.content)
    assert set(value) == {"name", "age"}


def test_logprobs_agree_between_generated_and_scored_text(client):
    fields = {"model": "reference-26m", "logprobs": 1, "temperature": 0}
    made = client.completions.create(**fields, prompt=PROMPT, max_tokens=4)
    scored = client.completions.create(**fields, prompt=PROMPT + made.choices[0].text, max_tokens=0, echo=True)
    expected = made.choices[0].logprobs.token_logprobs
    assert scored.choices[0].logprobs.token_logprobs[-len(expected) :] == pytest.approx(expected, abs=1e-3)


def test_a_killed_engine_is_back_and_the_next_request_works(real):
    child = real.engine_pid()
    with httpx.stream(
        "POST",
        real.url + "/v1/completions",
        json={"model": "reference-26m", "prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": True},
        timeout=60,
    ) as reply:
        lines = reply.iter_lines()
        next(lines)
        os.kill(child, signal.SIGKILL)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_died"
    real.wait_for(lambda: real.complete().status_code == 200)


def test_no_page_is_held_when_nothing_runs(real):
    real.wait_for(lambda: real.metric('vashista_kv_pages{state="used"}') == 0)
    assert real.metric("vashista_requests_running") == 0


def test_sparse_requests_beside_dense_ones_give_what_they_give_alone(real):
    modes = [{"mode": "dense"}, {"token_budget": 256}, {"max_dropped_mass": 0.2}, {"token_budget": 512}]

    def body(index: int) -> dict:
        prompt = f"Letter {index}. " + PROMPT * (40 + 7 * index)
        fields = {"model": "reference-26m", "prompt": prompt, "max_tokens": 12, "seed": index, "ignore_eos": True}
        return fields | {"vashista": {"attention": modes[index % 4]}}

    async def ask(indexes: list[int]) -> list[dict]:
        async with httpx.AsyncClient(base_url=real.url, timeout=120) as client:
            return [
                reply.json()
                for reply in await asyncio.gather(
                    *(client.post("/v1/completions", json=body(index)) for index in indexes)
                )
            ]

    together = asyncio.run(ask(list(range(8))))
    for index, reply in enumerate(together):
        (alone,) = asyncio.run(ask([index]))
        assert reply["choices"][0]["text"] == alone["choices"][0]["text"]
        support = alone["usage"].get("vashista", {}).get("support")
        assert (support is None) == (index % 4 == 0)
        if support is not None:
            assert 0 < support["tokens_attended"] < support["tokens_visible"]
            assert support["audit"]["num_audits"] > 0
