"""Attention by clusters of blocks, emulated on a CPU, against the float64 reference and `sparse_attend`."""

import math
from dataclasses import replace

import pytest
import sparse_case
import torch
from emulated_cluster import emulate, needs_compiler
from quick_summary import summarize_quickly
from sparse_case import SparseCase, slots_of

from vashista.kernels.cuda import cluster
from vashista.kernels.key_summary import Rule, make_level
from vashista.kernels.selection import ScoreOptions, make_selection
from vashista.kernels.sparse_attend import attend_reference
from vashista.kernels.triton_guard import INTERPRETED
from vashista.kernels.unit_mass import BOUND_SLACK
from vashista.kernels.unit_select import select_reference

pytestmark = [needs_compiler, pytest.mark.skipif(not INTERPRETED, reason="emulates a device, in Triton's interpreter")]


@pytest.fixture(autouse=True)
def _quick_summaries(monkeypatch):
    """They would take twice as long as what is judged here."""
    monkeypatch.setattr(sparse_case, "summarize", summarize_quickly)


def run_both(sparse: SparseCase, monkeypatch: pytest.MonkeyPatch, num_blocks: int = 4):
    """(without clusters, with them), each: out, lse, kept groups, masses."""
    results = []
    for use in (False, True):
        with monkeypatch.context() as patch:
            launches = emulate(patch, num_blocks) if use else []
            out, lse = sparse.run()
        assert use == bool(launches)
        results.append((out.clone(), lse.clone(), sparse.kept(), sparse.plan.fine.mass.clone()))
    return results


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((128, 2, 4, 64, [700, 64, 0, 333]), torch.bfloat16),
        ((128, 2, 4, 64, [700, 64, 0, 333]), torch.float16),
        ((64, 1, 1, 16, [1000, 17]), torch.bfloat16),
        ((64, 2, 8, 32, [450]), torch.float16),
        ((128, 1, 3, 16, [129, 700]), torch.float16),
        ((256, 1, 2, 64, [600]), torch.bfloat16),
        ((128, 1, 8, 64, [520]), torch.bfloat16),
        ((80, 1, 5, 16, [260, 300]), torch.float16),
    ],
    ids=str,
)
def test_the_output_lse_and_kept_groups_agree_with_the_reference(paged, judge, monkeypatch, shape, dtype):
    head_dim, num_kv_heads, group, page_size, lens = shape
    case = paged(lens, head_dim=head_dim, num_kv_heads=num_kv_heads, group=group, page_size=page_size, dtype=dtype)
    emulate(monkeypatch)
    SparseCase(case, 128).check(judge)


@pytest.mark.parametrize(
    ("num_blocks", "coarse_unit", "window"), [(4, None, None), (4, 64, 300), (16, None, 300), (16, 64, None)]
)
def test_kept_groups_and_masses_are_those_of_the_other_kernel(paged, monkeypatch, num_blocks, coarse_unit, window):
    case = paged([1100, 333, 40], head_dim=64, num_kv_heads=1, page_size=64, window=window, dtype=torch.bfloat16)
    sparse = SparseCase(case, 160, coarse_unit=coarse_unit, candidates=512 if coarse_unit else None)
    (out, lse, kept, mass), (out_2, lse_2, kept_2, mass_2) = run_both(sparse, monkeypatch, num_blocks)
    for schedule in (-1, num_blocks):
        emulate(monkeypatch, num_blocks, schedule=schedule)
        assert torch.equal(sparse.run()[0], out_2)
        assert torch.equal(sparse.plan.fine.mass, mass_2)
        assert sparse.kept() == kept_2
    assert kept == kept_2
    assert kept[0]
    torch.testing.assert_close(mass_2, mass, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse_2, lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out_2.float(), out.float(), rtol=2e-2, atol=2e-3)


NUM_UNITS = 1000
TOKENS = NUM_UNITS * 16 - 5


def draw_scores(kind: str) -> torch.Tensor:
    """Scores [NUM_UNITS] that a search may stumble over."""
    scores = torch.randn(NUM_UNITS)
    if kind == "all equal":
        scores.fill_(-2.5)
    elif kind == "two values":
        scores = (scores > 1).float()
    elif kind == "zeros of both signs":
        scores = torch.where(scores > 0.5, 0.0, -0.0)
    elif kind == "one outlier":
        scores[321] = 1e38
    elif kind == "far apart":
        scores = torch.sign(scores) * torch.exp(scores * 25).clamp(1e-30, 1e38)
    elif kind == "neighbouring numbers":
        scores = (torch.tensor([1.0]).view(torch.int32) + torch.randint(0, 40, (NUM_UNITS,))).int().view(torch.float32)
    elif kind == "ascending":
        scores = scores.sort().values
    elif kind == "best at the end":
        scores[-200:] += 30
    elif kind == "most are impossible":
        scores[torch.rand(NUM_UNITS) < 0.9] = -math.inf
    return scores


@pytest.mark.parametrize("wanted", [1, 40, 41, 130, 800])
@pytest.mark.parametrize(
    "kind",
    [
        "normal", "all equal", "two values", "zeros of both signs", "one outlier", "far apart", "neighbouring numbers",
        "ascending", "best at the end", "most are impossible",
    ],
)  # fmt: skip
def test_the_best_are_kept_exactly_and_what_is_dropped_is_weighed(monkeypatch, kind, wanted):
    torch.manual_seed(4)
    options = ScoreOptions(scale=0.125, num_sinks=20, num_recent=40)
    caches = (torch.randn(NUM_UNITS // 4, 1, 64, 64).bfloat16(), torch.randn(NUM_UNITS // 4, 1, 64, 64).bfloat16())
    q = torch.randn(1, 2, 64).bfloat16()
    groups = make_selection(1, NUM_UNITS, wanted + 4, q.device, max_forced=8)
    scores, index = draw_scores(kind), torch.arange(NUM_UNITS)
    is_forced = (index * 16 < options.num_sinks) | ((index + 1) * 16 > TOKENS - options.num_recent)
    groups.scores.fill_(math.nan)[0, :NUM_UNITS] = scores
    groups.bounds.fill_(math.nan)[0, :NUM_UNITS] = scores + 1
    groups.keys.fill_(math.nan)[0, :NUM_UNITS] = scores.masked_fill(is_forced, -math.inf)
    out, lse = torch.full_like(q, math.nan), torch.full((1, 2), math.nan)
    table, lens = torch.arange(NUM_UNITS // 4).int()[None], torch.tensor([TOKENS]).int()
    budgets = torch.tensor([[16 * wanted]]).int()
    emulate(monkeypatch, 8, schedule=wanted)
    shape = cluster.choose_shape(q, caches, options, (make_level(caches[0], Rule.MEAN, 16),), groups, None)
    assert shape is not None
    cluster.attend_clusters(shape, q, caches, table, lens, budgets, options, (), groups, None, out, lse)

    open_scores = torch.where(is_forced & (scores == -math.inf), 0.0, scores)
    expected = select_reference(open_scores, is_forced, max(wanted, int(is_forced.sum())))
    count = int(groups.num_kept)
    assert groups.units[0, :count].tolist() == expected.tolist()
    positions = (expected[:, None] * 16 + torch.arange(16)).flatten()
    keys, values = (cache[:, 0].flatten(0, 1) for cache in caches)
    expected_out, expected_lse = attend_reference(q[0], keys, values, positions[positions < TOKENS], options)
    assert (out[0].double() - expected_out).norm() <= 2e-3 * expected_out.norm()
    torch.testing.assert_close(lse[0].double(), expected_lse, rtol=1e-5, atol=1e-5)

    is_dropped = torch.ones(NUM_UNITS, dtype=torch.bool)
    is_dropped[expected] = False
    dropped, kept = scores[is_dropped].double(), scores[expected].double()[expected < NUM_UNITS - 1]
    bound = (dropped + 1).logsumexp(0)
    masses = [kept.logsumexp(0), dropped.logsumexp(0), dropped.max(), bound + BOUND_SLACK + 1e-6 * bound.abs()]
    if dropped.max() == -math.inf:
        masses[3] = dropped.max()
    torch.testing.assert_close(groups.mass[0].double(), torch.stack(masses), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "is_fit"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"head_dim": 80}, True),
        ({"group": 16}, False),
        ({"is_token_major": True}, True),
    ],
    ids=str,
)
def test_clusters_serve_what_they_are_made_for_and_leave_the_rest(paged, judge, monkeypatch, change, is_fit):
    launches = emulate(monkeypatch)
    case = paged([400], **({"dtype": torch.bfloat16, "num_kv_heads": 1, "page_size": 64} | change))
    SparseCase(case, 64).check(judge)
    assert bool(launches) == is_fit


def test_more_pairs_than_multiprocessors_are_left_to_the_other_kernel():
    blocks = {pairs: cluster.count_blocks(pairs, torch.device("cpu")) for pairs in (1, 2, 4, 5)}
    assert blocks == {1: 4, 2: 2, 4: 1, 5: 0}  # of the interpreter's 4


@pytest.mark.parametrize("coarse_unit", [None, 64])
def test_where_no_pair_is_dense_scoring_writes_the_summaries_and_nothing_follows(
    paged, judge, monkeypatch, coarse_unit
):
    case = paged([515, 700, 0], num_kv_heads=2, head_dim=64, page_size=64, dtype=torch.bfloat16)
    sparse = SparseCase(case, 96, coarse_unit=coarse_unit, candidates=256 if coarse_unit else None)
    slots = torch.stack([slots_of(case, [0])[-1], slots_of(case, [1])[-1], torch.tensor(-1)])
    written = [(level.first.clone(), level.steps.clone()) for level in sparse.levels]
    for level in sparse.levels:  # the newest units' are gone
        per_page = level.steps.shape[2]
        for slot in slots[:2].tolist():
            level.steps[slot // 64, :, slot % 64 * per_page // 64] = math.nan
    launches = emulate(monkeypatch)
    monkeypatch.setattr("vashista.kernels.sparse_decode.attend_groups", None)
    sparse.plan = replace(sparse.plan, has_dense=False)
    sparse.check(judge, slots=slots)
    assert len(launches) == 1
    for level, (first, steps) in zip(sparse.levels, written, strict=True):
        assert torch.equal(level.first, first)
        assert torch.equal(level.steps.nan_to_num(), steps.nan_to_num())
        assert not level.steps[slots[0] // 64].isnan().all()


def test_a_dense_pair_that_was_denied_gives_nan_and_no_wrong_numbers(paged, monkeypatch):
    case = paged([515, 200], num_kv_heads=1, head_dim=64, page_size=64, dtype=torch.bfloat16)
    sparse = SparseCase(case, torch.tensor([[64], [300]]))
    emulate(monkeypatch)
    sparse.plan = replace(sparse.plan, has_dense=False)
    out, lse = sparse.run()
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
    assert sparse.plan.fine.num_kept[1] == 0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_below_a_coarse_level_groups_are_scored_as_by_the_other_kernel(paged, monkeypatch, head_dim):
    case = paged([900, 130], head_dim=head_dim, num_kv_heads=1, group=3, page_size=64, dtype=torch.bfloat16)
    sparse = SparseCase(case, 96, coarse_unit=64, candidates=384)
    sparse.run()
    count = int(sparse.plan.coarse.num_kept[0]) * 4
    expected = [
        part[0, :count].clone() for part in (sparse.plan.fine.scores, sparse.plan.fine.keys, sparse.plan.fine.bounds)
    ]
    opened = sparse.plan.coarse.units[0, : count // 4].tolist()
    launches = emulate(monkeypatch)
    sparse.run()
    assert launches[0]["PER_COARSE"] == 4
    assert sparse.plan.coarse.units[0, : count // 4].tolist() == opened
    for part, other in zip(
        (sparse.plan.fine.scores, sparse.plan.fine.keys, sparse.plan.fine.bounds), expected, strict=True
    ):
        torch.testing.assert_close(part[0, :count], other, rtol=1e-5, atol=1e-5)
