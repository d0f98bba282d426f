"""Sparse decode on a real device: long and mixed contexts, CUDA graphs, programs that finish in any order.

`bench/attention/run.py` judges the sizes of the product against float64 before it times them.
"""

import pytest
import torch
from sparse_case import SparseCase

from vashista.kernels.paged_decode import paged_decode
from vashista.kernels.sparse_attend import attend_reference
from vashista.kernels.sparse_decode import sparse_decode
from vashista.kernels.unit_select import select_reference

pytestmark = pytest.mark.gpu
LENS = [131_072, 1, 0, 4097, 20_000, 63, 64, 65]


@pytest.fixture
def case(paged):
    """Eight requests, four KV heads of four query heads, with a coarse level."""
    batch = paged(LENS, head_dim=128, num_kv_heads=4, group=4, page_size=64, dtype=torch.bfloat16)
    return SparseCase(batch, 512, coarse_unit=64, candidates=4096, options={"num_recent": 64})


def test_the_set_is_that_of_the_kernels_own_scores_and_the_output_exact_over_it(case):
    out, _ = case.run()
    fine, coarse, batch = case.plan.fine, case.plan.coarse, case.paged
    for request in (0, 4):
        length = LENS[request]
        for head in range(4):
            pair = request * 4 + head
            opened = coarse.units[pair, : int(coarse.num_kept[pair])].long()
            unit = (opened[:, None] * 4 + torch.arange(4, device="cuda")).flatten()
            is_forced = (unit < 1) | ((unit + 1) * 16 > length - 64)
            expected = unit[select_reference(fine.scores[pair, : len(unit)], is_forced, 32)]
            assert case.kept()[pair] == expected.tolist()
            position = (expected[:, None] * 16 + torch.arange(16, device="cuda")).flatten()
            position = position[position < length]
            pages, slots = batch.table[request, position // 64].long(), position % 64
            heads = slice(head * 4, head * 4 + 4)
            exact, _ = attend_reference(
                case.q[request, heads], batch.k_clean[pages, head, slots], batch.v_clean[pages, head, slots],
                torch.arange(len(position), device="cuda"), case.plan.options,
            )  # fmt: skip
            assert (out[request, heads].double() - exact).norm() < 2e-3 * exact.norm()


def test_repeated_runs_keep_the_same_groups_and_give_the_same_bits(case):
    out, kept = case.run()[0].clone(), case.kept()
    for _ in range(20):
        assert torch.equal(case.run()[0], out)
        assert case.kept() == kept


def test_a_graph_follows_lengths_and_budgets_put_into_its_inputs(case):
    batch, out = case.paged, torch.empty_like(case.q)
    args = (case.q, (batch.k_clean, batch.v_clean), case.levels, batch.table, batch.lens, case.budgets, case.plan)
    sparse_decode(*args, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse_decode(*args, out=out)
    for share, budget in ((1, 64), (2, 512), (3, 0), (7, 300), (1, 10**6)):
        batch.lens.copy_(torch.tensor([length // share for length in LENS]))
        case.budgets.fill_(budget)
        out.fill_(float("nan"))
        graph.replay()
        replayed, kept = out.clone(), case.kept()
        assert torch.equal(sparse_decode(*args), replayed)
        assert case.kept() == kept
    dense = paged_decode(
        case.q, batch.k_clean, batch.v_clean, batch.table, batch.lens, scale=case.plan.options.scale,
        max_context=case.plan.max_context,
    )  # fmt: skip
    assert torch.equal(replayed, dense)
