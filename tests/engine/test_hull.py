"""The projection onto the convex hull: known bodies, degenerate ones, and every face tried where there are few."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vashista.engine.hull import Projection, project

Floats = NDArray[np.float64]
TRIANGLE = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
CUBE = np.array(list(itertools.product((0.0, 1.0), repeat=3)))


def check(q: Floats, keys: Floats, found: Projection) -> None:
    """The KKT conditions and the certificates, by their definitions."""
    size = max(found.radius, 1e-300)
    assert found.is_solved
    assert (found.weights >= 0).all()
    assert found.weights.sum() == pytest.approx(1.0)
    assert np.allclose(found.weights @ keys, found.point, atol=1e-9 * size)
    assert found.distance == pytest.approx(np.linalg.norm(found.point - q), abs=1e-9 * size)
    multipliers = (keys - found.point) @ (found.point - q)
    assert np.allclose(found.multipliers, multipliers, atol=1e-9 * size**2)
    assert multipliers.min() >= -found.gap - 1e-12 * size**2
    assert np.abs(multipliers[found.weights > 0]).max() <= 1e-9 * size**2
    assert set(np.flatnonzero(found.weights)) <= set(found.face)
    assert found.distance_low <= found.distance


def nearest_by_faces(q: Floats, keys: Floats) -> float:
    """The distance, by trying every set of keys of at most d + 1 members: the nearest point of a hull is on one."""
    best = math.inf
    for size in range(1, min(len(keys), len(q) + 1) + 1):
        for subset in itertools.combinations(range(len(keys)), size):
            chosen = keys[list(subset)]
            shares = np.linalg.lstsq((chosen[1:] - chosen[0]).T, q - chosen[0], rcond=None)[0]
            weights = np.concatenate([[1 - shares.sum()], shares])
            if (weights >= -1e-12).all():
                best = min(best, float(np.linalg.norm(weights @ chosen - q)))
    return best


@pytest.mark.parametrize(
    ("q", "point", "face", "gap"),
    [
        ([-1.0, -2.0], [0.0, 0.0], [0], 1.0),  # a corner: <(1, 2), k> is 1 and 2 for the other two
        ([0.25, -1.0], [0.25, 0.0], [0, 1], 1.0),  # an edge
        ([1.0, 1.0], [0.5, 0.5], [1, 2], 0.5),  # the long edge
        ([3.0, 0.5], [1.0, 0.0], [1], 1.5),  # beyond a corner
    ],
)
def test_a_point_outside_a_triangle_projects_to_its_corner_or_edge(
    q: list[float], point: list[float], face: list[int], gap: float
) -> None:
    found = project(np.array(q), TRIANGLE)
    check(np.array(q), TRIANGLE, found)
    assert np.allclose(found.point, point)
    assert found.face.tolist() == face
    assert found.support_gap == pytest.approx(gap)
    assert not found.is_inside
    assert found.distance_low == pytest.approx(found.distance, rel=1e-9)


def test_a_side_of_a_cube_is_a_face_of_four_keys_with_many_convex_combinations() -> None:
    q = np.array([0.5, 0.5, 3.0])
    found = project(q, CUBE)
    check(q, CUBE, found)
    assert np.allclose(found.point, [0.5, 0.5, 1.0])
    assert found.face.tolist() == [i for i, key in enumerate(CUBE) if key[2] == 1.0]
    assert found.support_gap == pytest.approx(2.0)


@pytest.mark.parametrize("q", [[0.5, 0.5, 0.5], [0.1, 0.9, 0.3], [1.0, 1.0, 0.5], [0.0, 0.0, 0.0], [0.5, 0.5, 1.0]])
def test_a_query_in_the_hull_or_on_its_border_has_no_gap(q: list[float]) -> None:
    found = project(np.array(q), CUBE)
    assert found.is_inside
    assert found.distance < 1e-8
    assert math.isnan(found.support_gap)
    assert len(found.face) == len(CUBE)
    assert np.allclose(found.weights @ CUBE, q)


def test_a_query_a_hair_outside_is_outside() -> None:
    found = project(np.array([0.5, 0.5, 1.0 + 1e-5]), CUBE)
    assert not found.is_inside
    assert found.distance == pytest.approx(1e-5)
    assert found.support_gap == pytest.approx(1e-5)


def test_one_key_is_the_whole_hull() -> None:
    q, keys = np.array([3.0, 4.0]), np.zeros((1, 2))
    found = project(q, keys)
    check(q, keys, found)
    assert found.distance == pytest.approx(5.0)
    assert found.support_gap == math.inf
    at_it = project(np.zeros(2), keys)
    assert at_it.is_inside
    assert at_it.distance == 0.0


def test_copies_of_a_key_are_on_the_face_together() -> None:
    keys = np.concatenate([TRIANGLE, TRIANGLE, TRIANGLE[:1]])
    found = project(np.array([-1.0, -2.0]), keys)
    check(np.array([-1.0, -2.0]), keys, found)
    assert found.face.tolist() == [0, 3, 6]
    assert found.support_gap == pytest.approx(1.0)
    same = project(np.array([-1.0, -2.0]), np.ones((50, 2)))
    assert len(same.face) == 50
    assert same.support_gap == math.inf


def test_keys_on_a_line_project_to_a_segment() -> None:
    keys = np.outer(np.linspace(-1.0, 1.0, 21), [3.0, 4.0, 0.0])
    q = np.array([0.3, 0.4, 2.0])
    found = project(q, keys)
    check(q, keys, found)
    assert np.allclose(found.point, [0.3, 0.4, 0.0])
    assert len(found.face) == 21  # the whole segment is as near as its plane
    beyond = project(np.array([30.0, 40.0, 0.0]), keys)
    assert beyond.face.tolist() == [20]


@given(st.integers(1, 3), st.integers(1, 7), st.integers(0, 100_000), st.booleans())
def test_the_distance_is_the_least_over_all_faces(dim: int, num_keys: int, seed: int, on_grid: bool) -> None:
    rng = np.random.default_rng(seed)
    keys, q = rng.normal(size=(num_keys, dim)), rng.normal(size=dim) * 1.5
    if on_grid:  # ties, copies, collinear and coplanar keys
        keys, q = np.round(keys), np.round(q * 2) / 2
    found = project(q, keys)
    check(q, keys, found)
    assert found.distance == pytest.approx(nearest_by_faces(q, keys), abs=1e-7)


@pytest.mark.parametrize("scale", [1e-150, 1e-6, 1.0, 1e6, 1e150])
def test_nothing_depends_on_the_unit_of_length(scale: float) -> None:
    rng = np.random.default_rng(1)
    keys, q = rng.normal(size=(500, 32)), rng.normal(size=32) * 2
    one, other = project(q, keys), project(q * scale, keys * scale)
    assert other.is_solved
    assert other.face.tolist() == one.face.tolist()
    assert other.distance / scale == pytest.approx(one.distance)
    assert other.support_gap / scale / scale == pytest.approx(one.support_gap, rel=1e-6)


@pytest.mark.parametrize(
    ("num_keys", "dim", "length"), [(3000, 64, 20.0), (3000, 64, 1.0), (1000, 128, 12.0), (300, 256, 9.0)]
)
def test_many_keys_of_a_heads_size_are_solved_to_rounding(num_keys: int, dim: int, length: float) -> None:
    rng = np.random.default_rng(2)
    keys, q = rng.normal(size=(num_keys, dim)), rng.normal(size=dim)
    q *= length / np.linalg.norm(q)
    found = project(q, keys)
    assert found.is_solved
    if found.is_inside:
        assert np.allclose(found.weights @ keys, q, atol=1e-9)
    else:
        check(q, keys, found)
        assert found.distance_low == pytest.approx(found.distance, rel=1e-9)
        assert len(found.face) <= dim + 1


@pytest.mark.parametrize("keys", [np.zeros((0, 2)), np.array([[np.nan, 0.0]]), np.array([[np.inf, 0.0]]), np.zeros(2)])
def test_no_keys_and_numbers_that_are_not_finite_are_refused(keys: Floats) -> None:
    with pytest.raises(ValueError, match="at least one key, and finite numbers"):
        project(np.zeros(2), keys)
