"""Holds the dropped mass of one request at its target: corrects the budgets after every step.

What the kernels report of a step holds an estimate of the mass that each KV head dropped, made of the scores that
ranked the groups. Over all heads it follows the true dropped mass closely from step to step (correlations of 0.94 to
0.99 on the bundled model), and is mostly too low. So budgets follow the estimates, and audits correct the ratio of true
to estimated mass: that of all heads, of the audited head-steps so far and of a first guess that counts like
`GUESS_MASS` of estimated mass; and each head's own, for which that of all is the guess.

A lesson is the mean of the estimates since the last one, one step in the first `NUM_QUICK` and `LESSON_STEPS` then:

    log budget += gain * (ratio * estimate - target) / max(target, LEAST_SCALE)

for each head by itself, with a gain that falls with the number of lessons, since one step says little of the next. The
error is linear in the mass, so that the mean of the mass comes to rest at the target and not that of its logarithm. A
head that grew to attend to everything drops nothing: its budget falls until it drops something again. No budget falls
below what it was before any lesson until `KNOWN_AUDITS` audits have found what its head drops, which takes thousands of
tokens at the usual rates: the scores of some heads are blind to what they drop (one in layer 0 of the bundled model
sees a sixteenth of it on a GPU), and of these the profile knows better. So a text that needs less than the sample text
keeps what that needs.

A rule whose scores are no estimate (Quest's bounds; sinks and window) is steered by audits alone: in place of the
estimate stands what an audit found, for its head, and half as much for all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vashista.engine.support import Audit

Masses = NDArray[np.float64]

FIRST_GAIN, LAST_GAIN = 0.3, 0.06
"""Of a lesson: FIRST_GAIN / sqrt(number of lessons so far), not below LAST_GAIN."""
LEAST_SCALE = 0.05
"""Errors are in targets, or in this mass for smaller targets: there one step must not undo what many found."""
MAX_ERROR = 4.0
"""A step far above the target counts as one this many such units above it."""
NUM_QUICK, LESSON_STEPS = 8, 8
"""The first lessons come step by step, the others after so many steps: making budgets anew takes time."""
RATIO = {"cpu": 1.5, "cuda": 2.0}
"""First guess of true / estimated mass: a CPU scores every query head, a GPU the best of a group."""
GUESS_MASS, HEAD_GUESS_MASS = 0.2, 0.05
"""Of all heads and of one; one audit at a usual target weighs as much as the latter."""
KNOWN_AUDITS = 4
LEAST_CORRECTION = -3.0
"""A budget falls to a twentieth at most, so that it is back within some dozen lessons when the text changes."""


class Steering:
    """Of one request; `correction` is what its budgets' logarithms are off by."""

    def __init__(self, size: tuple[int, int], target: float, ratio: float) -> None:
        """size: layers and KV heads. target: dropped mass. ratio: first guess of true / estimated mass."""
        self.correction = np.zeros(size)
        """[num_layers, num_kv_heads], to add to the log of each budget."""
        self._target, self._scale = target, max(target, LEAST_SCALE)
        self._num_lessons = 0
        self._sum, self._num_steps = np.zeros(size), 0
        self._guess = ratio
        self._estimated, self._true, self._num_audits = np.zeros(size), np.zeros(size), np.zeros(size, dtype=int)

    def see(self, estimates: Masses, audits: Sequence[Audit] = ()) -> bool:
        """A step's estimates, [num_layers, num_kv_heads], and its audits. Whether the correction is another now."""
        for audit in audits:
            head = audit.layer, audit.kv_head
            if estimates[head] > 0.0:  # else it attended to everything, or its logits are no numbers
                self._estimated[head] += estimates[head]
                self._true[head] += audit.dropped_mass
                self._num_audits[head] += 1
        self._sum += estimates
        self._num_steps += 1
        if self._num_steps < (1 if self._num_lessons < NUM_QUICK else LESSON_STEPS):
            return False
        mean = np.nan_to_num(self._sum / self._num_steps, nan=1.0)  # of logits that are no numbers: all is kept
        error = (self._ratio() * mean - self._target) / self._scale
        least = np.where(self._num_audits < KNOWN_AUDITS, 0.0, LEAST_CORRECTION)
        self.correction = np.maximum(least, self.correction + self._gain() * np.minimum(error, MAX_ERROR))
        self._sum, self._num_steps = np.zeros_like(self._sum), 0
        return True

    def see_audits(self, masses: Sequence[tuple[int, int, float]]) -> bool:
        """Without estimates: (layer, KV head, dropped mass), 0 where it was due and attended to everything."""
        if not masses:
            return False
        errors = [min((mass - self._target) / self._scale, MAX_ERROR) for _, _, mass in masses]
        gain = self._gain()
        self.correction = self.correction + gain / 2 * sum(errors) / len(errors)
        for (layer, head, _), error in zip(masses, errors, strict=True):
            self.correction[layer, head] += gain / 2 * error
        self.correction = np.maximum(self.correction, LEAST_CORRECTION)
        return True

    def _ratio(self) -> Masses:
        """[num_layers, num_kv_heads]: true / estimated mass."""
        of_all = (GUESS_MASS * self._guess + self._true.sum()) / (GUESS_MASS + self._estimated.sum())
        ratio: Masses = (HEAD_GUESS_MASS * of_all + self._true) / (HEAD_GUESS_MASS + self._estimated)
        return ratio

    def _gain(self) -> float:
        self._num_lessons += 1
        return max(FIRST_GAIN / math.sqrt(self._num_lessons), LAST_GAIN)
