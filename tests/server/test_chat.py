"""/v1/chat/completions through the real openai client, against a scripted engine that repeats the prompt."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

MESSAGES = [{"role": "user", "content": "hello world"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def prompt_of(server, **fields):
    """The chat as the model gets it, rendered by the template."""
    tokens = httpx.post(server.url + "/tokenize", json={"messages": MESSAGES, **fields}).json()["tokens"]
    return tokens, httpx.post(server.url + "/detokenize", json={"tokens": tokens}).json()["prompt"]


def test_a_chat_is_rendered_by_the_models_template_and_answered(client, server):
    tokens, prompt = prompt_of(server)
    reply = client.chat.completions.create(model="reference-26m", messages=MESSAGES, max_tokens=len(tokens))
    assert "hello world" in prompt
    assert reply.choices[0].message.content == prompt
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.prompt_tokens == reply.usage.completion_tokens == len(tokens)


def test_a_stream_opens_with_the_role_and_adds_up(client, server):
    tokens, prompt = prompt_of(server)
    chunks = list(
        client.chat.completions.create(
            model="reference-26m",
            messages=MESSAGES,
            max_completion_tokens=len(tokens),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert [delta.role for delta in deltas[1:]] == [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == prompt
    assert chunks[-1].usage.completion_tokens == len(tokens)
    assert chunks[-2].choices[0].finish_reason == "length"


def test_the_async_client_gets_the_same(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            reply = await client.chat.completions.create(model="reference-26m", messages=MESSAGES, max_tokens=2, n=2)
            stream = await client.chat.completions.create(
                model="reference-26m", messages=MESSAGES, max_tokens=2, n=2, stream=True
            )
            texts = {0: "", 1: ""}
            async for chunk in stream:
                texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
            return [choice.message.content for choice in reply.choices], texts

    whole, streamed = asyncio.run(run())
    assert whole == list(streamed.values())


def test_logprobs_carry_the_exact_bytes_of_tokens(client):
    reply = client.chat.completions.create(
        model="reference-26m", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == 3
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == reply.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert content[0].top_logprobs[1].logprob == -9999.0


def test_streamed_logprobs_come_with_their_tokens(client):
    stream = client.chat.completions.create(
        model="reference-26m", messages=MESSAGES, max_tokens=3, logprobs=True, stream=True
    )
    entries = [entry for chunk in stream if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert len(entries) == 3


def test_text_parts_are_joined_by_line_ends(server):
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    joined = server.chat(messages=[{"role": "user", "content": parts}])
    plain = server.chat(messages=[{"role": "user", "content": "hello\nworld"}])
    assert joined.json()["usage"]["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"]


def test_the_default_of_max_tokens_is_the_servers(server):
    reply = server.chat(max_tokens=None)
    assert reply.json()["usage"]["completion_tokens"] == 1024


def test_both_names_of_max_tokens_may_be_given_if_they_agree(server):
    assert server.chat(max_tokens=3, max_completion_tokens=3).status_code == 200
    reply = server.chat(max_tokens=3, max_completion_tokens=4)
    assert reply.status_code == 400
    assert "two names" in reply.json()["error"]["message"]


def test_prompt_logprobs_stand_beside_the_choices(server):
    tokens, _ = prompt_of(server)
    assert len(server.chat(prompt_logprobs=1).json()["prompt_logprobs"]) == len(tokens)
    first = server.chat(prompt_logprobs=1, stream=True).text.split("\n\n")[0]
    assert len(json.loads(first[6:])["prompt_logprobs"]) == len(tokens)


def test_harmless_fields_of_the_openai_protocol_are_accepted(server):
    reply = server.chat(
        tools=[], tool_choice="none", store=False, metadata={"a": "b"}, parallel_tool_calls=True, service_tier="auto",
        user="me", modalities=["text"], audio=None, function_call=None, prompt_cache_key="k", verbosity="medium",
    )  # fmt: skip
    assert reply.status_code == 200, reply.text


def test_template_variables_are_passed_on_but_not_the_messages(server):
    assert server.chat(chat_template_kwargs={"enable_thinking": False}).status_code == 200
    reply = server.chat(chat_template_kwargs={"messages": []})
    assert reply.status_code == 400
    assert "messages may not be set" in reply.json()["error"]["message"]


def test_tokenize_gives_what_a_completion_uses(server):
    body = {"prompt": "hello world", "return_token_strs": True}
    reply = httpx.post(server.url + "/tokenize", json=body).json()
    assert reply["count"] == len(reply["tokens"]) == server.complete().json()["usage"]["prompt_tokens"]
    assert "".join(reply["token_strs"]) == "hello world"
    assert reply["max_model_len"] == 16384
