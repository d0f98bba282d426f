"""Least squares with coefficients that are not negative, from sums alone: Lawson and Hanson, "Solving Least Squares
Problems" (1974), chapter 23, on the normal equations, as in Bro and de Jong (J. Chemometrics 11, 1997).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def solve_non_negative(gram: Floats, moments: Floats) -> Floats:
    """The x >= 0 with the least x' gram x - 2 x' moments. gram: [n, n], symmetric, diagonal above 0; moments: [n]."""
    scale = 1.0 / np.sqrt(gram.diagonal())
    a, b = gram * scale * scale[:, None], moments * scale
    x = np.zeros_like(b)
    chosen = np.zeros(len(b), dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(b).max()))
    for _ in range(3 * len(b)):
        slope = b - a @ x
        slope[chosen] = -np.inf
        best = int(slope.argmax())
        if slope[best] <= tolerance:
            break
        chosen[best] = True
        while True:
            trial = np.zeros_like(b)
            part = a[np.ix_(chosen, chosen)]
            # A little more on the diagonal: two columns of equal steps must not make it singular.
            trial[chosen] = np.linalg.solve(part + 1e-12 * np.eye(len(part)), b[chosen])
            if trial[chosen].min() > 0.0:
                x = trial
                break
            low = chosen & (trial <= 0.0)
            step = float((x[low] / np.maximum(x[low] - trial[low], 1e-300)).min())
            x = x + step * (trial - x)
            chosen &= x > 1e-15
            x[~chosen] = 0.0
            if not chosen.any():
                break
    result: Floats = x * scale
    return result
