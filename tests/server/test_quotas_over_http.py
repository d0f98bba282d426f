"""Limits of keys over HTTP: 429 with a name, Retry-After and OpenAI's headers, and the same counts after a restart."""

from __future__ import annotations

import threading
import time

import httpx
import openai
import pytest

from vashista.server.keys import KeyStore
from vashista.server.limits import Resource, Window

DAY, MONTH = Window.DAY, Window.MONTH


@pytest.fixture
def limited(start_server, tmp_path):
    """Start a server whose one key has limits; returns (server, complete, store, key id)."""
    store = KeyStore(tmp_path / "keys.db")

    def start(*limits, **settings):
        if not store.list():
            key, start.secret = store.create("alice")
            start.key_id = key.id
            store.set_limits(key.id, limits)
        server = start_server(state_dir=str(tmp_path), **settings).wait_ready()

        def complete(**fields):
            body = {"model": "reference-26m", "prompt": "hello world", "max_tokens": 4, **fields}
            header = {"authorization": f"Bearer {start.secret}"}
            return httpx.post(server.url + "/v1/completions", json=body, headers=header, timeout=60)

        return server, complete

    start.store = store
    yield start
    store.close()


def seconds_of_day_left() -> float:
    return DAY.span(time.time())[1] - time.time()


def test_a_used_up_quota_is_429_with_the_time_to_wait_and_survives_a_restart(limited):
    server, complete = limited((Resource.TOKENS, DAY, 20), (Resource.REQUESTS, MONTH, 100))
    first = complete(max_tokens=4)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-tokens"] == "20"
    # Four of the prompt and four of the reply, which is over when its headers go out.
    assert first.headers["x-ratelimit-remaining-tokens"] == "12"
    assert first.headers["x-ratelimit-remaining-requests"] == "99"
    assert "h" in first.headers["x-ratelimit-reset-requests"]
    assert complete(max_tokens=4).status_code == 200
    refused = complete(max_tokens=4)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert float(refused.headers["retry-after"]) == pytest.approx(seconds_of_day_left(), abs=30)
    assert refused.headers["x-ratelimit-remaining-tokens"] == "4"
    too_large = complete(max_tokens=40)
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (400, "exceeds_key_limit")
    assert "retry-after" not in too_large.headers
    server.process.terminate()
    server.process.wait(60)
    _, complete = limited()
    refused = complete(max_tokens=4)
    assert refused.headers["x-ratelimit-remaining-tokens"] == "4"
    assert refused.headers["x-ratelimit-remaining-requests"] == "98"
    assert "used 16 of its 20 tokens/day" in refused.json()["error"]["message"]


def test_parallel_requests_never_pass_a_limit_together(limited):
    _, complete = limited((Resource.TOKENS, DAY, 80))
    replies: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: replies.append(complete(max_tokens=12))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies].count(200) == 5
    assert {reply.status_code for reply in replies} == {200, 429}


def test_failed_and_left_requests_count_for_what_they_used_and_refused_ones_do_not(limited, script):
    server, complete = limited((Resource.TOKENS, DAY, 5000), (Resource.REQUESTS, DAY, 50))
    assert complete(prompt="").status_code == 400
    assert complete(model="other").status_code == 404
    assert complete(seed=script.LATE_ERROR, max_tokens=9).status_code == 400
    assert complete(seed=script.DIE, max_tokens=9).status_code == 503
    server.wait_for(lambda: complete(max_tokens=1).status_code == 200)
    headers = complete(max_tokens=1).headers
    used = 5000 - int(headers["x-ratelimit-remaining-tokens"])
    # Prompts of four tokens: 4 + 2 until the error, and two of 4 + 1. What a dying engine did not finish is given back.
    assert used == 6 + 5 + 5
    assert headers["x-ratelimit-remaining-requests"] == "47"
    server.process.terminate()
    server.process.wait(60)
    _, complete = limited()
    headers = complete(max_tokens=1).headers
    assert 5000 - int(headers["x-ratelimit-remaining-tokens"]) == 6 + 5 + 5 + 5
    assert headers["x-ratelimit-remaining-requests"] == "46"


def test_a_limit_set_while_the_server_runs_counts_what_was_used_before(limited):
    _, complete = limited((Resource.REQUESTS, MONTH, 1000))
    assert complete().status_code == 200
    limited.store.set_limits(limited.key_id, [(Resource.REQUESTS, DAY, 1)])
    time.sleep(0.6)  # the age of the server's view of the keys
    assert complete().json()["error"]["code"] == "quota_exceeded"


def test_money_is_limited_at_the_servers_prices(limited):
    _, complete = limited((Resource.MONEY, MONTH, 2_500_000_000), price_per_request=1.0)
    assert [complete().status_code for _ in range(3)] == [200, 200, 429]


def test_the_openai_client_raises_its_rate_limit_error(limited):
    server, complete = limited((Resource.REQUESTS, DAY, 1))
    assert complete().status_code == 200
    client = openai.OpenAI(base_url=server.url + "/v1", api_key=limited.secret, max_retries=0)
    with client, pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="reference-26m", prompt="x")
    assert caught.value.response.headers["retry-after"].isdigit()
    assert caught.value.body["code"] == "quota_exceeded"


def test_a_limit_of_zero_admits_nothing_and_no_waiting_helps(limited):
    _, complete = limited((Resource.REQUESTS, Window.MINUTE, 0))
    assert complete().json()["error"]["code"] == "exceeds_key_limit"
