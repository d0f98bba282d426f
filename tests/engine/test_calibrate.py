"""Calibration: what the profile says is what the captured attention does, and what a clock showed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from vashista.engine.attention.capture import Captured
from vashista.engine.attention.rules import Groups, dropped_mass, group_scores, keep, logits_of, support_of
from vashista.engine.calibrate import CalibrationPlan, SupportTaker, calibrate
from vashista.engine.config import EngineConfig
from vashista.engine.errors import NotEnoughMemoryError
from vashista.engine.model_config import ModelConfig, load_model_config
from vashista.engine.passage_run import PassageRun
from vashista.engine.sample_text import SampleTokens, read_sample_text
from vashista.engine.support_profile import Rule, SupportProfile
from vashista.engine.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "deploy" / "models" / "reference-26m"
CONTEXTS = [160, 320]
TARGETS = (0.5, 0.1, 0.01)


@pytest.fixture(scope="module")
def model_config() -> ModelConfig:
    return load_model_config(MODEL)


@pytest.fixture(scope="module")
def passages(model_config: ModelConfig) -> list[list[int]]:
    tokenizer = Tokenizer.load(MODEL, model_config.vocab_size)
    return SampleTokens(read_sample_text(None)[:20_000], tokenizer).passages(2, CONTEXTS[-1])


def config(max_context: int = CONTEXTS[-1]) -> EngineConfig:
    return EngineConfig(
        model_dir=str(MODEL), device="cpu", attention="dense", max_context=max_context, max_running_requests=1,
        num_threads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def profile(model_config: ModelConfig, passages: list[list[int]]) -> SupportProfile:
    plan = CalibrationPlan(CONTEXTS, 4, Rule.MEAN_VARIANCE, TARGETS, 16, 32)
    return calibrate(config(), model_config, plan, passages)


@pytest.fixture(scope="module")
def captures(model_config: ModelConfig, passages: list[list[int]]) -> dict[int, list[Captured]]:
    """The same positions, captured again: by context."""
    plan = CalibrationPlan(CONTEXTS, 4)
    found: dict[int, list[Captured]] = {0: [], 1: []}

    def observe(seen: Captured) -> None:
        for index in plan.positions()[seen.position]:
            found[index].append(seen)

    run = PassageRun(config(), model_config, observe)
    for token_ids in passages:
        run.read(token_ids, plan.positions())
    return found


def mean_dropped(seen: Sequence[Captured], head: int, budget: int) -> float:
    """Mean over positions of the largest dropped mass of the query group."""
    masses = []
    for one in seen:
        q, keys = one.query.double(), one.keys.double()
        groups = Groups(keys.shape[1])
        scores = group_scores(Rule.MEAN_VARIANCE, q, keys, 0.125, groups)
        kept = keep(scores, budget, groups, 16, 32)
        masses.append(float(dropped_mass(logits_of(q, keys, 0.125), kept, groups).view(2, 4)[head].amax()))
    return sum(masses) / len(masses)


def test_the_tokens_reach_the_target_and_one_group_fewer_does_not(
    profile: SupportProfile, captures: dict[int, list[Captured]]
) -> None:
    num_binding = 0
    for layer in (0, 3, 7):
        for head in range(2):
            for index, seen in captures.items():
                here = [one for one in seen if one.layer == layer]
                assert len(here) == profile.num_positions[index] == 8
                for target, tokens in zip(TARGETS, profile.tokens[layer][head][index], strict=True):
                    assert mean_dropped(here, head, tokens) <= target + 1e-9
                    if tokens > 64:  # what 16 sinks and 32 recent tokens may take is always kept
                        num_binding += 1
                        assert mean_dropped(here, head, tokens - 16) > target - 1e-9
    assert num_binding > 20


def test_the_support_is_that_of_the_captured_attention(
    profile: SupportProfile, captures: dict[int, list[Captured]]
) -> None:
    for layer, head, index in ((0, 0, 0), (3, 1, 1), (7, 0, 1)):
        here = [one for one in captures[index] if one.layer == layer]
        supports = [support_of(logits_of(one.query.double(), one.keys.double(), 0.125)) for one in here]
        stats = profile.support[layer][head][index]
        group = slice(4 * head, 4 * head + 4)
        effective = torch.cat([support.effective[group] for support in supports])
        tokens_90 = torch.cat([support.tokens_90[group] for support in supports])
        assert stats.effective_median == pytest.approx(float(effective.quantile(0.5)), rel=1e-6)
        assert stats.effective_p90 == pytest.approx(float(effective.quantile(0.9)), rel=1e-6)
        assert stats.tokens_90_median == pytest.approx(float(tokens_90.quantile(0.5)), rel=1e-6)


def test_the_profile_is_whole_and_comes_back_from_its_file(profile: SupportProfile, tmp_path: Path) -> None:
    assert (profile.num_layers, profile.num_kv_heads, profile.contexts) == (8, 2, CONTEXTS)
    profile.save(tmp_path / "profile.json")
    assert SupportProfile.load(tmp_path / "profile.json", MODEL) == profile


def test_the_bundled_models_retrieval_head_is_found(profile: SupportProfile) -> None:
    assert profile.retrieval_heads[5, 1]
    assert profile.retrieval_heads.sum() <= 2  # over 160 tokens one more head looks back
    shipped = SupportProfile.load(MODEL / "support_profile.json", MODEL)
    assert shipped.retrieval_heads.nonzero() == ([5], [1])


def test_steps_are_timed_at_every_context(profile: SupportProfile) -> None:
    [times] = profile.devices.values()
    assert [step.context for step in times.dense_steps] == [64, *CONTEXTS]
    assert all(step.step_s > 0 for step in times.dense_steps)
    assert times.overhead_s >= 0
    assert times.dense_s_per_token >= 0
    assert times.dtype == "float32"
    assert times.sparse_steps == []  # the attention was dense
    assert times.sparse_step_s(1000, 100) is None


def synthetic(keys: torch.Tensor, query: torch.Tensor, position: int) -> Captured:
    return Captured(layer=0, position=position, first=0, query=query, keys=keys, values=keys)


def test_a_head_that_looks_everywhere_alike_needs_its_share_of_the_context(model_config: ModelConfig) -> None:
    small = msgspec.structs.replace(model_config, num_layers=1)
    taker = SupportTaker(CalibrationPlan([1600], 1, targets=(0.5, 0.1)), small)
    keys = torch.zeros(2, 1600, 64)
    keys[1, 700] = 100.0  # one token has all of the second head's mass
    taker.observe(synthetic(keys, torch.ones(8, 64), 1599))
    assert taker.tokens() == [[[[800, 1440]], [[96, 96]]]]
    even, single = (stats[0] for stats in taker.support()[0])
    assert (even.effective_median, even.tokens_90_median, even.tokens_99_median) == pytest.approx((1600, 1440, 1584))
    assert (single.effective_median, single.tokens_90_median, single.tokens_99_median) == pytest.approx((1, 1, 1))


def test_a_position_may_count_for_two_contexts() -> None:
    positions = CalibrationPlan([100, 104], 12).positions()
    assert positions[99] == [0, 1]
    assert sum(0 in places for places in positions.values()) == sum(1 in places for places in positions.values()) == 12


def test_a_context_that_the_memory_cannot_hold_is_refused_with_figures(model_config: ModelConfig) -> None:
    small = msgspec.structs.replace(config(), kv_cache_bytes=1 << 20)
    with pytest.raises(NotEnoughMemoryError, match="needs 5 KV pages; there is room for 2"):
        PassageRun(small, model_config, lambda seen: None)
