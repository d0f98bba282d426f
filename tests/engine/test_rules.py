"""The selection rules against loops over groups, and the exact numbers about mass against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vashista.engine.attention.rules import (
    Groups,
    dropped_mass,
    dropped_mass_curve,
    group_scores,
    keep,
    keep_order,
    logits_of,
    support_gap,
    support_of,
)
from vashista.engine.support_profile import Rule

SCALE = 0.25


def case(num_tokens: int, first: int, *, seed: int = 0, heads: int = 6, kv_heads: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, 16, generator=generator, dtype=torch.float64)
    keys = torch.randn(kv_heads, num_tokens, 16, generator=generator, dtype=torch.float64) * 2 + 0.5
    return q, keys, logits_of(q, keys, SCALE)


def slices(num_tokens: int, first: int, size: int = 16) -> list[slice]:
    """Each group's tokens, counted from the first one given."""
    starts = sorted({0, *(p - first for p in range(first, first + num_tokens) if p % size == 0)})
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], num_tokens], strict=True)]


@pytest.mark.parametrize(
    ("num_tokens", "first"), [(1, 0), (16, 0), (17, 0), (15, 0), (40, 5), (3, 14), (33, 16), (2, 31)]
)
def test_groups_start_at_multiples_of_16_positions(num_tokens: int, first: int) -> None:
    groups = Groups(num_tokens, first)
    parts = slices(num_tokens, first)
    assert groups.num_groups == len(parts)
    assert groups.sizes().tolist() == [part.stop - part.start for part in parts]
    values = torch.rand(2, num_tokens)
    assert torch.allclose(groups.sums(values), torch.stack([values[:, part].sum(1) for part in parts], 1))


@pytest.mark.parametrize("rule", [Rule.MEAN, Rule.MEAN_VARIANCE, Rule.BOX])
@pytest.mark.parametrize(("num_tokens", "first"), [(1, 0), (16, 0), (17, 0), (100, 0), (40, 5), (3, 14)])
def test_a_group_scores_what_the_formula_says_for_the_best_head_of_the_query_group(
    rule: Rule, num_tokens: int, first: int
) -> None:
    q, keys, _ = case(num_tokens, first)
    scores = group_scores(rule, q, keys, SCALE, Groups(num_tokens, first))
    for kv_head in range(2):
        for group, part in enumerate(slices(num_tokens, first)):
            k = keys[kv_head, part]
            expected = []
            for head in range(3 * kv_head, 3 * kv_head + 3):
                value = math.log(len(k))
                if rule is Rule.BOX:
                    value += SCALE * float(torch.maximum(q[head] * k.amax(0), q[head] * k.amin(0)).sum())
                else:
                    value += SCALE * float(q[head] @ k.mean(0))
                if rule is Rule.MEAN_VARIANCE:
                    value += SCALE**2 / 2 * float(q[head].square() @ k.var(0, correction=0))
                expected.append(value)
            assert float(scores[kv_head, group]) == pytest.approx(max(expected))


def test_the_box_bounds_every_logit_and_the_variance_rule_is_exact_for_equal_keys() -> None:
    q, keys, logits = case(64, 0)
    groups = Groups(64)
    box = group_scores(Rule.BOX, q, keys, SCALE, groups) - math.log(16)
    best = logits.view(2, 3, 4, 16).amax((1, 3))
    assert (box >= best).all()
    same = keys[:, :1].expand(-1, 64, -1)
    mass = logits_of(q, same, SCALE).view(2, 3, 4, 16).logsumexp(3).amax(1)
    assert torch.allclose(group_scores(Rule.MEAN_VARIANCE, q, same, SCALE, groups), mass)


@given(
    st.integers(1, 200),
    st.integers(0, 40),
    st.integers(0, 260),
    st.integers(0, 40),
    st.integers(1, 80),
    st.integers(0, 9),
)
def test_what_is_kept_is_the_forced_groups_and_the_best_of_an_exact_sort(
    num_tokens: int, first: int, budget: int, num_sinks: int, num_recent: int, seed: int
) -> None:
    groups = Groups(num_tokens, first)
    # Few different scores, so that there are ties.
    scores = torch.randint(0, 4, (2, groups.num_groups), generator=torch.Generator().manual_seed(seed)).double()
    kept = keep(scores, budget, groups, num_sinks, num_recent)
    parts = slices(num_tokens, first)
    forced = {
        g
        for g, part in enumerate(parts)
        if (first + part.start) // 16 * 16 < num_sinks
        or (first + part.stop - 1) // 16 >= (first + num_tokens - num_recent) // 16
    }
    count = groups.num_groups if budget >= num_tokens else max(len(forced), budget // 16)
    for head in range(2):
        row = scores[head].tolist()
        ranked = sorted(range(len(parts)), key=lambda g: (g not in forced, -row[g] if g not in forced else g, g))
        assert set(kept[head].nonzero().flatten().tolist()) == set(ranked[:count])


def test_each_kv_head_may_have_its_own_budget() -> None:
    scores = torch.arange(20, dtype=torch.float64).flip(0).expand(2, -1)
    kept = keep(scores, [160, 320], Groups(320), num_sinks=0, num_recent=1)
    assert kept.sum(1).tolist() == [10, 20]
    assert kept[0].nonzero().flatten().tolist() == [*range(9), 19]


@pytest.mark.parametrize("rule", list(Rule))
def test_dropped_mass_is_the_share_of_the_softmax_outside_and_the_curve_says_the_same(rule: Rule) -> None:
    q, keys, logits = case(150, 7)
    groups = Groups(150, 7)
    scores = group_scores(rule, q, keys, SCALE, groups)
    forced = groups.forced(16, 32)
    curve = dropped_mass_curve(logits, keep_order(scores, forced), groups)
    assert curve.shape == (6, groups.num_groups + 1)
    assert torch.allclose(curve[:, 0], torch.ones(6, dtype=torch.float64))
    assert (curve[:, -1] == 0).all()
    for count in range(int(forced.sum()), groups.num_groups):
        kept = keep(scores, 16 * count, groups, 16, 32)
        tokens = kept[:, groups.of_tokens()].repeat_interleave(3, 0)
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        expected = (p * ~tokens).sum(1)
        assert torch.allclose(dropped_mass(logits, kept, groups), expected)
        assert torch.allclose(curve[:, count], expected, atol=1e-12)


def test_the_window_rule_keeps_the_newest_groups() -> None:
    q, keys, _ = case(160, 0)
    groups = Groups(160)
    kept = keep(group_scores(Rule.WINDOW, q, keys, SCALE, groups), 64, groups, num_sinks=16, num_recent=16)
    assert kept[0].nonzero().flatten().tolist() == [0, 7, 8, 9]


@pytest.mark.parametrize("keys_kind", ["random", "one dominates", "equal", "huge", "tiny"])
def test_no_bound_is_below_the_true_mass(keys_kind: str) -> None:
    for seed in range(50):
        q, keys, _ = case(100, 0, seed=seed)
        if keys_kind == "one dominates":
            keys[:, seed] *= 30
        elif keys_kind == "equal":
            keys = keys[:, :1].expand(-1, 100, -1).clone()
        elif keys_kind == "huge":
            keys *= 1e4
        elif keys_kind == "tiny":
            keys *= 1e-300
        logits = logits_of(q, keys, SCALE)
        groups = Groups(100)
        scores = group_scores(Rule.MEAN, q, keys, SCALE, groups)
        kept = keep(scores, 48, groups, 16, 16)
        gap, bound = support_gap(logits, kept, groups)
        assert (dropped_mass(logits, kept, groups) <= bound * (1 + 1e-9)).all()
        assert torch.isfinite(gap).all()


def test_where_nothing_is_dropped_the_gap_is_infinite_and_the_bound_zero() -> None:
    _, _, logits = case(40, 0)
    gap, bound = support_gap(logits, torch.ones(2, 3, dtype=torch.bool), Groups(40))
    assert (gap == torch.inf).all()
    assert (bound == 0).all()


def test_support_of_equal_logits_is_all_tokens_and_of_one_dominating_token_is_one() -> None:
    logits = torch.zeros(2, 1000)
    logits[1, 3] = 1e4
    support = support_of(logits)
    assert support.effective.tolist() == pytest.approx([1000, 1])
    assert support.tokens_90.tolist() == [900, 1]
    assert support.tokens_99.tolist() == [990, 1]


def test_support_is_what_sorting_and_summing_gives() -> None:
    logits = case(300, 0)[2]
    support = support_of(logits)
    for head in range(6):
        p = sorted((logits[head].exp() / logits[head].exp().sum()).tolist(), reverse=True)
        assert float(support.effective[head]) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
        for share, found in ((0.9, support.tokens_90), (0.99, support.tokens_99)):
            count = next(n for n in range(1, 301) if sum(p[:n]) >= share)
            assert float(found[head]) == count
