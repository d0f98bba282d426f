"""What is learnt of the support: how much more other texts need than the sample text, and little from one reply."""

from __future__ import annotations

import math
from collections import deque

import msgspec
import pytest

from vashista.engine.messages import AttentionMode, SupportAudit, SupportReport
from vashista.engine.predict.expected_support import MAX_MODES, SupportForecast
from vashista.engine.predict.learnt_support import KEPT_AUDITS, Dropped, Learnt, SavedSupport
from vashista.engine.support_profile import Rule, SupportProfile, SupportStats

LAYERS = 2
MASS = AttentionMode(max_dropped_mass=0.1)
BUDGET = AttentionMode(token_budget=256)
NOTHING = Dropped(num=0.0, expected=0.0, found=0.0)


def forecast() -> SupportForecast:
    """Of a model whose heads need a quarter of 2,048 tokens for a dropped mass of 0.1."""
    stats = [SupportStats(**dict.fromkeys(SupportStats.__struct_fields__, 1.0))]
    profile = SupportProfile(
        model_digest="0", rule=Rule.MEAN_VARIANCE, group_tokens=16, num_sinks=16, num_recent=64, contexts=[2048],
        num_positions=[1], targets=[0.3, 0.1], layer_windows=[None] * LAYERS, tokens=[[[[128, 512]]]] * LAYERS,
        support=[[stats]] * LAYERS,
    )  # fmt: skip
    return SupportForecast((None,) * LAYERS, profile, 0)


def report(attended: float, audit: tuple[int, float] | None = None) -> SupportReport:
    """attended: of 2,048 tokens; audit: number and mean dropped mass."""
    found = None
    if audit is not None:
        numbers = dict.fromkeys(SupportAudit.__struct_fields__, audit[1])
        found = SupportAudit(**{**numbers, "num_audits": audit[0]})
    return SupportReport(
        num_head_steps=8, dense_share=0.0, tokens_attended=attended, tokens_visible=2048.0, dropped_mass_bound=1.0,
        dropped_mass_estimate=0.1, support_gap=None, audit=found,
    )  # fmt: skip


def test_what_requests_attend_to_beyond_the_profile_is_expected_of_the_next() -> None:
    support = forecast()
    before = support.over(MASS, 2000, 40).tokens_attended
    support.observe(MASS, 2000, 40, report(1.5 * before))
    assert support.over(MASS, 2000, 40).tokens_attended == pytest.approx(1.5 * before, rel=0.02)
    assert support.correction(AttentionMode(max_dropped_mass=0.2)) == 1.0


@pytest.mark.parametrize("num_running", [1, 64, 500])
def test_lessons_that_come_late_do_not_make_it_swing(num_running: int) -> None:
    """So many requests run at a time, each expected when it came, and each teaches when it ends."""
    support = forecast()
    true = 1.4 * support.over(MASS, 2000, 40).tokens_attended
    expected = deque([support.over(MASS, 2000, 40).tokens_attended] * num_running)
    seen = []
    for _ in range(2000):
        seen.append(expected.popleft())
        support.observe(MASS, 2000, 40, report(true))
        expected.append(support.over(MASS, 2000, 40).tokens_attended)
    assert max(seen) <= 1.02 * true
    assert seen[-500:] == pytest.approx([true] * 500, rel=0.02)


def test_one_odd_reply_of_many_teaches_little() -> None:
    support = forecast()
    usual = support.over(MASS, 2000, 40).tokens_attended
    for _ in range(100):
        support.observe(MASS, 2000, 40, report(usual))
    support.observe(MASS, 2000, 40, report(2 * usual))
    assert support.over(MASS, 2000, 40).tokens_attended == pytest.approx(usual, rel=0.06)


def test_what_a_token_budget_drops_beyond_the_profile_is_learnt_of_audits() -> None:
    support = forecast()
    before = support.over(BUDGET, 2000, 40).dropped_mass
    assert before is not None
    support.observe(BUDGET, 2000, 40, report(256.0, (1, 0.9)))
    after = support.over(BUDGET, 2000, 40).dropped_mass
    assert after is not None
    assert before < after < 1.4 * before, "one audit says little"
    for _ in range(300):
        support.observe(BUDGET, 2000, 40, report(256.0, (4, 2 * before)))
    assert support.over(BUDGET, 2000, 40).dropped_mass == pytest.approx(2 * before, rel=0.05)
    assert support.over(MASS, 2000, 40).dropped_mass == pytest.approx(0.1), "a limit is steered, and stays what it is"
    assert support.state().mass.num == pytest.approx(KEPT_AUDITS)
    for _ in range(2000):
        support.observe(BUDGET, 2000, 40, report(256.0, (4, before)))
    assert support.over(BUDGET, 2000, 40).dropped_mass == pytest.approx(before, rel=0.05)


def test_what_was_learnt_comes_back_and_an_unheard_of_limit_goes_first() -> None:
    support = forecast()
    for index in range(2 * MAX_MODES):
        support.observe(AttentionMode(max_dropped_mass=(index + 1) / 1000), 2000, 40, report(700.0))
    support.observe(BUDGET, 2000, 40, report(256.0, (3, 0.5)))
    saved = msgspec.json.decode(msgspec.json.encode(support.state()), type=SavedSupport)
    assert list(saved.learnt) == [(index + 1) / 1000 for index in range(MAX_MODES, 2 * MAX_MODES)]
    other = forecast()
    other.restore(saved)
    assert other.state() == support.state()
    for mode in (BUDGET, AttentionMode(max_dropped_mass=0.1)):
        assert other.over(mode, 2000, 40) == support.over(mode, 2000, 40)


@pytest.mark.parametrize(
    "saved",
    [
        SavedSupport(learnt={0.1: Learnt(num=1, log_factor=math.inf)}, mass=NOTHING),
        SavedSupport(learnt={1.5: Learnt(num=1, log_factor=0.1)}, mass=NOTHING),
        SavedSupport(learnt={0.2: Learnt(num=-1, log_factor=0.1)}, mass=NOTHING),
        SavedSupport(learnt={0.2: Learnt(num=1, log_factor=1000.0)}, mass=NOTHING),
        SavedSupport(learnt={}, mass=Dropped(num=5.0, expected=0.0, found=0.0)),
        SavedSupport(learnt={}, mass=Dropped(num=5.0, expected=1.0, found=6.0)),
        SavedSupport(learnt={}, mass=Dropped(num=1e308, expected=1e308, found=1e308)),
        SavedSupport(learnt={}, mass=Dropped(num=-1.0, expected=0.0, found=0.0)),
        SavedSupport(learnt={}, mass=Dropped(num=1.0, expected=math.nan, found=0.0)),
    ],
)
def test_numbers_that_cannot_be_are_not_taken_over(saved: SavedSupport) -> None:
    support = forecast()
    with pytest.raises(ValueError, match="a number that cannot be"):
        support.restore(saved)
    assert support.correction(MASS) == 1.0
