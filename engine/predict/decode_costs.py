"""What a decoding request adds to a step: from how its kind attends at its context, and what the engine has learnt.

How a mode attends near a context does not change with what steps take, so it is measured once for each CONTEXT_STEP
tokens of context and kept as a row of numbers, where `engine/predict/native.c` reads it, too. Seconds follow from the
coefficients of the moment. A *pair* is as in `engine/work.py`. No torch here.
"""

from __future__ import annotations

import math
from array import array

from vashista.engine.messages import AttentionMode
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.expected_support import SupportForecast
from vashista.engine.work import GROUP_TOKENS, WorkModel

CONTEXT_STEP = 128
"""Tokens of context that are taken for alike: for the middle of them."""
SHAPE = 5
"""Numbers of a row: tokens attended before any correction, tokens visible, pairs that stand and that grow with the
context, and 1 where nothing is left out."""
MAX_MODES = 512
"""Modes that are remembered besides those of the queue."""
Costs = tuple[float, float, float, float]
"""Seconds, seconds per token of context, pairs, pairs per token of context: of a decode step."""


class DecodeCosts:
    """For one model on one engine."""

    def __init__(self, work: WorkModel, support: SupportForecast) -> None:
        self._work = work
        self._support = support
        self._num_heads = float(sum(count for _, count in work.windows))
        self._shapes: dict[AttentionMode, array[float]] = {}
        """The one that nobody has asked for the longest comes first."""
        self._num_remembered = MAX_MODES
        self._num_moves = 0

    def remember(self, num_modes: int) -> None:
        """From now on no fewer than so many modes: those of a queue, for which all of them are asked in turn."""
        self._num_remembered = MAX_MODES + num_modes

    def shapes(self, mode: AttentionMode) -> array[float]:
        """[num_buckets * SHAPE], in buckets of CONTEXT_STEP; NaN where `fill` has not been. Fills move it in memory."""
        found = self._shapes.pop(mode, None)
        if found is None:
            found = array("d")
            while len(self._shapes) >= self._num_remembered:
                del self._shapes[next(iter(self._shapes))]
        self._shapes[mode] = found  # the last to be forgotten
        return found

    def correction(self, mode: AttentionMode) -> float:
        """What the tokens attended are to be multiplied with."""
        return self._support.correction(mode)

    @property
    def num_changes(self) -> tuple[int, int]:
        """How often shapes have moved in memory, and how often a correction has changed."""
        return self._num_moves, self._support.num_lessons

    def fill(self, shapes: array[float], mode: AttentionMode, bucket: int) -> None:
        """Measure how a mode attends in a bucket, unless that is known. shapes: those of the mode."""
        start = bucket * SHAPE
        if len(shapes) <= start:
            shapes.extend([math.nan] * (start + SHAPE - len(shapes)))
            self._num_moves += 1
        if not math.isnan(shapes[start]):
            return
        context = bucket * CONTEXT_STEP + CONTEXT_STEP // 2
        windows = self._work.windows
        growing = float(sum(count for window, count in windows if window is None or window > context))
        standing = float(sum(count * window for window, count in windows if window and window <= context))
        support = self._support.uncorrected(mode, context)
        is_dense = float(support.dense_share >= 1.0)
        row = [support.tokens_attended, support.tokens_visible, standing, growing, is_dense]
        shapes[start : start + SHAPE] = array("d", row)

    def of(
        self, coefficients: StepCoefficients, mode: AttentionMode, context: int, *, is_drawn: bool, is_shaped: bool
    ) -> Costs:
        """Of a decode step near this context."""
        bucket = context // CONTEXT_STEP
        shapes, start = self.shapes(mode), bucket * SHAPE
        self.fill(shapes, mode, bucket)
        attended, visible, standing, growing, is_dense = shapes[start : start + SHAPE]
        row_s, request_s, drawn_s, shaped_s, sparse_s, pair_s, _, scored_s, kept_s, *_ = coefficients.counts_s
        fixed_s = row_s + request_s
        fixed_s += is_drawn * drawn_s + is_shaped * shaped_s
        if is_dense:
            return fixed_s + pair_s * standing, pair_s * growing, standing, growing
        kept = min(attended * self.correction(mode), visible) * self._num_heads
        standing, growing = standing / GROUP_TOKENS, growing / GROUP_TOKENS
        fixed_s += sparse_s + kept_s * kept + scored_s * standing
        return fixed_s, scored_s * growing, kept + standing, growing
