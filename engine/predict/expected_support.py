"""What a request will attend to, before it does: from its mode, the support profile and what requests like it did.

The predictor asks for every prediction, so answers are kept on a grid of contexts and read off between its points.
Without a profile a limit of the dropped mass is taken as the engine starts with it, at half of the context
(`engine/attention/policy.py`), and the mass that a token budget drops is not known. Audits move the budgets of a
request that has a limit; by how much they did is learnt and applied to the next.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from vashista.engine.messages import AttentionMode, SupportReport
from vashista.engine.predict.prediction import ExpectedSupport
from vashista.engine.support_profile import SupportProfile
from vashista.engine.work import GROUP_TOKENS

GRID = 2 ** (1 / 4)
"""Ratio of neighbouring contexts."""
MAX_MODES = 64
LEARN = 0.05
"""How much one finished request moves the correction."""


class SupportForecast:
    """For one model on one engine."""

    def __init__(self, windows: tuple[int | None, ...], profile: SupportProfile | None, dense_below: int) -> None:
        """windows: of each layer."""
        self._windows = windows
        self._profile = profile
        self._dense_below = dense_below
        self._grid: dict[AttentionMode, dict[int, ExpectedSupport]] = {}
        self._correction: dict[AttentionMode, float] = {}
        """Of the modes that were last heard of; the one unheard of for the longest comes first."""
        self.num_lessons = 0
        """How often a correction has changed."""

    def at(self, mode: AttentionMode, context_len: int) -> ExpectedSupport:
        """Of one generated token with so many before it and itself."""
        found = self.uncorrected(mode, context_len)
        if mode not in self._correction or found.dense_share >= 1.0:
            return found
        attended = min(found.tokens_attended * self._correction[mode], found.tokens_visible)
        return msgspec.structs.replace(found, tokens_attended=attended)

    def correction(self, mode: AttentionMode) -> float:
        """How many times as many tokens are attended as the profile says; 1 before it is known."""
        return self._correction.get(mode, 1.0)

    def uncorrected(self, mode: AttentionMode, context_len: int) -> ExpectedSupport:
        """The same by the profile alone."""
        visible = self.visible(context_len)
        if not mode.is_sparse or context_len < self._dense_below:
            return ExpectedSupport(tokens_visible=visible, tokens_attended=visible, dense_share=1.0, dropped_mass=0.0)
        place = math.log(context_len, GRID)
        index = math.floor(place)
        low, high = self._point(mode, index), self._point(mode, index + 1)
        share = place - index

        def between(a: float, b: float) -> float:
            return a + (b - a) * share

        mass = None
        if low.dropped_mass is not None and high.dropped_mass is not None:
            mass = between(low.dropped_mass, high.dropped_mass)
        return ExpectedSupport(
            tokens_visible=visible,
            tokens_attended=min(between(low.tokens_attended, high.tokens_attended), visible),
            dense_share=between(low.dense_share, high.dense_share),
            dropped_mass=mass,
        )

    def over(self, mode: AttentionMode, num_prompt: int, num_tokens: int) -> ExpectedSupport:
        """Mean over the generated tokens after the first."""
        if num_tokens < 2:
            return self.at(mode, num_prompt + 1)
        ends = num_prompt + 1, num_prompt + num_tokens - 1
        middle = (ends[0] + ends[1]) // 2
        points = [(self.at(mode, ends[0]), 1), (self.at(mode, middle), 4), (self.at(mode, ends[1]), 1)]

        def mean(name: str) -> float:
            return sum(weight * float(getattr(point, name)) for point, weight in points) / 6  # Simpson's rule

        has_mass = all(point.dropped_mass is not None for point, _ in points)
        return ExpectedSupport(
            tokens_visible=mean("tokens_visible"),
            tokens_attended=mean("tokens_attended"),
            dense_share=mean("dense_share"),
            dropped_mass=mean("dropped_mass") if has_mass else None,
        )

    def observe(self, mode: AttentionMode, expected: ExpectedSupport, report: SupportReport) -> None:
        """What a request did whose expectation was that."""
        if mode.max_dropped_mass is None or report.tokens_visible <= 0 or expected.tokens_attended <= 0:
            return
        expected_share = expected.tokens_attended / expected.tokens_visible
        ratio = min(4.0, max(0.25, report.tokens_attended / report.tokens_visible / expected_share))
        known = self._correction.pop(mode, 1.0)
        if len(self._correction) >= MAX_MODES:
            del self._correction[next(iter(self._correction))]
        self._correction[mode] = known * math.exp(LEARN * math.log(ratio))
        self.num_lessons += 1

    def visible(self, context_len: int) -> float:
        """Tokens that a query sees, mean over the layers."""
        return sum(min(context_len, window or context_len) for window in self._windows) / len(self._windows)

    def _point(self, mode: AttentionMode, index: int) -> ExpectedSupport:
        points = self._grid.get(mode)
        if points is None:
            if len(self._grid) >= MAX_MODES:
                del self._grid[next(iter(self._grid))]
            points = self._grid[mode] = {}
        if index not in points:
            points[index] = self._measure(mode, max(1, round(GRID**index)))
        return points[index]

    def _measure(self, mode: AttentionMode, context_len: int) -> ExpectedSupport:
        profile = self._profile
        seen = np.array([[min(context_len, window or context_len)] for window in self._windows], dtype=np.float64)
        if mode.token_budget is not None:
            kept = np.minimum(-(-mode.token_budget // GROUP_TOKENS) * GROUP_TOKENS, seen)
            mass = None
            if profile is not None:
                mass = float(np.mean(profile.expected_dropped_mass(context_len, mode.token_budget)))
                kept = np.where(profile.retrieval_heads, seen, kept)
        else:
            assert mode.max_dropped_mass is not None
            mass = mode.max_dropped_mass
            kept = np.minimum(context_len / 2, seen)
            if profile is not None:
                kept = np.minimum(np.array(profile.budgets(context_len, mass), dtype=np.float64), seen)
        return ExpectedSupport(
            tokens_visible=float(seen.mean()),
            tokens_attended=float(kept.mean()),
            dense_share=float((kept >= seen).mean()),
            dropped_mass=mass,
        )
