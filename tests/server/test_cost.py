"""Cost over HTTP: what replies and receipts say, and that all receipts add up to the engine's busy time."""

from __future__ import annotations

import json
import math
import random
import threading

import httpx
import pytest

from vashista.server.ledger.reader import reading, rows
from vashista.server.ledger.receipt import Receipt

STEP_S = 0.25
"""What the scripted engine says that each step takes of each request."""


def receipts(server) -> list[Receipt]:
    with reading(server.log_path.parent / "state" / "ledger.db") as connection:
        return [receipt for *_, receipt in rows(connection)]


def busy_s(server) -> float:
    return math.fsum(receipt.outcome.busy_s or 0.0 for receipt in receipts(server))


def leave_early(server, body: dict) -> None:
    """Begin a stream and go away after its first bytes."""
    with httpx.stream("POST", server.url + "/v1/completions", json={**body, "stream": True}, timeout=60) as reply:
        next(reply.iter_bytes())


def test_a_reply_says_what_it_cost_and_its_receipt_says_the_same(start_server):
    prices = {"price_per_machine_hour": 3600.0, "price_per_kwh": 36.0, "price_per_request": 2.0, "currency": "CHF"}
    server = start_server(environ={"SCRIPTED_POWER": "1"}, **prices).wait_ready()
    reply = server.complete(max_tokens=4, n=2)
    cost = reply.json()["usage"]["vashista"]["cost"]
    # Two choices of four steps each; 150 W as the engine measured; 2 + 2 s of 1 a second + 300 J of 1e-5.
    expected = {"busy_s": 8 * STEP_S, "energy_j": 8 * STEP_S * 150, "energy_source": "rapl", "currency": "CHF"}
    assert cost == {**expected, "money": 4.003}
    outcome = receipts(server)[-1].outcome
    assert (outcome.busy_s, outcome.energy_j, outcome.energy_source) == (2.0, 300.0, "rapl")
    assert (outcome.cost_nano, outcome.currency) == (4_003_000_000, "CHF")


def test_without_meter_and_prices_energy_is_modelled_and_money_unknown(server):
    cost = server.complete(max_tokens=4).json()["usage"]["vashista"]["cost"]
    assert cost == {"busy_s": 1.0, "energy_j": 200.0, "energy_source": "model", "money": None, "currency": None}


def test_streams_say_it_at_their_end(server):
    text = server.complete(max_tokens=4, stream=True, stream_options={"include_usage": True}).text
    last = json.loads(text.strip().split("\n\n")[-2].removeprefix("data: "))
    assert last["usage"]["vashista"]["cost"]["busy_s"] == 1.0
    body = {"model": "reference-26m", "max_tokens": 4, "messages": [{"role": "user", "content": "hello world"}]}
    text = httpx.post(server.url + "/v1/messages", json={**body, "stream": True}, timeout=60).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert "vashista" not in events[0]["message"]["usage"]
    (delta,) = [event for event in events if event["type"] == "message_delta"]
    assert delta["usage"]["vashista"]["cost"]["busy_s"] == 1.0


def test_a_refused_request_costs_nothing(start_server):
    server = start_server(price_per_request=1.0).wait_ready()
    server.complete(max_tokens=99999)
    outcome = receipts(server)[-1].outcome
    assert (outcome.busy_s, outcome.energy_j, outcome.cost_nano, outcome.currency) == (None, None, None, None)


def test_receipts_add_up_with_clients_that_leave_errors_and_dying_engines(start_server, script):
    server = start_server(environ={"SCRIPTED_STEP_S": "0.002"}, max_engine_restarts=100).wait_ready()
    source = random.Random(11)
    body = {"model": "reference-26m", "prompt": "hello world"}

    def client(number: int) -> None:
        for _ in range(8):
            kind = (number + source.randrange(6)) % 6
            if kind == 0:
                leave_early(server, {**body, "max_tokens": 9000, "seed": script.ENDLESS, "n": 2})
            elif kind == 1:
                server.complete(seed=script.LATE_ERROR, n=2, max_tokens=20)
            elif kind == 2 and number == 0:
                server.complete(seed=script.DIE, max_tokens=20)
                server.wait_for(lambda: httpx.get(server.url + "/ready").status_code == 200)
            else:
                server.complete(max_tokens=source.randint(1, 30), n=source.randint(1, 3))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # While the engine was away, all kinds may have been refused alike: one of each with a living engine.
    leave_early(server, {**body, "max_tokens": 9000, "seed": script.ENDLESS, "n": 2})
    server.complete(seed=script.LATE_ERROR, n=2, max_tokens=20)
    server.complete(max_tokens=3)
    server.wait_for(lambda: len(receipts(server)) == 35)
    total_s = server.metric("vashista_engine_busy_seconds_total")
    assert total_s > 10
    assert busy_s(server) == pytest.approx(total_s, rel=1e-9)
    codes = {receipt.error_code for receipt in receipts(server)}
    assert {None, "client_gone", "invalid_grammar"} <= codes


def test_receipts_add_up_when_the_server_is_told_to_end(start_server, script):
    server = start_server(environ={"SCRIPTED_STEP_S": "0.002"}, drain_timeout_s=0).wait_ready()
    body = {"seed": script.ENDLESS, "max_tokens": 9000}
    threads = [threading.Thread(target=lambda: server.complete(stream=True, **body)) for _ in range(3)]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: server.metric("vashista_generated_tokens_total") > 30)
    server.process.terminate()
    for thread in threads:
        thread.join()
    assert server.process.wait(60) == 0
    found = receipts(server)
    assert [receipt.error_code for receipt in found] == ["draining"] * 3
    # One step for each token, and what ran until the engine heard of the end.
    for receipt in found:
        assert 0 <= receipt.outcome.busy_s / STEP_S - receipt.num_output_tokens < 50


def test_receipts_of_the_real_engine_add_up_within_a_thousandth(start_server):
    server = start_server(
        "real", num_threads=1, kv_cache_bytes=96 << 20, dense_below=0, audit_rate=0.25, max_running_requests=4
    ).wait_ready()
    prompts = ["It was a dark and stormy night. " * count for count in (3, 40, 120, 200)]
    modes = [{"mode": "dense"}, {"token_budget": 256}, {"max_dropped_mass": 0.2}]

    def client(number: int) -> None:
        options = {"attention": modes[number % 3]}
        fields = {"prompt": prompts[number % 4], "ignore_eos": True, "vashista": options, "seed": number}
        if number % 4 == 3:
            leave_early(server, {"model": "reference-26m", **fields, "max_tokens": 2000})
        else:
            assert server.complete(max_tokens=20, n=1 + number % 2, **fields).status_code == 200

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.wait_for(lambda: len(receipts(server)) == 8)
    server.wait_for(lambda: server.metric("vashista_requests_running") == 0)
    total_s = server.metric("vashista_engine_busy_seconds_total")
    assert busy_s(server) == pytest.approx(total_s, rel=1e-3)
    assert {receipt.error_code for receipt in receipts(server)} == {None, "client_gone"}
    assert all(receipt.outcome.energy_j > 0 for receipt in receipts(server))
