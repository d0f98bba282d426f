import asyncio
import random
from itertools import pairwise

import pytest

from vashista.engine.errors import UnexpectedReplyError, WarmUpFailedError
from vashista.server.loadgen.client import OpenAIClient, Prompt, RequestShape
from vashista.server.loadgen.connection import ConnectionPool, Endpoint
from vashista.server.loadgen.runner import LoadPoint, Plan, PromptFeed, Watcher, draw_arrivals, run_plan
from vashista.server.loadgen.statistics import Limits


class Numbered:
    """Prompts that tell their own number."""

    def __init__(self, max_tokens=4):
        self.num_drawn = 0
        self.max_tokens = max_tokens

    async def draw(self, rng):
        await asyncio.sleep(0)
        self.num_drawn += 1
        return Prompt(self.max_tokens, text=f"prompt {self.num_drawn} {rng.random()}")


def run(server, *points, watcher=None, workload=None, **plan):
    async def main():
        pool = ConnectionPool(Endpoint.parse(server.url), api_key=None)
        try:
            shape = RequestShape(model="fake", endpoint="completions")
            fields = {"num_warmup": 0, "seed": 1, "limits": None, "shape": shape} | plan
            full = Plan(points=list(points), **fields)
            client = OpenAIClient(pool, timeout_s=20)
            return await run_plan(client, workload or Numbered(), full, watcher or Watcher())
        finally:
            pool.close()

    return asyncio.run(main())


def closed(level, num_requests=None, duration_s=None):
    return LoadPoint("closed", level, num_requests, duration_s)


def test_a_closed_loop_keeps_its_clients_busy_and_never_has_more(server):
    server.chunk_delay_s = 0.002
    (result,) = run(server, closed(3, 12))
    assert server.max_in_flight == 3
    assert [outcome.index for outcome in result.outcomes] == list(range(12))
    assert result.summary.num_failed == 0
    assert result.summary.num_output_tokens == 48
    assert len({body["prompt"] for body in server.completions}) == 12


def test_a_closed_loop_over_a_duration_makes_its_prompts_as_it_goes(server):
    workload = Numbered()
    (result,) = run(server, closed(2, None, 0.5), workload=workload)
    assert result.summary.num_requests > 4  # more than the two prompts a client that are ready at the start
    assert len({body["prompt"] for body in server.completions}) == result.summary.num_requests
    assert workload.num_drawn >= result.summary.num_requests


def test_points_of_a_sweep_send_different_prompts_and_the_same_seed_sends_the_same(server):
    run(server, closed(1, 3), closed(2, 3))
    first = [body["prompt"] for body in server.completions]
    assert len(set(first)) == 6
    run(server, closed(1, 3), closed(2, 3))
    assert sorted(body["prompt"] for body in server.completions[6:]) == sorted(first)
    run(server, closed(1, 3), seed=2)
    assert not {body["prompt"] for body in server.completions[12:]} & set(first)


def test_an_open_loop_sends_at_its_arrivals_whatever_the_server_does(server):
    server.hold_until_in_flight = 20  # it answers none before all 20 are there
    (result,) = run(server, LoadPoint("open", 200.0, 20, None))
    assert server.max_in_flight == 20
    arrivals = draw_arrivals(LoadPoint("open", 200.0, 20, None), random.Random("1/0"))
    assert [outcome.intended_s for outcome in result.outcomes] == arrivals
    assert all(outcome.sent_s >= outcome.intended_s for outcome in result.outcomes)


def test_waiting_in_the_client_shows_in_the_latency_from_arrival_alone(server):
    server.chunk_delay_s = 0.02
    (result,) = run(server, LoadPoint("open", 1000.0, 6, None), max_in_flight=1, limits=Limits(ttft_s=0.03))
    summary = result.summary
    assert server.max_in_flight == 1
    last = result.outcomes[-1]
    assert last.sent_s - last.intended_s >= 4 * 4 * 0.02  # four requests of four chunks were served before it at least
    assert summary.ttft_intended.max >= summary.send_lag.max
    assert last.ttft_intended_s == pytest.approx(last.ttft_s + last.sent_s - last.intended_s)
    assert summary.goodput.num_good < 6


def test_poisson_arrivals_have_their_rate_and_end_in_time():
    point = LoadPoint("open", 50.0, None, 100.0)
    arrivals = draw_arrivals(point, random.Random(7))
    assert 4700 < len(arrivals) < 5300
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] < 100.0
    gaps = [after - before for before, after in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)


def test_failures_are_counted_by_code_and_the_others_go_on(server):
    server.fail_every = 4
    (result,) = run(server, closed(2, 12))
    assert result.summary.errors == {"429 queue_full": 3}
    assert result.summary.num_failed == 3
    assert result.summary.e2e.num_values == 9


def test_warm_up_requests_are_sent_first_and_not_measured(server):
    (result,) = run(server, closed(1, 3), num_warmup=2)
    assert result.summary.num_requests == 3
    assert len(server.completions) == 5


def test_a_failing_warm_up_ends_the_run_with_the_servers_reason(server):
    server.fail_every = 1
    with pytest.raises(WarmUpFailedError, match="429 queue_full: too many"):
        run(server, closed(1, 3), num_warmup=1)
    assert len(server.completions) == 1


def test_a_watcher_hears_of_everything(server):
    heard = []
    watcher = Watcher(
        lambda point, done, total: heard.append(("prepare", done, total)),
        lambda point: heard.append("begin"),
        lambda outcome: heard.append(outcome.index),
        lambda result: heard.append("end"),
    )
    run(server, closed(1, 2), watcher=watcher)
    assert heard == [("prepare", 1, 2), ("prepare", 2, 2), "begin", 0, 1, "end"]


def test_an_error_while_prompts_are_made_ends_the_run(server):
    class Failing(Numbered):
        async def draw(self, rng):
            if self.num_drawn == 3:
                raise UnexpectedReplyError("the tokenizer is gone")
            return await super().draw(rng)

    with pytest.raises(UnexpectedReplyError, match="tokenizer is gone"):
        run(server, closed(1, None, 20.0), workload=Failing())


def test_a_feed_without_a_source_ends_and_one_with_a_source_does_not():
    async def main():
        prompts = [Prompt(1, text="a"), Prompt(1, text="b")]
        feed = PromptFeed(prompts, None)
        assert [await feed.take() for _ in range(3)] == [(0, prompts[0]), (1, prompts[1]), None]
        workload = Numbered()
        endless = PromptFeed(prompts, lambda: workload.draw(random.Random(0)))
        taken = [await endless.take() for _ in range(5)]
        assert [index for index, _ in taken] == [0, 1, 2, 3, 4]
        await endless.close()
        assert workload.num_drawn <= 5

    asyncio.run(main())
