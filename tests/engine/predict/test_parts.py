"""Output lengths, arrivals and the memory of prefixes: small parts of the predictor."""

from __future__ import annotations

import random
import statistics

import pytest

from vashista.engine.messages import SamplingParams, Submit
from vashista.engine.pages import PageAllocator, root_hash
from vashista.engine.predict.arrivals import Arrivals
from vashista.engine.predict.lengths import OutputLengths
from vashista.engine.predict.prefixes import PrefixMemory
from vashista.engine.request import Request


@pytest.mark.parametrize(("generated", "limit"), [(0, 400), (0, 30), (20, 400), (100, 150)])
def test_what_is_still_to_come_is_the_mean_of_what_came(generated: int, limit: int) -> None:
    source = random.Random(1)

    def length() -> int:
        return max(1, round(source.expovariate(1 / 40)))

    lengths = OutputLengths()
    for _ in range(4000):
        true, most = length(), source.choice([30, 150, 400])
        lengths.observe(min(true, most), has_stopped=true <= most)
    longer = [min(one, limit) - generated for one in (length() for _ in range(40_000)) if one > generated]
    assert lengths.remaining(generated, limit) == pytest.approx(statistics.mean(longer), rel=0.15)


def test_without_examples_requests_go_nearly_to_their_limit() -> None:
    assert OutputLengths().remaining(0, 100) > 90
    assert OutputLengths().remaining(99, 100) == 1
    assert OutputLengths().remaining(100, 100) == 0


def test_lengths_that_are_restored_say_the_same_and_nonsense_is_refused() -> None:
    lengths, again = OutputLengths(), OutputLengths()
    for index in range(200):
        lengths.observe(index % 50 + 1, has_stopped=True)
    again.restore(lengths.state())
    assert again.remaining(3, 200) == lengths.remaining(3, 200)
    with pytest.raises(ValueError, match="no output lengths"):
        again.restore(([1.0], [2.0]))


def test_the_rate_follows_that_of_independent_clients() -> None:
    source, arrivals, now_s = random.Random(2), Arrivals(), 0.0
    while now_s < 400.0:
        now_s += source.expovariate(8.0 if now_s < 200 else 4.0)
        arrivals.observe(now_s, [(100, 50)], is_met=True)
    assert arrivals.rate(now_s) == pytest.approx(4.0, rel=0.3)
    assert arrivals.usual_size == pytest.approx((100.0, 50.0))
    assert arrivals.rate(now_s + 400.0) == 0.0


def test_a_few_long_requests_among_many_short_ones_are_not_what_usually_comes() -> None:
    arrivals = Arrivals()
    for index in range(200):
        arrivals.observe(index / 10, [(4000, 60) if index % 5 == 0 else (100, 60)], is_met=True)
    num_prompt, max_tokens = arrivals.usual_size
    assert num_prompt == pytest.approx((100**4 * 4000) ** (1 / 5), rel=0.05)
    assert max_tokens == pytest.approx(60)
    arrivals.observe(20.0, [(0, 0)], is_met=True)  # all of its prompt is in the cache
    assert arrivals.usual_size[0] > 1


def test_seconds_in_which_nobody_was_there_do_not_count() -> None:
    source, arrivals, now_s = random.Random(3), Arrivals(), 0.0
    for _ in range(100):
        arrivals.observe(now_s, [(9, 9)], is_met=False)
        for _ in range(8):
            now_s += source.expovariate(4.0)
            arrivals.observe(now_s, [(9, 9)], is_met=True)
        arrivals.rest(now_s)
        now_s += 5.0
    assert arrivals.rate(now_s) == pytest.approx(4.0, rel=0.45)


def test_of_one_client_that_waits_for_each_answer_no_other_is_expected() -> None:
    arrivals = Arrivals()
    for second in range(50):
        arrivals.observe(float(second), [(9, 9)], is_met=False)
        arrivals.rest(second + 0.9)
    assert arrivals.rate(50.5) == 0.0


def test_a_burst_is_no_rate() -> None:
    arrivals = Arrivals()
    arrivals.observe(7.0, [(1, 1)], is_met=False)
    for _ in range(5):
        arrivals.observe(7.0, [(1, 1)], is_met=True)
    assert arrivals.rate(7.001) < 2.0


def test_prefixes_are_found_as_the_cache_finds_them() -> None:
    source, memory, pages = random.Random(3), PrefixMemory(1000, 4), PageAllocator(1000)
    for number in range(100):
        prompt = [source.randint(0, 1) for _ in range(source.randint(1, 30))]
        request = Request(Submit(str(number), prompt, SamplingParams(seed=0, max_tokens=1), 0.0), root_hash("m"))
        hashes = request.update_hashes(4)
        usable = hashes[: (len(prompt) - 1) // 4]
        assert memory.num_cached(prompt) == 4 * pages.count_cached(usable)[0]
        memory.add(prompt)
        held = pages.match(hashes)
        held += pages.allocate(len(hashes) - len(held)) or []
        for page, page_hash in zip(held, hashes, strict=True):
            pages.publish(page, page_hash)
        pages.free(held)


def test_other_salts_share_nothing_and_the_oldest_is_forgotten() -> None:
    memory = PrefixMemory(2, 4)
    memory.add(list(range(8)), "a")
    assert memory.num_cached(list(range(9)), "a") == 8
    assert memory.num_cached(list(range(9)), "b") == 0
    memory.add(list(range(50, 58)), "a")
    assert memory.num_cached(list(range(9)), "a") == 0
