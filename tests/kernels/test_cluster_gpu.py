"""Attention by clusters on a real device: against the other kernel, in CUDA graphs, again and again."""

import math
from dataclasses import replace

import pytest
import torch
from emulated_cluster import assert_same_summaries
from sparse_case import SparseCase, slots_of

from vashista.kernels.cuda import cluster, launcher
from vashista.kernels.selection import ScoreOptions
from vashista.kernels.sparse_decode import make_plan, sparse_decode

pytestmark = pytest.mark.gpu


@pytest.fixture
def make_case(paged):
    """A case of eight KV heads from its lengths and whether it has a coarse level."""
    if not launcher.has_clusters(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("this device has no clusters that the kernels were run on")

    def make(lens: list[int], is_coarse: bool) -> SparseCase:
        batch = paged(lens, head_dim=128, num_kv_heads=8, page_size=64, dtype=torch.bfloat16)
        coarse = {"coarse_unit": 64, "candidates": 8192} if is_coarse else {}
        return SparseCase(batch, 2048, **coarse, options={"num_recent": 64}, max_budget=2048)

    return make


@pytest.fixture(params=[False, True], ids=["one level", "two levels"])
def case(make_case, request):
    """Two requests: as many pairs as clusters of eight blocks are for."""
    return make_case([40_000, 100_003], request.param)


@pytest.mark.parametrize(
    ("lens", "is_coarse"),
    [([30_000], False), ([100_003], True), ([40_000, 100_003], False), ([40_000, 100_003], True), ([400_001], False)],
)
def test_kept_groups_masses_and_outputs_are_those_of_the_other_kernel(make_case, monkeypatch, lens, is_coarse):
    case = make_case(lens, is_coarse)
    (out, lse), kept, mass = case.run(), case.kept(), case.plan.fine.mass.clone()
    monkeypatch.setattr(cluster, "USE_CLUSTERS", False)
    other, other_lse = case.run()
    # scores of equal codes differ in their last bits, which may swap neighbours at the threshold
    same = sum(len(set(one) & set(two)) for one, two in zip(kept, case.kept(), strict=True))
    assert same >= 0.999 * sum(map(len, kept))
    torch.testing.assert_close(mass, case.plan.fine.mass, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(lse, other_lse, rtol=1e-4, atol=1e-3)
    assert (out - other).double().norm() < 4e-3 * other.double().norm()


@pytest.mark.parametrize(("lens", "is_coarse"), [([30_000], False), ([30_000, 100_003], True), ([400_001], False)])
def test_summaries_of_the_steps_tokens_are_written_and_seen_by_the_step(make_case, lens, is_coarse):
    case = make_case(lens, is_coarse)
    out, kept = case.run()[0].clone(), case.kept()
    slots = torch.stack([slots_of(case.paged, [request])[-1] for request in range(len(lens))])
    written = [[part.clone() for part in (*level.planes, level.steps)] for level in case.levels]
    case.plan = replace(case.plan, has_dense=False)
    for level in case.levels:  # the newest units' are gone
        for slot in slots.tolist():
            for part, value in zip((*level.planes, level.steps), (99, 99, math.nan), strict=True):
                part[slot // 64, :, slot % 64 // level.unit_tokens] = value
    assert torch.equal(case.run(slots)[0], out)
    assert case.kept() == kept
    for level, parts in zip(case.levels, written, strict=True):
        assert_same_summaries((*level.planes, level.steps), parts)


def test_repeated_runs_give_the_same_bits_whatever_the_order_of_the_blocks(case):
    out, kept, mass = case.run()[0].clone(), case.kept(), case.plan.fine.mass.clone()
    for _ in range(50):
        assert torch.equal(case.run()[0], out)
        assert case.kept() == kept
        assert torch.equal(case.plan.fine.mass, mass)


@pytest.mark.parametrize("has_dense", [False, True])
def test_a_graph_of_many_layers_follows_lengths_and_budgets(case, has_dense):
    batch = case.paged
    plan = make_plan(
        case.q, batch.k_cache, case.levels, ScoreOptions(**case.options), max_context=case.plan.max_context,
        max_budget=2048, max_candidate_tokens=8192 if len(case.levels) == 2 else None, has_dense=has_dense,
    )  # fmt: skip
    slots = torch.stack([slots_of(batch, [request])[-1] for request in range(2)])
    args = (case.q, (batch.k_clean, batch.v_clean), case.levels, batch.table, batch.lens, case.budgets, plan)
    outs = [torch.empty_like(case.q) for _ in range(8)]
    sparse_decode(*args, out=outs[0], slots=slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out in outs:
            sparse_decode(*args, out=out, slots=slots)
    for lens, budget in ([40_000, 100_003], 2048), ([4_097, 99_999], 1024), ([0, 30_000], 96), ([2_049, 2_050], 2048):
        batch.lens.copy_(torch.tensor(lens))
        case.budgets.fill_(budget)
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        expected = sparse_decode(*args)
        assert all(torch.equal(out, expected) for out in outs)
        assert outs[0].isfinite().all()
