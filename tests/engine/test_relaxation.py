"""The entropic relaxation: solved to its stated gap, and the theorem's two terms seen in numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vashista.engine.hull import project
from vashista.engine.relaxation import check_theorem, predicted_constant, solve

Floats = NDArray[np.float64]
TRIANGLE = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])


def objective(q: Floats, keys: Floats, weights: Floats, eps: float) -> float:
    used = weights[weights > 0]
    return 0.5 * float(((q - weights @ keys) ** 2).sum()) + eps * float((used * np.log(used)).sum())


def weights_at(points: Floats, eps: float, x: Floats) -> Floats:
    exponents = -points @ x / eps
    weights = np.exp(exponents - exponents.max())
    return weights / weights.sum()


@pytest.mark.parametrize("eps", [10.0, 1.0, 0.1, 0.01])
def test_two_keys_are_balanced_where_the_derivative_is_zero(eps: float) -> None:
    q, keys = np.array([0.3, 1.0]), np.array([[0.0, 0.0], [1.0, 0.0]])
    points = keys - q
    x, residual = solve(points, eps, points.mean(0))
    share = weights_at(points, eps, x)[1]
    low, high = 0.0, 1.0
    for _ in range(200):  # a - 0.3 + eps log(a / (1 - a)) = 0, by halving
        middle = (low + high) / 2
        rises = middle - 0.3 + eps * math.log(middle / (1 - middle)) > 0
        low, high = (low, middle) if rises else (middle, high)
    assert share == pytest.approx(low, abs=1e-9)
    assert residual < 1e-9


@pytest.mark.parametrize("eps", [100.0, 1.0, 1e-2, 1e-4])
def test_the_residual_is_the_duality_gap_and_bounds_the_error(eps: float) -> None:
    rng = np.random.default_rng(0)
    keys, q = rng.normal(size=(200, 8)), rng.normal(size=8) * 2
    points = keys - q
    x = points.mean(0)
    for step in (100.0, 1.0, 1e-2, 1e-4):  # from large eps to small, as the check does
        if step >= eps:
            x, residual = solve(points, step, x)
    weights = weights_at(points, eps, x)
    best = objective(q, keys, weights, eps)
    dual = -0.5 * float(x @ x) - eps * (
        math.log(float(np.exp(-points @ x / eps - (-points @ x / eps).max()).sum())) + float((-points @ x / eps).max())
    )
    assert best - dual == pytest.approx(0.5 * residual**2, abs=1e-9 * max(1.0, abs(best)))
    assert residual < 1e-8
    for _ in range(50):  # no other weights are better
        other = rng.dirichlet(np.full(200, 0.1))
        assert objective(q, keys, 0.9 * weights + 0.1 * other, eps) >= best - 1e-12


def test_a_corner_has_no_linear_term_and_leaks_exponentially() -> None:
    q = np.array([-1.0, -2.0])
    found = check_theorem(q, TRIANGLE, project(q, TRIANGLE))
    assert found is not None
    assert found.predicted_constant == 0.0
    assert math.isnan(found.linear_slope)
    assert found.exponent == pytest.approx(1.0, abs=0.02)  # Delta = 1
    assert found.num_violations == 0
    assert found.relaxed[-1].displacement < 1e-12


def test_an_edge_moves_in_proportion_to_eps_by_the_predicted_constant() -> None:
    q = np.array([0.25, -1.0])
    projection = project(q, TRIANGLE)
    # On the edge a - 0.25 + eps log(a / (1 - a)) = 0, so a moves by eps log 3.
    assert predicted_constant(TRIANGLE, projection) == pytest.approx(math.log(3))
    found = check_theorem(q, TRIANGLE, projection, steps=(1.0, 8.0, 64.0, 512.0, 4096.0))
    assert found is not None
    assert found.linear_slope == pytest.approx(1.0, abs=0.01)
    assert found.linear_constant == pytest.approx(math.log(3), rel=1e-3)
    assert found.exponent == pytest.approx(1.0, abs=0.01)
    assert found.needed_constant <= found.predicted_constant * 1.001


def test_a_face_that_is_no_simplex_has_no_predicted_constant() -> None:
    square = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.5, -1.0]])
    found = check_theorem(np.array([0.3, 0.4, 1.0]), square, project(np.array([0.3, 0.4, 1.0]), square))
    assert found is not None
    assert math.isnan(found.predicted_constant)
    assert found.num_violations == 0


@pytest.mark.parametrize("q", [[0.2, 0.2], [0.5, 0.5], [0.0, 0.0]])
def test_inside_the_hull_there_is_nothing_to_check(q: list[float]) -> None:
    assert check_theorem(np.array(q), TRIANGLE, project(np.array(q), TRIANGLE)) is None


def test_without_an_inactive_key_there_is_nothing_to_check() -> None:
    keys = np.ones((3, 2))
    assert check_theorem(np.zeros(2), keys, project(np.zeros(2), keys)) is None


@given(st.integers(2, 12), st.integers(2, 60), st.floats(0.5, 5.0), st.integers(0, 100_000))
def test_where_the_theorem_applies_the_leakage_is_within_its_bound(
    dim: int, num_keys: int, length: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    keys, q = rng.normal(size=(num_keys, dim)), rng.normal(size=dim)
    q *= length * math.sqrt(dim) / np.linalg.norm(q)
    projection = project(q, keys)
    found = check_theorem(q, keys, projection)
    if found is None:
        assert projection.is_inside or projection.support_gap == math.inf
        return
    assert found.num_violations == 0
    for point in found.relaxed:
        assert point.residual <= 1e-7 * projection.radius
        assert point.in_regime or point.eps > found.certain_eps
        assert point.log_leakage <= 0.0
    if found.relaxed[-1].in_regime:
        assert found.exponent >= 0.5


def test_the_numbers_do_not_depend_on_the_unit_of_length() -> None:
    rng = np.random.default_rng(3)
    keys, q = rng.normal(size=(400, 16)), rng.normal(size=16) * 2
    one = check_theorem(q, keys, project(q, keys))
    other = check_theorem(q * 1e3, keys * 1e3, project(q * 1e3, keys * 1e3))
    assert one is not None
    assert other is not None
    assert other.exponent == pytest.approx(one.exponent, rel=1e-6)
    assert other.linear_constant * 1e3 == pytest.approx(one.linear_constant, rel=1e-4)
    for small, large in zip(one.relaxed, other.relaxed, strict=True):
        assert large.log_leakage == pytest.approx(small.log_leakage, rel=1e-5)
