from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vashista.engine.errors import SettingsError
from vashista.server.limits import Limit, Resource, Window, amount_text, limits_text, parse_limit
from vashista.server.prices import NANO


@pytest.mark.parametrize(
    ("window", "begin", "end"),
    [
        (Window.MINUTE, "2028-02-29T23:59:00", "2028-03-01T00:00:00"),
        (Window.DAY, "2028-02-29T00:00:00", "2028-03-01T00:00:00"),
        (Window.MONTH, "2028-02-01T00:00:00", "2028-03-01T00:00:00"),
    ],
)
def test_windows_are_those_of_the_calendar_in_utc(window: Window, begin: str, end: str) -> None:
    now_s = datetime.fromisoformat("2028-02-29T23:59:59.5+00:00").timestamp()
    span = tuple(datetime.fromtimestamp(edge_s, UTC).strftime("%Y-%m-%dT%H:%M:%S") for edge_s in window.span(now_s))
    assert span == (begin, end)


@given(st.floats(0, 4e9), st.sampled_from(Window))
def test_every_moment_lies_in_its_window_and_windows_touch(now_s: float, window: Window) -> None:
    begin_s, end_s = window.span(now_s)
    assert begin_s <= now_s < end_s
    assert window.span(end_s)[0] == end_s
    assert window.span(begin_s) == (begin_s, end_s)


@pytest.mark.parametrize(
    ("resource", "text", "expected"),
    [
        (Resource.REQUESTS, "60/minute", (Window.MINUTE, 60)),
        (Resource.TOKENS, "1e6/day", (Window.DAY, 1_000_000)),
        (Resource.TOKENS, "0/month", (Window.MONTH, 0)),
        (Resource.MONEY, "25.50/month", (Window.MONTH, 25_500_000_000)),
        (Resource.MONEY, "0.000000001/minute", (Window.MINUTE, 1)),
        (Resource.MONEY, "none/minute", (Window.MINUTE, None)),
    ],
)
def test_limits_are_read_as_they_are_written(
    resource: Resource, text: str, expected: tuple[Window, int | None]
) -> None:
    assert parse_limit(resource, text) == expected


@pytest.mark.parametrize(
    ("resource", "text", "reason"),
    [
        (Resource.REQUESTS, "60", "such as 60/minute"),
        (Resource.REQUESTS, "60/week", "such as 60/minute"),
        (Resource.REQUESTS, "sixty/day", "not a number"),
        (Resource.REQUESTS, "-1/day", "from 0 to"),
        (Resource.TOKENS, "1e30/day", "from 0 to"),
        (Resource.TOKENS, "NaN/day", "from 0 to"),
        (Resource.TOKENS, "Infinity/day", "from 0 to"),
        (Resource.TOKENS, "1.5/day", "a fraction"),
        (Resource.MONEY, "0.0000000001/day", "nine decimals"),
        (Resource.MONEY, "1e10/day", "from 0 to 1000000000"),
    ],
)
def test_a_wrong_limit_says_what_is_possible(resource: Resource, text: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as caught:
        parse_limit(resource, text)
    assert caught.value.message.startswith(f"--{resource} is {text!r}: ")


@given(st.integers(0, 10**18), st.sampled_from(Window))
def test_the_text_of_an_amount_reads_back(amount: int, window: Window) -> None:
    resource = Resource.MONEY if amount > 10**15 else Resource.TOKENS
    assert parse_limit(resource, f"{amount_text(resource, amount)}/{window}") == (window, amount)


def test_limits_are_listed_in_one_line() -> None:
    limits = [Limit(Resource.TOKENS, Window.DAY, 5), Limit(Resource.MONEY, Window.MONTH, 3 * NANO // 2)]
    assert limits_text(limits) == "1.5 money/month, 5 tokens/day"
    assert limits_text([]) == "-"
