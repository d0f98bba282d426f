"""The sampler: against transformers' warpers and scipy-free statistics, row by row and in batches."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vashista.engine.messages import SamplingParams
from vashista.engine.sampler import SamplingRow, exponentials, log_probabilities, sample

VOCAB = 50


def row(output: list[int] | None = None, forbidden: list[int] | None = None, allowed: Any = None, **values: Any) -> Any:
    values = {"seed": 0, "max_tokens": 9, **values}
    return SamplingRow(SamplingParams(**values), [1, 2, 3, *(output or [])], 3, forbidden or [], allowed)


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def frequencies(logits: torch.Tensor, num_draws: int = 4000, **values: Any) -> torch.Tensor:
    counts = torch.zeros(VOCAB)
    for start in range(0, num_draws, 500):
        rows = [row(seed=seed, **values) for seed in range(start, start + 500)]
        for token in sample(logits.expand(500, VOCAB).clone(), rows):
            counts[token] += 1
    return counts / num_draws


def test_temperature_zero_takes_the_best_token() -> None:
    logits = random_logits(4)
    assert sample(logits.clone(), [row(temperature=0.0)] * 4) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "repetition_penalty": 1.8},
    ],
)
def test_tokens_follow_the_distribution_that_transformers_computes(values: dict[str, Any]) -> None:
    logits = random_logits(1)
    scores = logits.clone()
    if "repetition_penalty" in values:
        scores = RepetitionPenaltyLogitsProcessor(values["repetition_penalty"])(torch.tensor([[1, 2, 3]]), scores)
    scores = TemperatureLogitsWarper(values["temperature"])(None, scores)
    if "min_p" in values:
        scores = MinPLogitsWarper(values["min_p"])(None, scores)
    if "top_k" in values:
        scores = TopKLogitsWarper(values["top_k"])(None, scores)
    if "top_p" in values:
        scores = TopPLogitsWarper(values["top_p"])(None, scores)
    expected = scores.softmax(-1)[0]
    drawn = frequencies(logits, **values)
    assert not drawn[expected == 0].any(), "a token that the filters exclude was drawn"
    # Five standard deviations of 4,000 draws.
    assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-6).all()


def test_the_same_seed_draws_the_same_token_whatever_runs_beside_it() -> None:
    logits = random_logits(8)
    rows = [row(seed=seed, output=[4] * seed, temperature=1.0, top_p=0.9 if seed % 2 else 1.0) for seed in range(8)]
    together = sample(logits.clone(), rows)
    assert together == [sample(logits[i : i + 1].clone(), [rows[i]])[0] for i in range(8)]


def test_draws_are_exponential_and_change_with_seed_index_and_token() -> None:
    rows = [row(seed=seed, output=[4] * index) for seed in range(20) for index in range(20)]
    numbers = exponentials(rows, VOCAB, torch.device("cpu")).flatten()
    assert len(numbers.unique()) == len(numbers)
    # Mean and variance of 20,000 draws are 1 within five standard deviations (0.035 and 0.1).
    assert abs(numbers.mean() - 1) < 0.036
    assert abs(numbers.var() - 1) < 0.1
    ranks = numbers.view(400, VOCAB).argsort(-1).argsort(-1).double()
    neighbours = torch.corrcoef(ranks)[torch.arange(399), torch.arange(1, 400)]
    assert neighbours.abs().mean() < 3 / VOCAB**0.5, "neighbouring draws are related"


def test_noise_in_the_last_bits_changes_hardly_any_draw() -> None:
    logits = torch.randn(1, 8192, generator=torch.Generator().manual_seed(0)).expand(300, 8192) * 2
    rows = [row(seed=seed, temperature=1.0) for seed in range(300)]
    # The inverse of the cumulative distribution changed 10 of 300 draws under this noise.
    noise = torch.randn(300, 8192, generator=torch.Generator().manual_seed(1)) * 1e-4
    plain, noisy = sample(logits.clone(), rows), sample(logits + noise, rows)
    assert sum(a != b for a, b in zip(plain, noisy, strict=True)) <= 1


def test_penalties_lower_what_was_said_and_only_that() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8] = 2.0, 1.5
    said = {"output": [7, 7], "temperature": 0.0}
    assert sample(logits.clone(), [row(**said)]) == [7]
    assert sample(logits.clone(), [row(**said, presence_penalty=0.4)]) == [7]
    assert sample(logits.clone(), [row(**said, presence_penalty=0.6)]) == [8]
    assert sample(logits.clone(), [row(**said, frequency_penalty=0.2)]) == [7]
    assert sample(logits.clone(), [row(**said, frequency_penalty=0.3)]) == [8]


def test_bias_and_masks_are_applied() -> None:
    logits = random_logits(1)
    best, second = logits[0].topk(2).indices.tolist()
    assert sample(logits.clone(), [row(temperature=0.0, logit_bias={second: 100.0})]) == [second]
    assert sample(logits.clone(), [row(temperature=0.0, forbidden=[best])]) == [second]
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[3, 4]] = True
    drawn = {sample(logits.clone(), [row(temperature=5.0, allowed=allowed, seed=seed)])[0] for seed in range(60)}
    assert drawn == {3, 4}


def test_a_row_without_any_possible_token_is_reported() -> None:
    nothing = torch.zeros(VOCAB, dtype=torch.bool)
    logits = random_logits(3)
    logits[2] = torch.nan
    rows = [row(temperature=1.0, allowed=nothing), row(temperature=0.0), row(temperature=1.0)]
    assert sample(logits.clone(), rows) == [-1, int(logits[1].argmax()), -1]


@given(st.floats(1e-300, 100), st.floats(0.001, 1.0), st.integers(0, VOCAB), st.integers(0, 2**63))
@settings(max_examples=100, deadline=None)
def test_any_parameters_draw_a_possible_token(temperature: float, top_p: float, top_k: int, seed: int) -> None:
    logits = random_logits(1, seed % 1000)
    logits[0, :10] = -torch.inf
    [token] = sample(logits, [row(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)])
    assert 10 <= token < VOCAB


def test_a_tiny_top_p_is_greedy() -> None:
    logits = random_logits(1)
    assert sample(logits.clone(), [row(temperature=1.0, top_p=1e-9)]) == [int(logits.argmax())]


def test_log_probabilities_and_ranks_are_those_of_the_raw_logits() -> None:
    logits = random_logits(2)
    expected = logits.log_softmax(-1)
    best = expected[0].topk(3)
    first, second = log_probabilities(logits, [5, 6], [3, 0])
    assert math.isclose(first.logprob, expected[0, 5].item(), abs_tol=1e-6)
    assert first.rank == 1 + int((expected[0] > expected[0, 5]).sum())
    assert [token for token, _ in first.top] == best.indices.tolist()
    assert second.top == []


def test_more_alternatives_than_the_vocabulary_has_are_all_of_it() -> None:
    [entry] = log_probabilities(random_logits(1), [5], [VOCAB + 10])
    assert len(entry.top) == VOCAB


def test_the_best_token_is_the_same_beside_a_drawn_one() -> None:
    """Rows of which none is drawn go another way on the CPU: ties, NaN and masks must come out alike."""
    logits = random_logits(6)
    logits[1, [7, 30]] = 50.0
    logits[2, 4] = torch.nan
    logits[3] = -torch.inf
    logits[4, 9] = torch.inf
    greedy = [row(temperature=0.0)] * 6
    beside = sample(torch.cat((logits, random_logits(1, 5))), [*greedy, row(temperature=1.0)])
    assert sample(logits.clone(), greedy) == beside[:6]
    assert beside[1:5] == [7, -1, -1, -1]
