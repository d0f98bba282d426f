"""The selection is the set that a stable sort of the scores gives."""

import math

import pytest
import torch

from vashista.kernels.triton_guard import jit, tl
from vashista.kernels.unit_search import choose_units
from vashista.kernels.unit_select import clean_scores, select_reference


@jit()
def _choose_kernel(scores, forced, kept, count, num_scores, num_units, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: N803
    index = tl.arange(0, BLOCK)
    score = tl.load(scores + index, mask=index < num_scores, other=float("-inf"))
    is_forced = tl.load(forced + index, mask=index < num_scores, other=0) != 0
    num_forced = tl.sum((is_forced & (score > float("-inf"))).to(tl.int32), 0)
    key = tl.where(is_forced, float("-inf"), score)
    need = tl.maximum(num_units - num_forced, 0)
    is_kept, num_kept = choose_units(key, need, need, BLOCK, COLUMNS)
    is_kept = is_kept | (is_forced & (score > float("-inf")))
    tl.store(kept + index, is_kept.to(tl.int32), mask=index < num_scores)
    tl.store(count, num_kept + num_forced)


@jit()
def _clean_kernel(scores, BLOCK: tl.constexpr):  # noqa: N803
    index = tl.arange(0, BLOCK)
    tl.store(scores + index, clean_scores(tl.load(scores + index)))


def choose(scores, forced, num_units):
    kept = torch.zeros(len(scores), dtype=torch.int32, device=scores.device)
    count = torch.zeros(1, dtype=torch.int32, device=scores.device)
    block = max(16, 1 << (len(scores) - 1).bit_length())
    _choose_kernel[(1,)](
        scores, forced.int(), kept, count, len(scores), num_units, BLOCK=block, COLUMNS=min(block, 128)
    )
    indices = torch.nonzero(kept).flatten()
    assert int(count) == len(indices)
    return indices


def draw(kind, size, device):
    generator = torch.Generator().manual_seed(size)
    normal = torch.randn(size, generator=generator)
    scores = {
        "normal": normal,
        "equal": torch.full((size,), 2.5),
        "few": torch.randint(0, 4, (size,), generator=generator).float() - 2,
        "zeros": torch.where(normal > 0, 0.0, -0.0),
        "outliers": torch.where(normal > 1.5, 1e38, normal * 1e-30),
        "neighbours": torch.tensor([3.0])
        .view(torch.int32)
        .add(torch.arange(size, dtype=torch.int32) % 7)
        .view(torch.float32),
        "huge": normal.sign() * 1e38,
        "closed": torch.where(normal > 0.5, normal, -math.inf),
    }[kind]
    scores = torch.where(scores.abs() < 1e-30, scores * 0, scores)
    return scores.to(device), (torch.rand(size, generator=generator) < 0.1).to(device)


KINDS = ["normal", "equal", "few", "zeros", "outliers", "neighbours", "huge", "closed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 16, 37, 300])
def test_the_kept_set_is_that_of_a_sort_with_ties_to_the_lowest_index(device, kind, size):
    scores, forced = draw(kind, size, device)
    # the interpreter needs a second for each search among 300
    counts = {0, 1, 5, size // 3, size // 2, size - 1, size, size + 9} if size < 300 else {1, size // 3, size + 9}
    for num_units in counts:
        expected = select_reference(scores, forced, num_units)
        assert torch.equal(choose(scores, forced, num_units), expected), num_units


def test_forced_units_are_kept_beyond_the_budget_and_closed_ones_never(device):
    scores = torch.tensor([5.0, -math.inf, 1.0, 2.0, 3.0], device=device)
    forced = torch.tensor([False, True, True, True, False], device=device)
    assert choose(scores, forced, 1).tolist() == [2, 3]
    assert choose(scores, forced, 3).tolist() == [0, 2, 3]


def test_scores_are_cleaned_for_the_search(device):
    scores = torch.tensor([math.nan, math.inf, -math.inf, 1e-40, -1e-31, -0.0, 2.0, -7.5], device=device)
    _clean_kernel[(1,)](scores, BLOCK=8)
    one = torch.tensor([1e38, 1e38, -1e38, 0.0, 0.0, 0.0, 2.0, -7.5], device=device)
    assert torch.equal(scores, one)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_kept_set_of_many_scores_is_that_of_a_sort(kind):
    for size in (1000, 8192, 32768):
        scores, forced = draw(kind, size, torch.device("cuda"))
        for num_units in (128, 129, 2048, size - 5):
            assert torch.equal(choose(scores, forced, num_units), select_reference(scores, forced, num_units))
