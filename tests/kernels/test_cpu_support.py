"""The sums over a step's diagnostics are those of plain float64 arithmetic, also over NaN and infinities."""

import math

import pytest
import torch
from sparse_cpu_case import SparseCase

from vashista.kernels.cpu.library import Library
from vashista.kernels.cpu.sparse import Rule, SparsePlan, plan
from vashista.kernels.cpu.support import sum_support

CONTEXTS = [40, 700, 1031]
WINDOWS = [None, 300, 20]
HEADS, KV_HEADS = 6, 2


def make_plan(rule: Rule = Rule.MEAN_VARIANCE) -> SparsePlan:
    """Of three layers, with diagnostics to be written by the test."""
    case = SparseCase(CONTEXTS, (HEADS, KV_HEADS, 24, 24), rule=rule)
    requests = list(zip(case.rows, case.contexts, case.pages, strict=True))
    return plan(case.shape, requests, torch.full((3, 3, KV_HEADS), 64, dtype=torch.int32), case.cos, case.sin)


def visible_of(layer: int, request: int) -> int:
    return min(CONTEXTS[request], WINDOWS[layer] or CONTEXTS[request])


def share(log_kept: float, log_dropped: float) -> float:
    if math.isnan(log_kept - log_dropped):
        return math.nan
    return 0.0 if log_kept - log_dropped > 700 else 1 / (1 + math.exp(log_kept - log_dropped))


def worst(values: list[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def reference(diagnostics: torch.Tensor, request: int) -> tuple[list[float], list[float]]:
    """Dense head-steps, kept and visible tokens, bound, estimate and gap of one request; each head-step's estimate."""
    sums, estimates = [0.0] * 6, []
    for layer, of_layer in enumerate(diagnostics):
        for of_pair in of_layer[request].view(KV_HEADS, -1, 6).tolist():
            kept, visible = of_pair[0][5], visible_of(layer, request)
            is_dense = kept >= visible
            bound = worst([share(row[0], row[4]) for row in of_pair])
            estimate = worst([share(row[0], row[2]) for row in of_pair])
            gap = -worst([row[3] - row[0] for row in of_pair])
            parts = [0, 0, 0] if is_dense else [1 if math.isnan(bound) else bound, estimate, gap]
            sums = [a + b for a, b in zip(sums, [is_dense, kept, visible, *parts], strict=True)]
            estimates.append(parts[1])
    return sums, estimates


def assert_equal(library: Library, made: SparsePlan, requests: list[int]) -> None:
    for one, request in zip(sum_support(library, made, WINDOWS, requests), requests, strict=True):
        expected, estimates = reference(made.diagnostics, request)
        assert one.estimates.shape == (len(WINDOWS), KV_HEADS)
        assert one.estimates.flatten().tolist() == pytest.approx(estimates, rel=1e-14, nan_ok=True)
        assert [one.num_dense, one.num_kept, one.num_visible] == expected[:3]
        assert [one.bound, one.estimate, one.gap] == pytest.approx(expected[3:], rel=2e-7, nan_ok=True)
        exact = [one.bound] if math.isnan(one.estimate) else [one.bound, one.estimate]
        assert exact == pytest.approx(expected[3 : 3 + len(exact)], rel=1e-14)


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 600.0])
def test_sums_are_those_of_float64(library: Library, spread: float) -> None:
    made = make_plan()
    made.diagnostics.copy_(torch.randn(made.diagnostics.shape) * spread)
    made.diagnostics[..., 5] = 16.0 * torch.randint(1, 60, (3, 3, KV_HEADS)).repeat_interleave(3, -1)
    assert_equal(library, made, [0, 1, 2])
    assert_equal(library, made, [2, 0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 2, 3, 4])
def test_a_number_that_is_not_finite_counts_as_unknown_or_as_the_limit(
    library: Library, column: int, value: float
) -> None:
    made = make_plan()
    made.diagnostics.copy_(torch.randn(made.diagnostics.shape))
    made.diagnostics[..., 5] = 10.0
    made.diagnostics[1, 1, 4, column] = value
    assert_equal(library, made, [0, 1, 2])


def test_heads_that_attended_to_all_have_dropped_nothing_whatever_their_diagnostics_say(library: Library) -> None:
    made = make_plan()
    made.diagnostics.fill_(math.nan)
    made.diagnostics[..., 5] = torch.tensor([[visible_of(i, j) for j in range(3)] for i in range(3)]).unsqueeze(-1)
    for one in sum_support(library, made, WINDOWS, [0, 1, 2]):
        assert (one.num_dense, one.num_kept) == (3 * KV_HEADS, one.num_visible)
        assert (one.bound, one.estimate, one.gap) == (0.0, 0.0, 0.0)
        assert not one.estimates.any()


def test_a_rule_of_bounds_has_no_estimate(library: Library) -> None:
    made = make_plan(Rule.BOX)
    made.diagnostics.copy_(torch.randn(made.diagnostics.shape))
    made.diagnostics[..., 5] = 10.0
    one = sum_support(library, made, WINDOWS, [1])[0]
    assert math.isnan(one.estimate)
    assert math.isnan(one.gap)
    assert 0 < one.bound < 3 * KV_HEADS


@pytest.mark.parametrize(("windows", "requests"), [([None], [0]), (WINDOWS, [3]), (WINDOWS, [-1])])
def test_layers_and_requests_that_the_plan_lacks_are_refused(
    library: Library, windows: list[int | None], requests: list[int]
) -> None:
    with pytest.raises(ValueError, match="the plan has 3 layers, 3 requests"):
        sum_support(library, make_plan(), windows, requests)
