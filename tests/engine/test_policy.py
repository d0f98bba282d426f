"""Budgets and audits of sparse requests: from modes, profiles and what audits found."""

import pytest
import torch
from msgspec.structs import replace

from vashista.engine.attention.interface import AttentionShape
from vashista.engine.attention.policy import AttentionPolicy, PolicyOptions, RequestPolicy, make_policy
from vashista.engine.config import EngineConfig
from vashista.engine.errors import SupportProfileMismatchError
from vashista.engine.messages import AttentionMode
from vashista.engine.step import EVERYTHING
from vashista.engine.support import Audit
from vashista.engine.support_profile import Rule, SupportProfile, SupportStats

LAYERS, HEADS = 3, 2


def start(mode: AttentionMode, *, rate: float = 0.0, dense_below: int = 0, window: int | None = None) -> RequestPolicy:
    windows = (window, None, None)
    shape = AttentionShape(LAYERS, 4, HEADS, 64, 0.125, 64, windows, torch.float32, torch.device("cpu"))
    return AttentionPolicy(shape, None, PolicyOptions(rate, dense_below)).start(mode)


def audit(mass: float, layer: int = 0, head: int = 0) -> Audit:
    return Audit(layer, head, mass, 1.0, 1.0, 1.0)


def test_a_token_budget_is_every_heads_budget_whatever_audits_say() -> None:
    policy = start(AttentionMode(token_budget=256))
    policy.learn([audit(0.9)])
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
    for _ in range(3):
        policy.learn([audit(0.2, layer=1, head=1)])
    more = policy.select(10_000)
    assert more is None or int(more.budgets[1, 1]) > int(first.budgets[1, 1])
    for _ in range(20):
        policy.learn([audit(0.2, layer, head) for layer in range(LAYERS) for head in range(HEADS)])
    assert policy.select(10_000) is None


def test_a_head_below_its_target_gets_less_and_one_head_more_than_the_others() -> None:
    policy = start(AttentionMode(max_dropped_mass=0.1))
    first = policy.select(10_000)
    policy.learn([audit(0.01, layer=2, head=1)])
    second = policy.select(10_000)
    assert first is not None
    assert second is not None
    assert (second.budgets < first.budgets).all()
    assert second.budgets[2, 1] < second.budgets[0, 0]


def test_budgets_move_the_mean_to_the_target() -> None:
    policy = start(AttentionMode(max_dropped_mass=0.05))
    masses = []
    for step in range(400):
        selection = policy.select(16_384)
        budget = 16_384 if selection is None else int(selection.budgets[step % LAYERS, step % HEADS])
        mass = max(0.0, 1 - budget / 16_384) ** 4
        masses.append(mass)
        policy.learn([audit(mass, step % LAYERS, step % HEADS)])
    assert sum(masses[200:]) / 200 == pytest.approx(0.05, rel=0.2)


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


def test_heads_that_became_dense_for_one_bad_step_come_back() -> None:
    policy = start(AttentionMode(max_dropped_mass=0.1), rate=1.0)
    policy.learn([audit(1.0, layer, head) for layer in range(LAYERS) for head in range(HEADS)])
    policy.learn([audit(1.0, layer, head) for layer in range(LAYERS) for head in range(HEADS)])
    assert policy.select(4000) is None
    found = [policy.select(context) for context in range(4001, 4100)]
    assert found[-1] is not None


def test_a_reset_policy_decides_as_it_did_the_first_time() -> None:
    policy = start(AttentionMode(max_dropped_mass=0.05), rate=0.3)

    def replay() -> list[tuple[list[int], list[tuple[int, int]]]]:
        seen = []
        for context in range(3000, 3050):
            selection = policy.select(context)
            assert selection is not None
            seen.append((selection.budgets.flatten().tolist(), selection.audits))
            policy.learn([audit(0.05 + 0.001 * (context % 7), *pair) for pair in selection.audits])
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
        policy.learn([audit(mass, step % LAYERS, step % HEADS)])
    assert sum(masses[200:]) / 200 < 0.002
