"""What a decoding request adds to a step: from how its kind attends at its context, and what the engine has learnt.

How a mode attends near a context does not change with what steps take, so it is measured once for each CONTEXT_STEP
tokens of context and kept as a row of numbers, where `engine/predict/native.c` reads it, too. Seconds follow from the
coefficients of the moment. A *pair* is as in `engine/work.py`. No torch here.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

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
"""Modes that are remembered; of a queue that has more, all of them."""
Costs = tuple[float, float, float, float]
"""Seconds, seconds per token of context, pairs, pairs per token of context: of a decode step."""


class DecodeCosts:
    """For one model on one engine."""

    def __init__(self, work: WorkModel, support: SupportForecast) -> None:
        self._work = work
        self._support = support
        self._num_heads = float(sum(count for _, count in work.windows))
        self._shapes: dict[AttentionMode, array[float]] = {}

    def shapes(self, mode: AttentionMode) -> array[float]:
        """[num_buckets * SHAPE], in buckets of CONTEXT_STEP; NaN where `fill` has not been. Fills move it in memory."""
        found = self._shapes.get(mode)
        if found is None:
            if len(self._shapes) >= MAX_MODES:
                del self._shapes[next(iter(self._shapes))]  # the oldest
            found = self._shapes[mode] = array("d")
        return found

    def hold(self, modes: Sequence[AttentionMode]) -> list[array[float]]:
        """`shapes` of each. However many modes there are, filling one of them forgets no other."""
        held = set(modes)
        if len(self._shapes.keys() | held) > MAX_MODES:
            self._shapes = {mode: shapes for mode, shapes in self._shapes.items() if mode in held}
        return [self._shapes.setdefault(mode, array("d")) for mode in modes]

    def correction(self, mode: AttentionMode) -> float:
        """What the tokens attended are to be multiplied with."""
        return self._support.correction(mode)

    def fill(self, mode: AttentionMode, bucket: int) -> None:
        """Measure how a mode attends in a bucket."""
        shapes, start = self.shapes(mode), bucket * SHAPE
        if len(shapes) <= start:
            shapes.extend([math.nan] * (start + SHAPE - len(shapes)))
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
        if len(shapes) <= start or math.isnan(shapes[start]):
            self.fill(mode, bucket)
        attended, visible, standing, growing, is_dense = shapes[start : start + SHAPE]
        row_s, request_s, drawn_s, shaped_s, sparse_s, pair_s, _, scored_s, kept_s, _ = coefficients.counts_s
        fixed_s = row_s + request_s
        fixed_s += is_drawn * drawn_s + is_shaped * shaped_s
        if is_dense:
            return fixed_s + pair_s * standing, pair_s * growing, standing, growing
        kept = min(attended * self.correction(mode), visible) * self._num_heads
        standing, growing = standing / GROUP_TOKENS, growing / GROUP_TOKENS
        fixed_s += sparse_s + kept_s * kept + scored_s * standing
        return fixed_s, scored_s * growing, kept + standing, growing
