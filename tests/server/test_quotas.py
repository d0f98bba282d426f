"""Limits with a clock in hand: what is let in, what is refused until when, and that counts are the ledger's."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vashista.engine.errors import KeyLimitError, QuotaExceededError, RateLimitError
from vashista.server.keys import Key
from vashista.server.ledger.receipt import utc_text
from vashista.server.ledger.usage import Use
from vashista.server.limits import Limit, Resource, Window
from vashista.server.prices import NANO
from vashista.server.quotas import BUSY_RETRY_S, Hold, Quotas, duration_text

NOON_S = datetime.fromisoformat("2026-11-24T12:00:00+00:00").timestamp()
R, T, M = Resource.REQUESTS, Resource.TOKENS, Resource.MONEY


class Clock:
    now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


def key(*limits: tuple[Resource, Window, int], name: str = "a") -> Key:
    return Key(name, name, "", None, limits=tuple(Limit(*limit) for limit in limits))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Quotas:
    return Quotas(clock=clock)


def use(quotas: Quotas, owner: Key, num_tokens: int, *, asked: int | None = None, money: int = 0) -> None:
    hold = quotas.admit(owner, num_tokens if asked is None else asked)
    assert hold is not None
    hold.settle(num_tokens=num_tokens, money_nano=money)


def test_requests_up_to_the_limit_are_let_in_and_the_next_one_waits_for_the_next_minute(
    quotas: Quotas, clock: Clock
) -> None:
    owner = key((R, Window.MINUTE, 3))
    clock.now_s += 20.5
    for _ in range(3):
        use(quotas, owner, 10)
    with pytest.raises(RateLimitError, match="used 3 of its 3 requests/minute") as caught:
        quotas.admit(owner, 10)
    assert type(caught.value) is RateLimitError
    assert caught.value.retry_after_s == 39.5
    clock.now_s += 39.4
    with pytest.raises(RateLimitError):
        quotas.admit(owner, 10)
    clock.now_s += 0.2
    use(quotas, owner, 10)


def test_a_request_holds_the_most_that_it_may_generate_until_it_ends(quotas: Quotas) -> None:
    owner = key((T, Window.DAY, 100))
    first = quotas.admit(owner, 60)
    assert first is not None
    with pytest.raises(QuotaExceededError, match="used 0 and hold 60 for running ones") as caught:
        quotas.admit(owner, 60)
    # The first may end at any time: no need to wait until midnight.
    assert caught.value.retry_after_s == BUSY_RETRY_S
    first.settle(num_tokens=30, money_nano=0)
    first.settle(num_tokens=30, money_nano=0)
    use(quotas, owner, 70)
    with pytest.raises(QuotaExceededError, match="used 100") as caught:
        quotas.admit(owner, 1)
    assert caught.value.retry_after_s == 12 * 3600


def test_a_request_that_could_not_run_gives_everything_back(quotas: Quotas) -> None:
    owner = key((R, Window.DAY, 1), (T, Window.DAY, 10))
    hold = quotas.admit(owner, 10)
    assert hold is not None
    hold.cancel()
    hold.settle(num_tokens=10, money_nano=0)
    use(quotas, owner, 10)


def test_a_request_larger_than_a_limit_is_told_that_waiting_does_not_help(quotas: Quotas) -> None:
    owner = key((T, Window.MINUTE, 100), (T, Window.DAY, 1000))
    use(quotas, owner, 100)
    with pytest.raises(KeyLimitError, match="asks for 101 tokens; the key a may use 100 tokens/minute"):
        quotas.admit(owner, 101)


def test_of_many_limits_the_longest_wait_counts(quotas: Quotas) -> None:
    owner = key((T, Window.MINUTE, 100), (T, Window.DAY, 150))
    use(quotas, owner, 100)
    with pytest.raises(QuotaExceededError) as caught:
        quotas.admit(owner, 60)
    assert caught.value.retry_after_s == 12 * 3600
    with pytest.raises(RateLimitError) as rate:
        quotas.admit(owner, 50)
    assert rate.value.retry_after_s == 60


def test_money_ends_when_the_limit_is_reached(clock: Clock) -> None:
    quotas = Quotas(price_per_request_nano=NANO // 10, clock=clock)
    owner = key((M, Window.MONTH, NANO))
    use(quotas, owner, 5, money=NANO // 2)
    # What a request takes is known at its end: one that began below the limit may end above it.
    use(quotas, owner, 5, money=NANO)
    with pytest.raises(QuotaExceededError, match=r"used 1\.5 of its 1 money/month; this one asks for 0\.1"):
        quotas.admit(owner, 5)


def test_a_free_request_is_refused_too_once_the_money_is_gone(quotas: Quotas) -> None:
    owner = key((M, Window.DAY, 10))
    use(quotas, owner, 5, money=9)
    use(quotas, owner, 5, money=1)
    with pytest.raises(QuotaExceededError):
        quotas.admit(owner, 5)


def test_keys_do_not_share_counts_and_some_have_no_limits(quotas: Quotas) -> None:
    one, other = key((R, Window.DAY, 1)), key((R, Window.DAY, 1), name="b")
    use(quotas, one, 5)
    use(quotas, other, 5)
    with pytest.raises(QuotaExceededError):
        quotas.check(one)
    assert quotas.admit(None, 10**12) is None
    for _ in range(5):
        use(quotas, key(name="c"), 10**12)


def test_a_request_that_ends_in_the_next_window_does_not_count_there(quotas: Quotas, clock: Clock) -> None:
    owner = key((T, Window.MINUTE, 10))
    hold = quotas.admit(owner, 10)
    assert hold is not None
    clock.now_s += 60
    use(quotas, owner, 4)
    hold.settle(num_tokens=10, money_nano=0)
    use(quotas, owner, 6)
    with pytest.raises(RateLimitError):
        quotas.admit(owner, 1)


def test_a_clock_set_forward_by_mistake_and_back_does_not_wipe_out_what_was_used(quotas: Quotas, clock: Clock) -> None:
    owner = key((R, Window.MONTH, 2))
    use(quotas, owner, 1)
    clock.now_s += 400 * 86400
    use(quotas, owner, 1)
    clock.now_s -= 400 * 86400
    use(quotas, owner, 1)
    with pytest.raises(QuotaExceededError, match="used 2 of its 2 requests/month"):
        quotas.admit(owner, 1)


def test_a_limit_of_no_tokens_is_no_matter_of_waiting(quotas: Quotas) -> None:
    use(quotas, key(), 5)
    with pytest.raises(KeyLimitError, match="may use 0 tokens/day"):
        quotas.check(key((T, Window.DAY, 0)))


def test_a_limit_that_is_set_later_counts_what_was_used_before(quotas: Quotas) -> None:
    use(quotas, key(), 40)
    with pytest.raises(QuotaExceededError):
        quotas.admit(key((T, Window.DAY, 50)), 11)


def test_headers_are_openais_and_of_the_nearest_limit(quotas: Quotas, clock: Clock) -> None:
    owner = key((R, Window.MINUTE, 10), (R, Window.DAY, 12), (T, Window.DAY, 1000))
    assert quotas.headers(key()) == quotas.headers(None) == {}
    clock.now_s += 15
    use(quotas, owner, 200)
    hold = quotas.admit(owner, 300)
    assert quotas.headers(owner) == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "8",
        "x-ratelimit-reset-requests": "45s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "500",
        "x-ratelimit-reset-tokens": "11h59m45s",
    }
    assert hold is not None
    hold.cancel()
    clock.now_s += 60
    for _ in range(9):
        use(quotas, owner, 1)
    assert quotas.headers(owner)["x-ratelimit-limit-requests"] == "10"
    clock.now_s += 60
    use(quotas, owner, 1)
    headers = quotas.headers(owner)
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("12", "1")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1s"), (59.0, "59s"), (360.0, "6m0s"), (10805.0, "3h0m5s"), (-1.0, "0s")]
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


class Life(RuleBasedStateMachine):
    """Requests that begin, end and fail while time passes; limits hold, and counting again gives the same."""

    LIMITS = ((R, Window.MINUTE, 4), (R, Window.DAY, 9), (T, Window.MINUTE, 50), (T, Window.MONTH, 300))

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.quotas = Quotas(clock=self.clock)
        self.owner = key(*self.LIMITS)
        self.running: list[tuple[Hold, int, float]] = []
        self.uses: list[Use] = []
        self.retry_after_s = 1.0

    @rule(num_tokens=st.integers(0, 60))
    def begin(self, num_tokens: int) -> None:
        try:
            hold = self.quotas.admit(self.owner, num_tokens)
        except KeyLimitError:
            assert num_tokens > 50
        except RateLimitError as error:
            self.retry_after_s = error.retry_after_s
        else:
            assert hold is not None
            self.running.append((hold, num_tokens, self.clock.now_s))

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.running:
            hold, num_tokens, arrived_s = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            if data.draw(st.booleans()):
                used = data.draw(st.integers(0, num_tokens))
                hold.settle(num_tokens=used, money_nano=used)
                self.uses.append(Use("a", utc_text(arrived_s), used, used))
            else:
                hold.cancel()

    @rule(seconds=st.sampled_from([0.5, 20.0, 61.0, 40000.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def waits_end_with_a_window(self) -> None:
        assert 0 < self.retry_after_s <= 31 * 86400

    @invariant()
    def limits_hold(self) -> None:
        for resource, window, amount in self.LIMITS:
            begin_s, _ = window.span(self.clock.now_s)
            used = [use.num_tokens if resource is T else 1 for use in self.uses if use.time >= utc_text(begin_s)]
            assert sum(used) <= amount

    @invariant()
    def counting_again_gives_the_same(self) -> None:
        if not self.running:
            again = Quotas(clock=self.clock)
            again.load(self.uses)
            assert again.headers(self.owner) == self.quotas.headers(self.owner)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_counts_come_from_the_ledger_at_the_start(tmp_path: Path, clock: Clock) -> None:
    quotas = Quotas(clock=clock)
    month_s = Window.MONTH.span(NOON_S)[0]
    quotas.load(
        [
            Use("a", utc_text(NOON_S), 10, 1),
            Use("a", utc_text(NOON_S - 100), 20, 2),  # this day, another minute
            Use("a", utc_text(month_s), 40, 4),  # this month, another day
            Use("a", utc_text(month_s - 1), 80, 8),
            Use("b", utc_text(NOON_S), 160, 16),
        ]
    )
    for window, tokens, requests in ((Window.MINUTE, 10, 1), (Window.DAY, 30, 2), (Window.MONTH, 70, 3)):
        headers = quotas.headers(key((T, window, 1000), (R, window, 1000)))
        assert headers["x-ratelimit-remaining-tokens"] == str(1000 - tokens)
        assert headers["x-ratelimit-remaining-requests"] == str(1000 - requests)
