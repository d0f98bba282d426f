"""Sums over head-steps, and the confidence interval of what was audited."""

import random

import pytest

from vashista.engine.support import Audit, SpanSupport, SupportTally, confidence_interval, merge_reports


def support(rng: random.Random, num_heads: int) -> SpanSupport:
    num_dense = rng.randrange(num_heads)
    masses = [rng.random() for _ in range(rng.randrange(3))]
    return SpanSupport(
        num_dense=num_dense,
        tokens_attended=100 * num_heads,
        tokens_visible=1000 * num_heads,
        dropped_mass_bound=rng.random() * (num_heads - num_dense),
        dropped_mass_estimate=rng.random() * (num_heads - num_dense),
        support_gap=3.0 * (num_heads - num_dense),
        audits=[Audit(0, 0, mass, 10.0, 20.0, 30.0) for mass in masses],
    )


def test_a_request_that_ran_dense_dropped_nothing() -> None:
    tally = SupportTally(8)
    tally.add_dense(800)
    report = tally.report()
    assert report is not None
    assert (report.num_head_steps, report.dense_share, report.tokens_attended) == (8, 1.0, 100.0)
    assert (report.dropped_mass_bound, report.dropped_mass_estimate, report.support_gap) == (0.0, 0.0, None)
    assert report.audit is None


def test_nothing_is_reported_before_the_first_step_and_after_a_reset() -> None:
    tally = SupportTally(8)
    assert tally.report() is None
    tally.add_dense(800)
    tally.reset()
    assert tally.report() is None


def test_means_are_over_all_head_steps_and_the_gap_over_the_sparse_ones() -> None:
    tally = SupportTally(4)
    tally.add_dense(400)
    tally.add(SpanSupport(1, 64, 400, 1.5, 0.6, 9.0, []))
    report = tally.report()
    assert report is not None
    assert report.dense_share == pytest.approx(5 / 8)
    assert report.tokens_attended == pytest.approx(464 / 8)
    assert report.dropped_mass_bound == pytest.approx(1.5 / 8)
    assert report.dropped_mass_estimate == pytest.approx(0.6 / 8)
    assert report.support_gap == pytest.approx(3.0)


def test_merged_reports_say_what_one_request_with_all_the_steps_would() -> None:
    rng = random.Random(0)
    parts, whole = [SupportTally(6) for _ in range(3)], SupportTally(6)
    for tally in parts:
        tally.add_dense(6000)
        whole.add_dense(6000)
        for _ in range(4):
            step = support(rng, 6)
            tally.add(step)
            whole.add(step)
    merged = merge_reports([report for tally in parts if (report := tally.report())])
    expected = whole.report()
    assert merged is not None
    assert expected is not None
    assert merged.audit is not None
    assert expected.audit is not None
    for name in ("num_head_steps", "dense_share", "tokens_attended", "dropped_mass_bound", "support_gap"):
        assert getattr(merged, name) == pytest.approx(getattr(expected, name))
    for name in expected.audit.__struct_fields__:
        assert getattr(merged.audit, name) == pytest.approx(getattr(expected.audit, name))


def test_the_interval_holds_the_mean_about_as_often_as_it_says() -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(2000):
        sample = [rng.betavariate(2, 5) for _ in range(12)]
        mean = sum(sample) / 12
        deviation = (sum((x - mean) ** 2 for x in sample) / 11) ** 0.5
        low, high = confidence_interval(12, mean, deviation)
        hits += low <= 2 / 7 <= high
    assert 0.93 <= hits / 2000 <= 0.97


def test_a_single_audit_says_nothing_of_the_mean() -> None:
    assert confidence_interval(1, 0.3, 0.0) == (0.0, 1.0)
