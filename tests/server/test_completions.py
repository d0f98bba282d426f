"""/v1/completions through the real openai client, against a scripted engine that repeats the prompt."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

PROMPT = "hello world"


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_completion_has_the_engines_text_reason_and_usage(client):
    reply = client.completions.create(model="reference-26m", prompt=PROMPT, max_tokens=4)
    assert reply.choices[0].text == "hello world"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.prompt_tokens == 4
    assert reply.usage.completion_tokens == 4
    assert reply.usage.total_tokens == 8
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    assert reply.id.startswith("cmpl-")
    assert reply.model == "reference-26m"


def test_a_stream_adds_up_to_the_whole_text_and_ends_with_usage(client):
    chunks = list(
        client.completions.create(
            model="reference-26m", prompt=PROMPT, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "hello world"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done_and_has_no_usage_unless_asked(server):
    text = server.complete(stream=True).text
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert "usage" not in text
    assert all(event.startswith("data: ") for event in events[:-1])


def test_the_async_client_streams(server):
    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            stream = await client.completions.create(model="reference-26m", prompt=PROMPT, max_tokens=4, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(run()) == "hello world"


def test_many_prompts_with_n_choices_come_in_order_and_prompts_count_once(client):
    prompts = ["hello world", "good night"]
    reply = client.completions.create(model="reference-26m", prompt=prompts, max_tokens=3, n=2)
    texts = [choice.text for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert texts[0] != texts[2]
    lengths = [len(tokens) for tokens in (server_tokens(client, prompt) for prompt in prompts)]
    assert reply.usage.prompt_tokens == sum(lengths)
    assert reply.usage.completion_tokens == 12
    assert reply.usage.prompt_tokens_details.cached_tokens == 6


def server_tokens(client, text):
    return httpx.post(str(client.base_url).replace("/v1/", "/tokenize"), json={"prompt": text}).json()["tokens"]


def test_n_streamed_choices_are_told_apart_by_index(client):
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.completions.create(model="reference-26m", prompt=PROMPT, max_tokens=4, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert set(texts.values()) == {"hello world"}


def test_each_choice_has_its_own_seed_counted_from_the_given_one(server):
    before = len(server.engine_messages("Submit"))
    server.complete(n=3, seed=41)
    assert [submit["sampling"]["seed"] for submit in server.engine_messages("Submit")[before:]] == [41, 42, 43]


def test_requests_without_a_seed_get_different_ones(server):
    before = len(server.engine_messages("Submit"))
    server.complete()
    server.complete()
    seeds = [submit["sampling"]["seed"] for submit in server.engine_messages("Submit")[before:]]
    assert len(set(seeds)) == 2


def test_a_negative_seed_is_a_seed_too(server):
    before = len(server.engine_messages("Submit"))
    assert server.complete(seed=-5).status_code == 200
    assert server.engine_messages("Submit")[before]["sampling"]["seed"] == (1 << 63) - 5


def test_every_sampling_field_reaches_the_engine(server):
    before = len(server.engine_messages("Submit"))
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "presence_penalty": 0.25,
        "frequency_penalty": -0.5, "repetition_penalty": 1.5, "stop_token_ids": [5, 6], "min_tokens": 2,
        "ignore_eos": True, "logprobs": 2, "prompt_logprobs": 1, "max_tokens": 9,
    }  # fmt: skip
    reply = server.complete(**fields, stop="x", logit_bias={"12": -3.5}, cache_salt="s", priority=-2)
    assert reply.status_code == 200, reply.text
    submit = server.engine_messages("Submit")[before]
    for name, value in fields.items():
        assert submit["sampling"][name] == value, name
    assert submit["sampling"]["stop"] == ["x"]
    assert submit["sampling"]["logit_bias"] == {"12": -3.5}
    assert submit["cache_salt"] == "s"
    assert submit["priority"] == -2


def test_a_response_format_becomes_a_grammar(server):
    before = len(server.engine_messages("Submit"))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert server.complete(response_format=form).status_code == 200
    assert server.complete(response_format={"type": "text"}).status_code == 200
    first, second = server.engine_messages("Submit")[before:]
    assert "integer" in first["sampling"]["grammar"]
    assert "grammar" not in second["sampling"]


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]]])
def test_prompts_may_be_token_ids(server, prompt):
    before = len(server.engine_messages("Submit"))
    assert server.complete(prompt=prompt).json()["usage"]["prompt_tokens"] == 3
    assert server.engine_messages("Submit")[before]["prompt_token_ids"] == [5, 6, 7]


def test_logprobs_have_four_lists_of_one_length_and_json_without_infinity(server):
    choice = server.complete(logprobs=3).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {4}
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == [0, 2, 4, 5]
    assert logprobs["top_logprobs"][0][logprobs["tokens"][0]] == -0.5
    assert min(logprobs["top_logprobs"][0].values()) == -9999.0


def test_logprobs_of_zero_reports_the_chosen_token_alone(server):
    logprobs = server.complete(logprobs=0).json()["choices"][0]["logprobs"]
    assert all(len(top) == 1 for top in logprobs["top_logprobs"])


@pytest.mark.parametrize("prompt", [PROMPT, [7, 8, 9]])
def test_echo_puts_the_prompt_before_the_text(server, prompt):
    plain = server.complete(prompt=prompt).json()["choices"][0]["text"]
    echoed = server.complete(prompt=prompt, echo=True).json()["choices"][0]["text"]
    streamed = server.complete(prompt=prompt, echo=True, stream=True).text
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in streamed.split("\n\n")[:-2]]
    assert echoed == httpx_detokenize(server, prompt) + plain
    assert "".join(texts) == echoed


def httpx_detokenize(server, prompt):
    if isinstance(prompt, str):
        return prompt
    return httpx.post(server.url + "/detokenize", json={"tokens": prompt}).json()["prompt"]


def test_echo_with_logprobs_reports_the_prompt_first(server):
    choice = server.complete(echo=True, logprobs=1).json()["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == 8
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert choice["logprobs"]["text_offset"][4] == len(PROMPT)


def test_max_tokens_zero_with_echo_scores_the_prompt(server):
    reply = server.complete(echo=True, logprobs=1, max_tokens=0).json()
    assert reply["choices"][0]["text"] == PROMPT
    assert len(reply["choices"][0]["logprobs"]["tokens"]) == 4
    assert reply["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_name_each_candidate_of_each_prompt_token(server):
    entries = server.complete(prompt_logprobs=2).json()["choices"][0]["prompt_logprobs"]
    assert len(entries) == 4
    assert entries[0] is None
    assert all(candidate["rank"] >= 1 for entry in entries[1:] for candidate in entry.values())


def test_a_stop_string_is_reported_as_the_reason(server, script):
    choice = server.complete(seed=script.STOP, stop=["zz"], max_tokens=50).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "zz"


def test_the_default_of_max_tokens_is_16_and_shrinks_to_what_the_context_leaves(server):
    assert server.complete(max_tokens=None).json()["usage"]["completion_tokens"] == 16
    reply = server.complete(prompt=[5] * (16384 - 3), max_tokens=None).json()
    assert reply["usage"]["completion_tokens"] == 3


def test_no_op_values_of_unsupported_fields_are_accepted(server):
    reply = server.complete(
        suffix=None, best_of=1, user="me", logit_bias=None, vashista={"attention": {"mode": "dense"}}
    )
    assert reply.status_code == 200, reply.text


def test_a_late_error_ends_a_stream_with_an_error_event_and_the_client_raises(client, script):
    stream = client.completions.create(
        model="reference-26m", prompt=PROMPT, max_tokens=50, stream=True, seed=script.LATE_ERROR
    )
    with pytest.raises(openai.APIError, match="scripted"):
        list(stream)


def test_an_early_error_of_a_stream_has_a_proper_status(client, script):
    with pytest.raises(openai.BadRequestError, match="scripted"):
        client.completions.create(model="reference-26m", prompt=PROMPT, stream=True, seed=script.ERROR)


def test_request_ids_are_taken_over_when_valid_and_made_when_not(server):
    for given, is_kept in [("abc-1.2:3", True), ("x" * 129, False), ("a b", False), ("", False)]:
        reply = httpx.get(server.url + "/health", headers={"x-request-id": given})
        assert (reply.headers["x-request-id"] == given) is is_kept
        assert reply.headers["x-request-id"]


def test_an_error_body_names_the_request_id(server):
    reply = httpx.get(server.url + "/nope", headers={"x-request-id": "find-me"})
    assert reply.json()["error"]["request_id"] == "find-me"
