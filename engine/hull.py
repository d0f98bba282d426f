"""The paper's own object (arXiv 2602.13804): a query's projection onto the convex hull of its keys.

    y* = argmin 1/2 ||y - q||^2 over y in conv(k_1 .. k_M)

With weights a of y* = sum a_i k_i the KKT multipliers are lambda_i = <y* - q, k_i - y*> >= 0, zero where a_i > 0. The
active face I is where lambda_i = 0, and the support gap Delta is the least multiplier off the face.
`engine/diagnose.py` calls `project`, then `engine/relaxation.py` measures what the paper's theorem says of the entropic
relaxation.

The solver is Wolfe's min-norm-point method (Mathematical Programming 11, 1976) on the points x_i = k_i - q: an active
set ("corral") of affinely independent points, whose affine hull's nearest point to the origin is found exactly in each
step; it ends after finitely many. It returns a certificate: gap = ||x||^2 - min <x, x_i> bounds how far 1/2 ||x||^2 is
from its least value, hence ||y - y*|| <= sqrt(2 gap) and distance >= (||x||^2 - gap) / ||x||. Float64, numpy.

Where q lies in the hull the distance is 0, every multiplier is 0, no key is inactive and there is no gap: `is_inside`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

INSIDE = 1e-8
"""A distance below this share of the radius, with no hyperplane found between q and the keys, counts as inside."""
ROUNDING = 1.2e-16
"""Relative error of a product of d terms, over d: what a certificate takes for granted."""
LEAST_WEIGHT = 1e-13
MAX_STEPS = 20_000


@dataclass(frozen=True)
class Projection:
    """See the module's text. M keys of dimension d."""

    point: Floats
    """[d] y*"""
    weights: Floats
    """[M] of the convex combination; at most d + 1 are not 0."""
    distance: float
    """||y - q||; the true distance is at most this."""
    distance_low: float
    """The true distance is at least this; 0.0 where nothing is certain."""
    gap: float
    """Certificate of accuracy, as the module's text says, in units of squared length."""
    accuracy: float
    """||y - y*|| is at most this."""
    multipliers: Floats
    """[M] lambda"""
    face: NDArray[np.int64]
    """Keys whose multiplier is 0 within the accuracy, ascending; all keys where q is inside."""
    support_gap: float
    """Delta; +inf where every key is on the face and q is outside, nan where q is inside: then there is none."""
    is_inside: bool
    is_solved: bool
    """Whether the accuracy asked for was reached."""
    radius: float
    """max ||k_i - q||: the length that tolerances are relative to."""


def project(q: Floats, keys: Floats, tolerance: float = 1e-6) -> Projection:
    """Project q: [d] onto the convex hull of keys: [M, d], until ||y - y*|| <= tolerance * radius is certain.

    The method goes on to what float64 gives, usually far better. ValueError for no keys or values that are not finite.
    """
    keys = np.asarray(keys, dtype=np.float64)
    q = np.asarray(q, dtype=np.float64)
    if keys.ndim != 2 or not len(keys) or not np.isfinite(keys).all() or not np.isfinite(q).all():
        raise ValueError("a projection needs at least one key, and finite numbers")
    points = keys - q
    lengths = np.einsum("id,id->i", points, points)
    radius = math.sqrt(lengths.max())
    if radius == 0.0:
        return _result(q, keys, points, np.array([0]), np.array([1.0]), radius, tolerance)
    corral, weights = _min_norm_point(points / radius, int(lengths.argmin()))
    return _result(q, keys, points, corral, weights, radius, tolerance)


def _min_norm_point(points: Floats, first: int) -> tuple[NDArray[np.int64], Floats]:
    """(corral, weights) of Wolfe's method on points within the unit ball."""
    corral, weights = np.array([first]), np.array([1.0])
    least, best = math.inf, (corral, weights)
    for _ in range(MAX_STEPS):
        x = weights @ points[corral]
        products = points @ x
        entering = int(products.argmin())
        norm = float(x @ x)
        gap = norm - float(products[entering])
        if norm < least:
            least, best = norm, (corral, weights)
        elif len(corral) <= len(best[0]) or norm > least * (1 + 1e-9):
            break  # no progress: what is left is rounding
        if gap <= ROUNDING or entering in corral:  # lengths are at most 1 here
            break
        corral, weights = _enter(points, np.append(corral, entering), np.append(weights, 0.0))
    return best


def _enter(points: Floats, corral: NDArray[np.int64], weights: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Wolfe's minor cycle: walk to the affine hull's nearest point, dropping each point whose weight falls to 0."""
    while True:
        wanted = _affine_minimum(points[corral])
        falling = wanted <= LEAST_WEIGHT
        if not falling.any() or len(corral) == 1:
            return corral, wanted
        steps = np.full(len(corral), np.inf)
        steps[falling] = weights[falling] / np.maximum(weights[falling] - wanted[falling], 1e-300)
        leaving = int(steps.argmin())
        weights = weights + min(steps[leaving], 1.0) * (wanted - weights)
        kept = weights > LEAST_WEIGHT
        kept[leaving] = False
        corral, weights = corral[kept], weights[kept] / weights[kept].sum()


def _affine_minimum(points: Floats) -> Floats:
    """Weights, of sum 1, of the point nearest to the origin in the affine hull of points [k, d]."""
    base = points[-1]
    shares = np.linalg.lstsq((points[:-1] - base).T, -base, rcond=None)[0]
    return np.append(shares, 1.0 - shares.sum())


def _result(
    q: Floats,
    keys: Floats,
    points: Floats,
    corral: NDArray[np.int64],
    weights: Floats,
    radius: float,
    tolerance: float,
) -> Projection:
    """Certificates and multipliers of a solution."""
    x = weights @ points[corral]
    all_weights = np.zeros(len(keys))
    all_weights[corral] = weights
    norm = float(x @ x)
    multipliers = points @ x - norm
    gap = max(-float(multipliers.min()), 0.0) + ROUNDING * len(q) * radius * (radius + math.sqrt(norm)) / 2
    distance, accuracy = math.sqrt(norm), math.sqrt(2 * gap)
    low = max((norm - gap) / distance, 0.0) if distance else 0.0
    is_inside = low == 0.0 and distance <= max(INSIDE * radius, accuracy)
    # |lambda_i(y) - lambda_i(y*)| <= ||y - y*|| (||k_i - y|| + distance), and ||k_i - y|| <= 2 radius.
    face = np.flatnonzero(multipliers <= accuracy * (2 * radius + distance))
    others = np.delete(multipliers, face)
    support_gap = math.inf if not len(others) else float(others.min())
    return Projection(
        point=q + x,
        weights=all_weights,
        distance=distance,
        distance_low=low,
        gap=gap,
        accuracy=accuracy,
        multipliers=multipliers,
        face=np.arange(len(keys)) if is_inside else face,
        support_gap=math.nan if is_inside else support_gap,
        is_inside=is_inside,
        is_solved=accuracy <= tolerance * radius or radius == 0.0,
        radius=radius,
    )
