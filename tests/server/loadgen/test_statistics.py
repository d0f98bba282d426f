import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vashista.engine.errors import WorkloadError
from vashista.server.loadgen.lengths import LengthSpec
from vashista.server.loadgen.outcome import Outcome
from vashista.server.loadgen.statistics import Distribution, Limits, percentile, summarize

values = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(values, min_size=1, max_size=200), st.floats(0, 100))
def test_percentiles_equal_numpys(sample, percent):
    expected = np.percentile(np.array(sample), percent)
    assert math.isclose(percentile(sorted(sample), percent), expected, rel_tol=1e-9, abs_tol=1e-6)


@given(st.lists(values, min_size=1, max_size=200))
def test_a_distribution_equals_numpys_figures(sample):
    found = Distribution.of(sample)
    array = np.array(sample)
    assert found.num_values == len(sample)
    assert (found.min, found.max) == (array.min(), array.max())
    assert math.isclose(found.mean, array.mean(), rel_tol=1e-9, abs_tol=1e-6)
    assert math.isclose(found.std, array.std(), rel_tol=1e-9, abs_tol=1e-5)
    expected = np.percentile(array, [50, 90, 95, 99])
    assert np.allclose([found.p50, found.p90, found.p95, found.p99], expected, atol=1e-6)


def test_missing_values_are_left_out_of_a_distribution():
    assert Distribution.of([None, None]) is None
    assert Distribution.of([None, 2.0]).num_values == 1


def outcome(index=0, **changes):
    fields = {
        "index": index,
        "intended_s": 1.0,
        "sent_s": 1.5,
        "first_token_s": 2.0,
        "end_s": 4.0,
        "token_times_s": [2.0, 2.5, 4.0],
        "num_output_tokens": 5,
        "num_prompt_tokens": 10,
        "num_prompt_tokens_asked": 10,
        "is_counted_by_usage": True,
        "status": 200,
    }
    return Outcome(**(fields | changes))


def test_latencies_follow_their_definitions():
    one = outcome()
    assert one.ttft_s == 0.5
    assert one.ttft_intended_s == 1.0
    assert one.e2e_s == 2.5
    assert one.e2e_intended_s == 3.0
    assert one.tpot_s == (2.5 - 0.5) / (5 - 1)
    assert one.itl_s == [0.5, 1.5]


def test_one_token_has_no_time_per_output_token():
    assert outcome(num_output_tokens=1).tpot_s is None


def test_a_summary_counts_failures_but_takes_no_latency_from_them():
    failed = outcome(1, error_code="429 queue_full", first_token_s=100.0, end_s=None, num_output_tokens=0)
    summary = summarize([outcome(), failed], Limits(e2e_s=10.0), elapsed_s=11.0)
    assert (summary.num_requests, summary.num_failed, summary.errors) == (2, 1, {"429 queue_full": 1})
    assert summary.duration_s == 10.0
    assert summary.output_tokens_per_s == 0.5
    assert summary.input_tokens_per_s == 1.0
    assert summary.requests_per_s == 0.1
    assert summary.ttft.num_values == 1
    assert summary.ttft.max == 0.5
    assert (summary.goodput.num_good, summary.goodput.share, summary.goodput.requests_per_s) == (1, 0.5, 0.1)


def test_unknown_prompt_lengths_give_no_input_throughput():
    summary = summarize([outcome(), outcome(1, num_prompt_tokens=None)], None, elapsed_s=4.0)
    assert summary.input_tokens_per_s is None
    assert summary.num_input_tokens is None


@pytest.mark.parametrize(
    ("limits", "is_met"),
    [
        (Limits(ttft_s=1.0), True),
        (Limits(ttft_s=0.99), False),  # 0.5 s from sending, but 1 s from the intended time
        (Limits(tpot_s=0.5), True),
        (Limits(tpot_s=0.49), False),
        (Limits(e2e_s=3.0), True),
        (Limits(e2e_s=2.9), False),
        (Limits(ttft_s=1.0, tpot_s=0.5, e2e_s=2.9), False),
    ],
)
def test_limits_are_compared_from_the_intended_time_of_sending(limits, is_met):
    assert limits.are_met_by(outcome()) is is_met


def test_no_limit_is_met_by_a_failed_request_or_by_a_missing_first_token():
    assert not Limits(e2e_s=100.0).are_met_by(outcome(error_code="timeout"))
    assert not Limits(ttft_s=100.0).are_met_by(outcome(first_token_s=None))


def test_limits_are_read_with_their_units():
    assert Limits.parse("ttft=200ms,tpot=500us,e2e=5s") == Limits(ttft_s=0.2, tpot_s=0.0005, e2e_s=5.0)
    assert Limits.parse("e2e=1.5min") == Limits(e2e_s=90.0)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=", "ttft=5", "ttft=-1s", "ttft=nans", "itl=3ms", "e2e=1s,e2e=2s"])
def test_wrong_limits_are_named(text):
    with pytest.raises(WorkloadError, match="slo"):
        Limits.parse(text)


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("128", 128, 128), ("64:256", 64, 256), ("lognormal:100:1:10:300", 10, 300), ("lognormal:5:0.5", 1, 10_000_000)],
)
def test_drawn_lengths_lie_inside_their_bounds_and_reach_for_them(text, low, high):
    spec = LengthSpec.parse(text, param="input_len")
    drawn = [spec.draw(random.Random(seed)) for seed in range(500)]
    assert (spec.low, spec.high) == (low, high)
    assert all(low <= length <= high for length in drawn)
    assert len(set(drawn)) == 1 if low == high else len(set(drawn)) > 5


def test_the_median_of_a_lognormal_length_is_the_one_asked_for():
    rng = random.Random(1)
    spec = LengthSpec.parse("lognormal:200:0.7", param="output_len")
    assert abs(np.median([spec.draw(rng) for _ in range(4000)]) - 200) < 12


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "-3", "1.5", "9:3", "1:2:3", "abc", "99999999999"),
        *("lognormal:5", "lognormal:0:1", "lognormal:5:nan", "lognormal:5:1:9:2", "lognormal:500:1:1:20"),
    ],
)
def test_wrong_lengths_are_named(text):
    with pytest.raises(WorkloadError, match="input_len"):
        LengthSpec.parse(text, param="input_len")


@given(st.integers(1, 5000), st.integers(0, 5000))
def test_a_length_reads_back_from_its_own_text(low, extra):
    spec = LengthSpec.parse(f"{low}:{low + extra}", param="input_len")
    again = LengthSpec.parse(str(spec), param="input_len")
    assert (again.low, again.high) == (spec.low, spec.high)
