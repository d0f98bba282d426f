"""Budgets and audits of sparse requests: from modes, profiles and what audits found."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from vashista.engine.attention.interface import AttentionShape
from vashista.engine.attention.policy import AttentionPolicy, PolicyOptions, RequestPolicy, make_policy
from vashista.engine.attention.steering import RATIO
from vashista.engine.config import EngineConfig
from vashista.engine.errors import SupportProfileMismatchError
from vashista.engine.messages import AttentionMode
from vashista.engine.step import EVERYTHING
from vashista.engine.support import Audit, SpanSupport
from vashista.engine.support_profile import Rule, SupportProfile, SupportStats

LAYERS, HEADS = 3, 2


def start(
    mode: AttentionMode,
    *,
    rate: float = 0.0,
    dense_below: int = 0,
    window: int | None = None,
    has_estimates: bool = True,
) -> RequestPolicy:
    windows = (window, None, None)
    shape = AttentionShape(LAYERS, 4, HEADS, 64, 0.125, 64, windows, torch.float32, torch.device("cpu"))
    return AttentionPolicy(shape, None, PolicyOptions(rate, dense_below, has_estimates)).start(mode)


def audited(mass: float, *pairs: tuple[int, int]) -> SpanSupport:
    """What a step without estimates left out, seen by audits of these heads, or of all."""
    found = pairs or tuple(np.ndindex(LAYERS, HEADS))
    return SpanSupport(0, 0, 0, 0.0, 0.0, 0.0, [Audit(layer, head, mass, 1.0, 1.0, 1.0) for layer, head in found])


def estimated(mass: float | NDArray[np.float64]) -> SpanSupport:
    """What a step without audits left out."""
    return SpanSupport(0, 0, 0, 0.0, 0.0, 0.0, [], np.broadcast_to(np.asarray(mass), (LAYERS, HEADS)))


def test_a_token_budget_is_every_heads_budget_whatever_audits_say() -> None:
    policy = start(AttentionMode(token_budget=256))
    policy.learn(audited(0.9))
    policy.learn(estimated(0.9))
    selection = policy.select(5000)
    assert selection is not None
    assert torch.equal(selection.budgets, torch.full((LAYERS, HEADS), 256, dtype=torch.int32))


@pytest.mark.parametrize("context", [1, 255, 256])
def test_a_budget_that_covers_the_context_selects_nothing(context: int) -> None:
    assert start(AttentionMode(token_budget=256)).select(context) is None


def test_short_contexts_are_attended_to_in_full() -> None:
    policy = start(AttentionMode(token_budget=256), dense_below=2048)
    assert policy.select(2047) is None
    assert policy.select(2048) is not None


def test_a_head_above_its_target_gets_more_until_it_is_dense() -> None:
    policy = start(AttentionMode(max_dropped_mass=0.05))
    first = policy.select(10_000)
    assert first is not None
    masses = np.full((LAYERS, HEADS), 0.05 / RATIO["cpu"])
    masses[1, 1] = 0.2
    policy.learn(estimated(masses))
    more = policy.select(10_000)
    assert more is not None
    assert int(more.budgets[1, 1]) > int(first.budgets[1, 1])
    assert more.budgets[0].tolist() == first.budgets[0].tolist()
    for _ in range(20):
        policy.learn(estimated(0.2))
    assert policy.select(10_000) is None


def test_without_estimates_a_head_above_its_target_gets_more_until_it_is_dense() -> None:
    policy = start(AttentionMode(max_dropped_mass=0.05), has_estimates=False)
    first = policy.select(10_000)
    assert first is not None
    policy.learn(audited(0.2, (1, 1)))
    more = policy.select(10_000)
    assert more is not None
    assert int(more.budgets[1, 1]) > int(more.budgets[0, 0]) > int(first.budgets[0, 0])
    for _ in range(30):
        policy.learn(audited(0.2))
    assert policy.select(10_000) is None


def test_a_head_below_its_target_gets_less_and_one_head_more_than_the_others() -> None:
    policy = start(AttentionMode(max_dropped_mass=0.1), has_estimates=False)
    first = policy.select(10_000)
    policy.learn(audited(0.01, (2, 1)))
    second = policy.select(10_000)
    assert first is not None
    assert second is not None
    assert (second.budgets < first.budgets).all()
    assert second.budgets[2, 1] < second.budgets[0, 0]


def test_audits_alone_move_the_mean_to_the_target() -> None:
    policy = start(AttentionMode(max_dropped_mass=0.05), has_estimates=False)
    masses = []
    for step in range(400):
        selection = policy.select(16_384)
        budget = 16_384 if selection is None else int(selection.budgets[step % LAYERS, step % HEADS])
        mass = max(0.0, 1 - budget / 16_384) ** 4
        masses.append(mass)
        policy.learn(audited(mass, (step % LAYERS, step % HEADS)))
    assert sum(masses[200:]) / 200 == pytest.approx(0.05, rel=0.2)


@pytest.mark.parametrize("target", [0.03, 0.1, 0.2])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_estimates_and_audits_move_every_heads_mean_to_the_target(target: float, share: float) -> None:
    """Steps differ tenfold in what they drop, and heads in what they need; the estimate sees a share of the mass."""
    policy = start(AttentionMode(max_dropped_mass=target), rate=1 / 40)
    random, masses = np.random.default_rng(0), []
    needs = np.array([[1.0, 1.1], [1.2, 1.25], [1.3, 1.4]])
    for _ in range(1500):
        selection = policy.select(16_384)
        budgets = np.full((LAYERS, HEADS), 16_384) if selection is None else selection.budgets.numpy()
        mass = np.maximum(0.0, 1 - budgets / 16_384) ** needs * random.uniform(0.1, 1.0)
        masses.append(mass)
        if selection is not None:
            found = [Audit(*pair, float(mass[pair]), 1.0, 1.0, 1.0) for pair in selection.audits]
            policy.learn(SpanSupport(0, 0, 0, 0.0, 0.0, 0.0, found, share * mass))
    assert np.mean(masses[500:], 0).flatten().tolist() == pytest.approx([target] * 6, rel=0.25)


@pytest.mark.parametrize("rate", [1 / 64, 1 / 7, 1.0])
def test_audits_come_at_their_rate_and_visit_all_heads(rate: float) -> None:
    policy = start(AttentionMode(token_budget=256), rate=rate)
    found = []
    for context in range(5000, 5700):
        selection = policy.select(context)
        assert selection is not None
        assert len(set(selection.audits)) == len(selection.audits)
        found += selection.audits
    assert len(found) == pytest.approx(700 * LAYERS * HEADS * rate, abs=1)
    assert set(found) == {(layer, head) for layer in range(LAYERS) for head in range(HEADS)}
    counts = [found.count(pair) for pair in set(found)]
    assert max(counts) - min(counts) <= 1


def test_a_head_whose_window_its_budget_covers_is_not_audited() -> None:
    policy = start(AttentionMode(token_budget=256), rate=1.0, window=200)
    selection = policy.select(5000)
    assert selection is not None
    assert {layer for layer, _ in selection.audits} == {1, 2}


@pytest.mark.parametrize("has_estimates", [False, True])
def test_heads_that_became_dense_for_one_bad_step_come_back(has_estimates: bool) -> None:
    policy = start(AttentionMode(max_dropped_mass=0.1), rate=1.0, has_estimates=has_estimates)
    policy.learn(estimated(1.0) if has_estimates else audited(1.0))
    policy.learn(estimated(1.0) if has_estimates else audited(1.0))
    assert policy.select(4000) is None
    found = [policy.select(context) for context in range(4001, 4100)]
    assert any(selection is not None for selection in found)


@pytest.mark.parametrize("has_estimates", [False, True])
def test_a_reset_policy_decides_as_it_did_the_first_time(has_estimates: bool) -> None:
    policy = start(AttentionMode(max_dropped_mass=0.05), rate=0.3, has_estimates=has_estimates)

    def replay() -> list[tuple[list[int], list[tuple[int, int]]]]:
        seen = []
        for context in range(3000, 3050):
            selection = policy.select(context)
            assert selection is not None
            seen.append((selection.budgets.flatten().tolist(), selection.audits))
            mass = 0.05 + 0.001 * (context % 7)
            found = [Audit(*pair, mass, 1.0, 1.0, 1.0) for pair in selection.audits]
            policy.learn(SpanSupport(0, 0, 0, 0.0, 0.0, 0.0, found, np.full((LAYERS, HEADS), mass / 2)))
        return seen

    first = replay()
    policy.reset()
    assert replay() == first


def test_a_profile_of_other_layers_or_heads_is_refused() -> None:
    shape = AttentionShape(LAYERS, 4, HEADS, 64, 0.125, 64, (None,) * LAYERS, torch.float32, torch.device("cpu"))
    heads = [[[96]]] * HEADS
    stats = [SupportStats(**dict.fromkeys(SupportStats.__struct_fields__, 1.0))]
    profile = SupportProfile(
        model_digest="0", rule=Rule.MEAN_VARIANCE, group_tokens=16, num_sinks=16, num_recent=64, contexts=[2048],
        num_positions=[1], targets=[0.1], layer_windows=[None] * LAYERS, tokens=[heads] * LAYERS,
        support=[[stats] * HEADS] * LAYERS,
    )  # fmt: skip
    config = EngineConfig(model_dir="", attention="vashista")
    assert make_policy(config, shape, profile).profile is profile
    for tokens in ([heads] * (LAYERS - 1), [heads[:1]] * LAYERS):
        with pytest.raises(SupportProfileMismatchError, match="the model has 3 layers with 2"):
            make_policy(config, shape, replace(profile, tokens=tokens))


@pytest.mark.parametrize("mode", [AttentionMode(token_budget=256), AttentionMode(max_dropped_mass=0.2)])
def test_retrieval_heads_attend_to_everything_and_are_not_audited(mode: AttentionMode) -> None:
    stats = SupportStats(
        effective_median=1.0, effective_p90=1.0, tokens_90_median=1.0, tokens_90_p90=1.0, tokens_99_median=1.0,
        tokens_99_p90=1.0,
    )  # fmt: skip
    profile = SupportProfile(
        model_digest="0", rule=Rule.MEAN_VARIANCE, group_tokens=16, num_sinks=16, num_recent=64, contexts=[2048],
        num_positions=[1], targets=[0.1], layer_windows=[None] * LAYERS, tokens=[[[[128]]] * HEADS] * LAYERS,
        support=[[[stats]] * HEADS] * LAYERS, retrieval=[[0.0, 0.0], [0.9, 0.0], [0.0, 0.1]],
    )  # fmt: skip
    shape = AttentionShape(LAYERS, 4, HEADS, 64, 0.125, 64, (None,) * 3, torch.float32, torch.device("cpu"))
    policy = AttentionPolicy(shape, profile, PolicyOptions(audit_rate=1.0, dense_below=0)).start(mode)
    selection = policy.select(5000)
    assert selection is not None
    whole = selection.budgets == EVERYTHING
    assert whole.tolist() == [[False, False], [True, False], [False, False]]
    assert sorted(selection.audits) == [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1)]


def test_a_tiny_target_ends_nearly_dense() -> None:
    policy = start(AttentionMode(max_dropped_mass=1e-9))
    masses = []
    for step in range(400):
        selection = policy.select(16_384)
        budget = 16_384 if selection is None else int(selection.budgets[step % LAYERS, step % HEADS])
        mass = max(0.0, 1 - budget / 16_384) ** 2 / 4
        masses.append(mass)
        if selection is not None:
            policy.learn(estimated(np.maximum(0.0, 1 - selection.budgets.numpy() / 16_384) ** 2 / 4))
    assert sum(masses[200:]) / 200 < 0.002


def test_estimates_take_no_budget_below_what_the_profile_says_before_audits_have_seen_its_head() -> None:
    policy = start(AttentionMode(max_dropped_mass=0.1))
    first = policy.select(10_000)
    for _ in range(30):
        policy.learn(estimated(0.0))
    last = policy.select(10_000)
    assert first is not None
    assert last is not None
    assert last.budgets.tolist() == first.budgets.tolist()
    small, none = Audit(1, 0, 0.001, 1.0, 1.0, 1.0), Audit(2, 0, 0.0, 1.0, 1.0, 1.0)
    masses = np.full((LAYERS, HEADS), 0.001)
    masses[2, 0] = 0.0  # of a head that attended to everything an audit says nothing
    for _ in range(30):
        policy.learn(SpanSupport(0, 0, 0, 0.0, 0.0, 0.0, [small, none], masses))
    fallen = policy.select(10_000)
    assert fallen is not None
    assert (fallen.budgets < first.budgets).tolist() == [[False, False], [True, False], [False, False]]


def test_audits_of_short_replies_begin_with_other_heads_after_other_prompts() -> None:
    shape = AttentionShape(LAYERS, 4, HEADS, 64, 0.125, 64, (None,) * 3, torch.float32, torch.device("cpu"))
    policy = AttentionPolicy(shape, None, PolicyOptions(audit_rate=1 / 6, dense_below=0))

    def first_audit(prompt: list[int], seed: int = 0) -> tuple[int, int]:
        request = policy.start(AttentionMode(token_budget=256), prompt, seed)
        found = [request.select(context) for context in (5000, 5001)]
        request.reset()
        again = [request.select(context) for context in (5000, 5001)]
        audits = [pair for selection in found if selection is not None for pair in selection.audits]
        assert audits == [pair for selection in again if selection is not None for pair in selection.audits]
        return audits[0]

    seen = {first_audit([7, index, 7]) for index in range(60)}
    assert seen == set(policy.order)
    assert first_audit([1, 2, 3]) == first_audit([1, 2, 3])
    assert {first_audit([1, 2, 3], seed) for seed in range(6)} == seen, "nor after other seeds, as choices have them"


def test_a_head_of_which_nothing_is_known_attends_to_everything() -> None:
    policy = start(AttentionMode(max_dropped_mass=0.05))
    masses = np.full((LAYERS, HEADS), 0.05 / RATIO["cpu"])
    masses[2, 0] = np.nan
    for _ in range(20):
        policy.learn(estimated(masses))
    selection = policy.select(10_000)
    assert selection is not None
    assert int(selection.budgets[2, 0]) > 10_000
    assert int(selection.budgets[2, 1]) < 10_000
