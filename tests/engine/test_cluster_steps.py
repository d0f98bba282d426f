"""Steps of the engine whose sparse requests are attended to by clusters, emulated on a CPU, beside the same without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated_cluster import assert_same_summaries, emulate, needs_compiler
from test_coarse import FIRST, SECOND, Played, shape_of

from vashista.engine.attention import coarse, sparse_triton
from vashista.kernels.triton_guard import INTERPRETED

pytestmark = [needs_compiler, pytest.mark.skipif(not INTERPRETED, reason="emulates a device, in Triton's interpreter")]
BUDGET = 96
SHAPE = replace(shape_of((None, 200)), dtype=torch.bfloat16)


def decode(played: Played) -> list[tuple[list[torch.Tensor], list[list[int]]]]:
    """Two requests, alone, in company and beside a dense one, over ends of units; outputs and kept groups of steps."""
    played.run((FIRST, 269, 269, None))
    played.run((SECOND, 42, 298, None))  # the first four pages are the other's
    results = []
    for context in range(270, 274):
        others = {271: (None,), 272: (BUDGET,), 273: (BUDGET,)}.get(context, ())
        outs = played.run((FIRST, 1, context, BUDGET), *((SECOND, 1, context + 28, budget) for budget in others))
        step = played.attention._sparse
        assert step is not None
        units = step.units[-1] if step.is_audited else step.plan.fine.units
        kept = [row[:count].tolist() for row, count in zip(units, step.num_kept[-1], strict=True)]
        results.append((outs, kept))
    return results


@pytest.mark.parametrize("num_levels", [1, 2])
def test_steps_through_clusters_give_what_they_give_without(monkeypatch: pytest.MonkeyPatch, num_levels: int) -> None:
    monkeypatch.setattr(coarse, "COARSE_CONTEXT", 0 if num_levels == 2 else 1 << 20)
    monkeypatch.setattr(coarse, "CANDIDATES_PER_KEPT", 2)
    monkeypatch.setattr(sparse_triton, "PLAN_CONTEXT", 512)
    expected = decode(Played(SHAPE))
    launches = emulate(monkeypatch)
    played = Played(SHAPE)
    found = decode(played)
    assert len(launches) == 4 * SHAPE.num_layers
    assert all(names["IS_SCORED"] and (names["PER_COARSE"] > 0) == (num_levels == 2) for names in launches)
    for (outs, kept), (other_outs, other_kept) in zip(found, expected, strict=True):
        assert kept == other_kept
        for out, other in zip(outs, other_outs, strict=True):
            assert (out - other).double().norm() <= 4e-3 * other.double().norm()
    assert played.attention._plans.keys() == {key for key in played.attention._plans if key.max_budget == 128}
    assert {key.has_dense for key in played.attention._plans} == {False, True}
    for pages, context in ((FIRST, 273), (SECOND, 301)):
        for parts, others in played.summaries(pages, context):
            assert_same_summaries(parts, others)
