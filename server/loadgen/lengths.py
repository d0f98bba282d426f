"""How long prompts and answers are: a length as users write it, and the numbers drawn from it.

`LengthSpec.parse` reads the command line, `workload.py` draws. Nothing drawn is clamped: a bounded lognormal is drawn
again until it lies inside its bounds, so its shape inside them stays true.
"""

from __future__ import annotations

import math
import random
from typing import Literal

import msgspec

from vashista.engine.errors import WorkloadError

MAX_LENGTH = 10_000_000
_MAX_DRAWS = 10_000


class LengthSpec(msgspec.Struct, frozen=True):
    """A fixed length, a uniform range (both ends included), or a lognormal by its median and sigma."""

    kind: Literal["fixed", "uniform", "lognormal"]
    low: int
    """Least length that can be drawn, in tokens."""
    high: int
    """Greatest length that can be drawn, in tokens."""
    median: float = 0.0
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str, *, param: str) -> LengthSpec:
        """Read 128, 64:256, lognormal:MEDIAN:SIGMA or lognormal:MEDIAN:SIGMA:MIN:MAX."""
        forms = "N, MIN:MAX, lognormal:MEDIAN:SIGMA or lognormal:MEDIAN:SIGMA:MIN:MAX"
        parts = text.split(":")
        try:
            if parts[0] == "lognormal":
                if len(parts) not in {3, 5}:
                    raise ValueError("lognormal takes two or four numbers")
                low, high = (int(parts[3]), int(parts[4])) if len(parts) == 5 else (1, MAX_LENGTH)
                spec = cls("lognormal", low, high, float(parts[1]), float(parts[2]))
            elif len(parts) <= 2:
                spec = cls("fixed" if len(parts) == 1 else "uniform", int(parts[0]), int(parts[-1]))
            else:
                raise ValueError("too many parts")
        except ValueError as error:
            raise WorkloadError(f"{param}: {text!r} is not one of {forms} ({error})", param=param) from error
        spec._check(text, param)
        return spec

    def _check(self, text: str, param: str) -> None:
        if not 1 <= self.low <= self.high <= MAX_LENGTH:
            raise WorkloadError(f"{param}: {text!r} must have 1 <= MIN <= MAX <= {MAX_LENGTH}", param=param)
        if self.kind != "lognormal":
            return
        if not (math.isfinite(self.median) and self.median >= 1 and 0 < self.sigma <= 5):
            raise WorkloadError(f"{param}: {text!r} must have MEDIAN >= 1 and 0 < SIGMA <= 5", param=param)
        if not self.low <= self.median <= self.high:
            raise WorkloadError(f"{param}: the median of {text!r} must lie from MIN to MAX", param=param)

    def draw(self, rng: random.Random) -> int:
        """One length in tokens."""
        if self.kind != "lognormal":
            return rng.randint(self.low, self.high)
        for _ in range(_MAX_DRAWS):
            length = round(rng.lognormvariate(math.log(self.median), self.sigma))
            if self.low <= length <= self.high:
                return length
        raise WorkloadError(f"no length from {self.low} to {self.high} came up in {_MAX_DRAWS} draws: widen the bounds")

    def __str__(self) -> str:
        if self.kind == "fixed":
            return str(self.low)
        bounds = f"{self.low}:{self.high}"
        return bounds if self.kind == "uniform" else f"lognormal:{self.median:g}:{self.sigma:g}:{bounds}"
