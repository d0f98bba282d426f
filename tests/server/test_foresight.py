"""What is said of a request's times holds together: none ends before its first token."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from vashista.engine.predict.conformal import Bounds
from vashista.engine.predict.predictor import Forecast
from vashista.engine.predict.timeline import Point, Timeline
from vashista.server.foresight import QUANTITIES, Foresight, scale_of

LOGS = st.floats(-8.0, 8.0)
SECONDS = st.floats(1e-6, 1e4)


@st.composite
def foresights(draw: st.DrawFn) -> Foresight:
    """Any forecast whose time does not run backwards, and bounds as any errors give them."""
    first_s, more_s, before_s = draw(SECONDS), draw(st.floats(0.0, 1e4)), draw(st.floats(0.0, 10.0))
    bounds = {name: Bounds(*sorted(draw(st.tuples(LOGS, LOGS, LOGS)))) for name in QUANTITIES}
    timeline = Timeline(0.0, first_s)
    timeline.note(Point(1.0, first_s, 0.1))
    timeline.note(Point(100.0, first_s + more_s, 0.1 + more_s))
    forecast = Forecast(timeline, 0.0, 100, "idle dense", 0.0, 0, 0, 0.01)
    return Foresight(None, forecast, [], [], before_s, bounds)


@given(foresights(), st.integers(1, 100))
def test_no_request_is_said_to_end_before_its_first_token(foresight: Foresight, num_tokens: int) -> None:
    first, total = foresight.interval("ttft_s", 1)[1], foresight.interval("total_s", num_tokens)[1]
    assert first.median <= total.median
    assert first.upper <= total.upper
    # A total's bounds are its forecast times a number: only rounding can have more tokens end earlier.
    assert first.lower <= total.lower * (1 + 1e-12)


@given(foresights(), st.integers(2, 100), st.sampled_from(QUANTITIES))
def test_each_interval_holds_what_its_own_errors_ask_for(foresight: Foresight, num_tokens: int, quantity: str) -> None:
    forecast, said = foresight.interval(quantity, num_tokens)
    own = foresight.bounds[quantity].around(forecast, scale_of(quantity, num_tokens), foresight.hitch_of(quantity))
    assert said.lower <= own.lower
    assert said.upper >= own.upper
    assert said.lower <= said.median <= said.upper
    assert math.isfinite(said.upper)


@given(foresights())
def test_the_total_of_one_token_is_said_as_its_first_token_is_where_errors_agree(foresight: Foresight) -> None:
    bounds = dict(foresight.bounds) | {"total_s": foresight.bounds["ttft_s"]}
    alike = Foresight(None, foresight.forecast, [], [], foresight.before_s, bounds)
    assert alike.interval("total_s", 1)[1] == alike.interval("ttft_s", 1)[1]
