"""The entropic relaxation of the hull projection, and what the paper's theorem (arXiv 2602.13804) says of it, checked.

    a_eps = argmin over the simplex of 1/2 ||q - sum a_i k_i||^2 + eps * sum a_i log a_i,   y_eps = sum a_eps_i k_i

With y*, I, Delta of `engine/hull.py`, M keys of diameter D, the theorem states for small eps

    ||y_eps - y*|| <= C_lin * eps + D (M - |I|) exp(-Delta / (2 eps))

Where the exponent comes from: a_i is proportional to exp(-<k_i, y_eps - q> / eps). Against y* the exponents of two keys
move apart by at most `drift` = the spread of <k_i, y_eps - y*>. As soon as drift <= Delta / 2, an inactive key has at
most exp(-Delta / (2 eps)) of an active one's mass, so that the mass off the face, the leakage, is certainly at most
(M - |I|) exp(-Delta / (2 eps)). `in_regime` says where that holds; outside of it the bound may fail. As drift vanishes
with eps, the exponent itself tends to Delta, twice what the theorem promises.

On the face the entropy pushes y_eps away from y* in proportion to eps. For affinely independent active keys K_I that
constant is known: ||K_I^T b|| with b the solution of K_I K_I^T b + nu 1 = -log a_I, sum b = 0.

The dual is solved: with x_i = k_i - q it is the maximum over x of -1/2 ||x||^2 - eps log sum exp(-<x_i, x> / eps), d
variables, strongly concave, by Newton's method from large eps to small. At any x, with a = softmax(-<x_i, x> / eps) and
m = sum a_i x_i, the duality gap is 1/2 ||m - x||^2 exactly, so ||q + m - y_eps|| <= ||m - x||: the `residual`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from vashista.engine.hull import Floats, Projection

STEPS_PER_GAP = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""eps is Delta / (2 t) for these t, which is the exponent of the theorem."""
NEWTON_STEPS = 200
FIT_POINTS = 3
"""Smallest eps from which the limits are read."""


class Relaxed(msgspec.Struct, frozen=True, kw_only=True):
    """The relaxation at one eps."""

    eps: float
    """In units of squared length, as logits q.k are."""
    residual: float
    """||y_eps - the y computed|| is at most this; the square of it over 2 is the duality gap."""
    displacement: float
    """||y_eps - y*||"""
    log_leakage: float
    """Log of the mass off the face."""
    log_bound: float
    """Log of (M - |I|) exp(-Delta / (2 eps)); above 0 it says nothing."""
    drift: float
    """How far exponents of two keys moved apart; in_regime is drift <= Delta / 2."""
    in_regime: bool

    @property
    def holds(self) -> bool:
        """Whether the leakage is within the theorem's bound."""
        return self.log_leakage <= self.log_bound + 1e-9


class TheoremCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured for one query over a range of eps, largest first."""

    relaxed: list[Relaxed]
    certain_eps: float
    """Below this in_regime must hold, whatever the keys: (Delta / (2 D))^2 / (2 log M)."""
    exponent: float
    """-eps log(leakage / (M - |I|)) / Delta at the smallest eps: the theorem promises 0.5, the limit is 1."""
    linear_slope: float
    """Growth of log displacement with log eps at the smallest eps: 1 where the linear term rules; nan where the
    displacement is too small to measure, as for a face of one key, which has no linear term."""
    linear_constant: float
    """displacement / eps at the smallest eps."""
    predicted_constant: float
    """What it must tend to; nan where the active keys are not affinely independent."""
    needed_constant: float
    """The least C_lin with which the theorem holds at every eps measured."""

    @property
    def num_violations(self) -> int:
        """Points in the regime whose leakage is above the bound: any is an error of ours or of the theorem."""
        return sum(point.in_regime and not point.holds for point in self.relaxed)


def check_theorem(
    q: Floats, keys: Floats, projection: Projection, steps: Sequence[float] = STEPS_PER_GAP
) -> TheoremCheck | None:
    """Solve the relaxation at eps = Delta / (2 t) for each t of `steps`, ascending, and compare.

    None where there is no gap to speak of: q inside the hull, or no key off the face.
    """
    delta = projection.support_gap
    if not math.isfinite(delta):
        return None
    points = np.asarray(keys, dtype=np.float64) - q
    num_inactive = len(points) - len(projection.face)
    diameter = 2 * float(np.linalg.norm(points - points.mean(0), axis=1).max())  # at least D, at most 2 D
    x = points.mean(0)
    eps = projection.radius**2
    relaxed = []
    for t in steps:
        wanted = delta / (2 * t)
        while eps > 4 * wanted:  # the way there: each solution starts the next one's search
            eps /= 4
            x, _ = solve(points, eps, x)
        eps = wanted
        x, residual = solve(points, eps, x)
        relaxed.append(_compare(points, projection, (x, residual, eps), num_inactive))
    last = relaxed[-1]
    return TheoremCheck(
        relaxed=relaxed,
        certain_eps=(delta / (2 * diameter)) ** 2 / (2 * math.log(max(len(points), 2))),
        exponent=-last.eps * (last.log_leakage - math.log(num_inactive)) / delta,
        linear_slope=_linear_slope(relaxed, projection.accuracy),
        linear_constant=last.displacement / last.eps,
        predicted_constant=predicted_constant(np.asarray(keys, dtype=np.float64), projection),
        needed_constant=max(_needed(point, diameter) for point in relaxed),
    )


def solve(points: Floats, eps: float, start: Floats) -> tuple[Floats, float]:
    """(x, residual) of the relaxation for points x_i = k_i - q: [M, d], from a start near the solution: [d]."""
    x = start
    log_weights, value = _dual(points, eps, x)
    step_x, residual = _newton_step(points, eps, x, log_weights)
    best = (x, residual)
    for _ in range(NEWTON_STEPS):
        length = 1.0
        while length > 1e-10:
            trial = x + length * step_x
            log_weights, trial_value = _dual(points, eps, trial)
            # Concave: an ascent is real unless the difference drowns in rounding, where the residual decides.
            if trial_value > value or (length == 1.0 and abs(trial_value - value) <= 1e-13 * abs(value)):
                break
            length /= 2
        else:
            return best
        x, value = trial, trial_value
        step_x, residual = _newton_step(points, eps, x, log_weights)
        if residual < best[1]:
            best = (x, residual)
        elif residual <= 1e-9 * float(np.linalg.norm(x)) + 1e-300:
            return best  # rounding: it gets no better
    return best


def _dual(points: Floats, eps: float, x: Floats) -> tuple[Floats, float]:
    """(log a [M], the dual's value) at x."""
    exponents = points @ x
    exponents /= -eps
    top = float(exponents.max())
    log_sum = top + math.log(float(np.exp(exponents - top).sum()))
    return exponents - log_sum, -0.5 * float(x @ x) - eps * log_sum


def _newton_step(points: Floats, eps: float, x: Floats, log_weights: Floats) -> tuple[Floats, float]:
    """(step, residual ||m - x||): solves (1 + Cov_a / eps) step = m - x, with the keys that have mass."""
    used = log_weights > -46.0  # 1e-20
    weights, held = np.exp(log_weights[used]), points[used]
    mean = weights @ held
    centred = held - mean
    hessian = (centred * weights[:, None]).T @ centred / eps
    hessian[np.diag_indices_from(hessian)] += 1.0
    difference = mean - x
    step: Floats = np.linalg.solve(hessian, difference).astype(np.float64, copy=False)
    return step, float(np.linalg.norm(difference))


def _compare(
    points: Floats, projection: Projection, solution: tuple[Floats, float, float], num_inactive: int
) -> Relaxed:
    """One eps against the projection."""
    x, residual, eps = solution
    log_weights, _ = _dual(points, eps, x)
    off_face = np.delete(log_weights, projection.face)
    top = float(off_face.max())
    # x is y_eps - q; the projection's point is y*.
    moved = points @ (x - projection.weights @ points)
    drift = float(moved.max() - moved.min())
    return Relaxed(
        eps=eps,
        residual=residual,
        displacement=float(np.linalg.norm(x - projection.weights @ points)),
        log_leakage=top + math.log(float(np.exp(off_face - top).sum())),
        log_bound=math.log(num_inactive) - projection.support_gap / (2 * eps),
        drift=drift,
        in_regime=drift <= projection.support_gap / 2,
    )


def predicted_constant(keys: Floats, projection: Projection) -> float:
    """The limit of ||y_eps - y*|| / eps; nan where the face's keys are not affinely independent or one has weight 0."""
    weights = projection.weights[projection.face]
    active = keys[projection.face]
    if (weights <= 0.0).any():
        return math.nan
    edges = active[1:] - active[0]
    if len(edges) == 0:
        return 0.0
    if np.linalg.matrix_rank(edges) < len(edges):
        return math.nan
    # b = (-sum c, c): minimise over c; the edges' Gram matrix is regular, and 1 drops out in differences.
    logs = np.log(weights)
    moved = np.linalg.solve(edges @ edges.T, -(logs[1:] - logs[0]))
    return float(np.linalg.norm(moved @ edges))


def _linear_slope(relaxed: list[Relaxed], accuracy: float) -> float:
    """The slope, in logs, over the smallest eps; nan where a displacement does not stand above the errors."""
    last = relaxed[-FIT_POINTS:]
    if len(last) < 2 or any(point.displacement <= accuracy + point.residual for point in last):
        return math.nan
    logs = np.log([[point.eps, point.displacement] for point in last])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def _needed(point: Relaxed, diameter: float) -> float:
    """The least C_lin with which the theorem holds here."""
    exponential = diameter * math.exp(min(point.log_bound, 700.0))
    return max(point.displacement - exponential, 0.0) / point.eps
