"""Clusters that score units and write summaries themselves, emulated on a CPU, against the kernels that else do it."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from emulated_cluster import assert_same_summaries, emulate, needs_compiler
from sparse_case import SparseCase, slots_of
from test_key_summary import check

from vashista.kernels import sparse_decode
from vashista.kernels.cuda import cluster
from vashista.kernels.key_summary import Rule
from vashista.kernels.triton_guard import INTERPRETED
from vashista.kernels.unit_score import score_units

pytestmark = [needs_compiler, pytest.mark.skipif(not INTERPRETED, reason="emulates a device, in Triton's interpreter")]


def note(calls, *args, **rest):
    """`score_units`, and that it was called."""
    calls.append(args)
    score_units(*args, **rest)


@pytest.mark.parametrize(
    ("head_dim", "group", "coarse_unit", "window"),
    [(64, 1, None, None), (64, 8, 64, 300), (128, 3, 64, None), (128, 5, None, 300), (256, 2, 64, None)],
)
def test_scores_bounds_and_what_follows_are_those_of_the_kernel_that_else_comes_before(
    paged, monkeypatch, head_dim, group, coarse_unit, window
):
    case = paged(
        [900, 147], head_dim=head_dim, group=group, num_kv_heads=1, page_size=64, window=window, dtype=torch.bfloat16
    )
    sparse = SparseCase(case, 96, coarse_unit=coarse_unit, candidates=384 if coarse_unit else None)
    ranked = sparse.plan.coarse or sparse.plan.fine
    results = []
    for most, is_scored in ((0, 0), (cluster.MAX_SCORED_UNITS, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(cluster, "MAX_SCORED_UNITS", most)
            launches, before = emulate(patch), []
            patch.setattr(sparse_decode, "score_units", partial(note, before))
            out, lse = sparse.run()
        assert len(before) == 1 - is_scored, "clusters score groups below a coarse level themselves"
        assert [names["IS_SCORED"] for names in launches] == [is_scored]
        unit = coarse_unit or 16
        sizes = [-(-length // unit) - max(length - (window or length), 0) // unit for length in (900, 147)]
        parts = (ranked.scores, ranked.keys, ranked.bounds)
        scores = [part[row, :size].clone() for row, size in enumerate(sizes) for part in parts]
        results.append((sparse.kept(), [out.float(), lse, sparse.plan.fine.mass.clone(), *scores]))
    (kept, numbers), (kept_2, numbers_2) = results
    assert kept == kept_2
    assert kept[0]
    for one, other in zip(numbers, numbers_2, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("coarse_unit", [None, 64])
def test_a_unit_whose_keys_are_not_finite_is_kept(paged, monkeypatch, coarse_unit):
    """What it weighs is not known: it must not be dropped in silence."""
    case = paged([600], head_dim=64, num_kv_heads=1, page_size=64, dtype=torch.bfloat16)
    sparse = SparseCase(case, 64, coarse_unit=coarse_unit, candidates=256 if coarse_unit else None)
    for level in sparse.levels:
        level.steps[case.table[0, 3], 0, 0] = math.nan
    emulate(monkeypatch)
    sparse.run()
    assert 3 * 64 // 16 in sparse.kept()[0]


def test_more_units_than_a_block_scores_itself_are_scored_before(paged, judge, monkeypatch):
    launches = emulate(monkeypatch)
    sparse = SparseCase(paged([600], head_dim=64, num_kv_heads=1, page_size=64, dtype=torch.bfloat16), 64)
    most = -(-sparse.plan.fine.keys.shape[1] // 4)
    for allowed in (most, most - 1):
        monkeypatch.setattr(cluster, "MAX_SCORED_UNITS", allowed)
        sparse.check(judge)
        assert launches.pop()["IS_SCORED"] == (allowed == most)


@pytest.mark.parametrize(
    "change",
    [
        {"rule": Rule.MEAN},
        {"rule": Rule.BOX},
        {"options": {"softcap": 20.0}},
        {"options": {"is_sum": True}},
        {"coarse_unit": 32, "candidates": 256},
    ],
    ids=str,
)
def test_what_clusters_cannot_score_is_scored_before_or_left_to_the_other_kernel(paged, judge, monkeypatch, change):
    launches = emulate(monkeypatch)
    case = paged([515], head_dim=64, num_kv_heads=1, page_size=64, dtype=torch.bfloat16)
    SparseCase(case, 96, **change).check(judge)
    assert [names["IS_SCORED"] for names in launches] == ([] if "coarse_unit" in change else [0])


@pytest.mark.parametrize(
    ("kind", "head_dim"),
    [("random", 64), ("random", 256), ("equal", 128), ("outlier", 128), ("denormal", 128), ("zero", 128)],
)
def test_summaries_of_the_steps_tokens_are_those_of_their_keys(paged, monkeypatch, kind, head_dim):
    """A unit's last token, one inside a unit, the first of a page, and a request that writes nothing."""
    case = paged([192, 107, 129, 150], head_dim=head_dim, num_kv_heads=1, page_size=64, group=1, dtype=torch.bfloat16)
    if kind == "equal":
        case.k_clean[:] = case.k_clean[:1, :, :1]
    elif kind == "outlier":
        case.k_clean[..., 3] = 3e4
    else:
        case.k_clean *= {"random": 1, "denormal": 1e-38, "zero": 0}[kind]
    sparse = SparseCase(case, 48, coarse_unit=64, candidates=64)
    slots = torch.stack([slots_of(case, [request])[-1] for request in range(4)])
    slots[3] = -1
    expected = [[part.clone() for part in (*level.planes, level.steps)] for level in sparse.levels]
    sparse.plan = replace(sparse.plan, has_dense=False)
    for schedule in (0, -1, 5):
        for level in sparse.levels:  # the newest units' are gone
            for slot in slots[:3].tolist():
                at = slot // 64, 0, slot % 64 // level.unit_tokens
                for part, value in zip((*level.planes, level.steps), (99, 99, math.nan), strict=True):
                    part[at] = value
        launches = emulate(monkeypatch, schedule=schedule)
        sparse.run(slots)
        assert launches[0]["IS_SCORED"] == 1
        for level, parts in zip(sparse.levels, expected, strict=True):
            for request in range(3 if kind in {"random", "outlier"} else 0):
                check(level, case, request)
            assert_same_summaries((*level.planes, level.steps), parts)
