"""The diagnosis of captured queries: both parts of it on keys whose answer is known, and on the bundled model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from vashista.engine.attention.capture import Captured
from vashista.engine.config import EngineConfig
from vashista.engine.diagnose import Diagnosis, DiagnosisPlan, diagnose, diagnose_heads
from vashista.engine.model_config import load_model_config
from vashista.engine.sample_text import SampleTokens, read_sample_text
from vashista.engine.support_profile import Rule
from vashista.engine.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "deploy" / "models" / "reference-26m"
PLAN = DiagnosisPlan([0], [0], Rule.MEAN, token_budget=32)


def seen(query: torch.Tensor, keys: torch.Tensor) -> Captured:
    return Captured(0, keys.shape[1] - 1, 0, query, keys, keys)


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    model_config = load_model_config(MODEL)
    tokenizer = Tokenizer.load(MODEL, model_config.vocab_size)
    [token_ids] = SampleTokens(read_sample_text(None)[:20_000], tokenizer).passages(1, 400)
    config = EngineConfig(
        model_dir=str(MODEL), device="cpu", attention="dense", max_context=400, max_running_requests=1, num_threads=1
    )
    plan = DiagnosisPlan([2, 5], [300, 399], token_budget=128)
    return diagnose(config, model_config, plan, token_ids)


def test_every_query_head_of_the_chosen_layers_and_positions_is_there_once(found: Diagnosis) -> None:
    places = [(head.position, head.layer, head.head) for head in found.heads]
    assert sorted(places) == [(p, layer, head) for p in (300, 399) for layer in (2, 5) for head in range(8)]
    assert all(head.kv_head == head.head // 4 and head.num_keys == head.position + 1 for head in found.heads)


def test_on_the_bundled_model_the_theorem_holds_with_the_predicted_constant(found: Diagnosis) -> None:
    checks = [head.hull.theorem for head in found.heads if head.hull.theorem is not None]
    assert len(checks) == 32  # no query of this model was seen inside its hull
    assert all(head.hull.is_solved and head.hull.accuracy < 1e-5 * head.hull.radius for head in found.heads)
    for check in checks:
        assert check.num_violations == 0
        assert check.relaxed[-1].in_regime
        assert 0.9 < check.exponent < 1.2
    # A key of little weight on the face puts the limit off to a smaller eps: all come nearer, most have arrived.
    limits = [check for check in checks if check.predicted_constant > 0]
    assert len(limits) > 24
    for check in limits:
        away = [abs(point.displacement / point.eps - check.predicted_constant) for point in check.relaxed[-3:]]
        assert away[2] < away[1] < away[0]
    arrived = [check.linear_constant == pytest.approx(check.predicted_constant, rel=0.05) for check in limits]
    assert sum(arrived) >= 0.85 * len(limits)


def test_on_the_bundled_model_no_bound_is_below_the_dropped_mass(found: Diagnosis) -> None:
    for head in found.heads:
        assert 0 < head.softmax.dropped_mass <= head.softmax.dropped_mass_bound < 1
        assert head.softmax.tokens_kept <= 128
        assert 1 <= head.softmax.tokens_90 <= head.softmax.tokens_99 <= head.num_keys


def test_a_query_in_the_hull_of_its_keys_has_no_support_gap_but_a_softmax_as_any_other() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 200, 4, generator=generator)
    inside, outside = diagnose_heads(seen(torch.tensor([[0.0] * 4, [50.0] * 4]), keys), PLAN, scale=0.5)
    assert inside.hull.is_inside
    assert inside.hull.theorem is None
    assert math.isnan(inside.hull.support_gap)
    assert inside.softmax.effective_support == pytest.approx(200)
    assert not outside.hull.is_inside
    assert outside.hull.theorem is not None
    assert outside.hull.support_gap > 0
    assert outside.softmax.effective_support < 5


def test_where_the_budget_covers_all_keys_nothing_is_dropped() -> None:
    keys = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(1))
    for head in diagnose_heads(seen(torch.ones(2, 4), keys), PLAN, scale=0.5):
        assert head.softmax.tokens_kept == 20
        assert head.softmax.dropped_mass == head.softmax.dropped_mass_bound == 0.0
        assert head.softmax.support_gap == math.inf


def test_one_key_and_equal_keys_are_diagnosed_too() -> None:
    for num_keys in (1, 50):
        keys = torch.ones(1, num_keys, 4)
        [head] = diagnose_heads(seen(torch.zeros(1, 4), keys), PLAN, scale=0.5)
        assert head.hull.distance == pytest.approx(2.0)
        assert head.hull.face_size == num_keys
        assert head.hull.theorem is None
        [head] = diagnose_heads(seen(torch.ones(1, 4), keys), PLAN, scale=0.5)
        assert head.hull.is_inside
