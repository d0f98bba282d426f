"""Least squares with coefficients that are not negative, from sums alone: Lawson and Hanson, "Solving Least Squares
Problems" (1974), chapter 23, on the normal equations, as in Bro and de Jong (J. Chemometrics 11, 1997).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def solve_non_negative(gram: Floats, moments: Floats, near: Floats | None = None) -> Floats:
    """The x >= 0 with the least x' gram x - 2 x' moments. gram: [n, n], symmetric, diagonal above 0; moments: [n].

    near: a guess that is not negative; the closer it is, the sooner the solution is found.
    """
    scale = 1.0 / np.sqrt(gram.diagonal())
    a, b = gram * scale * scale[:, None], moments * scale
    x = np.zeros_like(b) if near is None else near / scale
    chosen = x > 0.0
    tolerance = 1e-10 * max(1.0, float(np.abs(b).max()))
    for turn in range(3 * len(b)):
        if turn or near is None:
            slope = b - a @ x
            slope[chosen] = -np.inf
            best = int(slope.argmax())
            if slope[best] <= tolerance:
                break
            chosen[best] = True
        x = _within(a, b, x, chosen)
    result: Floats = x * scale
    return result


def _within(a: Floats, b: Floats, x: Floats, chosen: NDArray[np.bool_]) -> Floats:
    """The least where only the chosen coefficients are not 0, of which those that would be negative are given up."""
    while chosen.any():
        trial = np.zeros_like(b)
        part = a[np.ix_(chosen, chosen)]
        # A little more on the diagonal: two columns of equal steps must not make it singular.
        trial[chosen] = np.linalg.solve(part + 1e-12 * np.eye(len(part)), b[chosen])
        if trial[chosen].min() > 0.0:
            return trial
        low = chosen & (trial <= 0.0)
        step = float((x[low] / np.maximum(x[low] - trial[low], 1e-300)).min())
        x = x + step * (trial - x)
        chosen &= x > 1e-15
        x[~chosen] = 0.0
    return x
