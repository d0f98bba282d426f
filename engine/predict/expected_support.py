"""What a request will attend to, before it does: from its mode, the support profile and what requests like it did.

The predictor asks for every prediction, so answers are kept on a grid of contexts and read off between its points.
Without a profile a limit of the dropped mass is taken as the engine starts with it, at half of the context
(`engine/attention/policy.py`), and the mass that a token budget drops is not known. The profile is of a sample text.
What other texts need is learnt of every request that has ended and applied to the next: of a limit of the dropped mass,
how many times as many tokens its requests came to attend to (`engine/attention/steering.py` moves their budgets); of
token budgets, how many times as much mass their audits found dropped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from vashista.engine.messages import AttentionMode, SupportReport
from vashista.engine.predict.learnt_support import KEPT_AUDITS, MAX_LOG_FACTOR, Dropped, Learnt, SavedSupport
from vashista.engine.predict.prediction import ExpectedSupport
from vashista.engine.support_profile import SupportProfile
from vashista.engine.work import GROUP_TOKENS

GRID = 2 ** (1 / 4)
"""Ratio of neighbouring contexts."""
MAX_MODES = 64


class SupportForecast:
    """For one model on one engine."""

    def __init__(self, windows: tuple[int | None, ...], profile: SupportProfile | None, dense_below: int) -> None:
        """windows: of each layer."""
        self._windows = windows
        self._num_with = Counter(windows).items()
        self._profile = profile
        self._dense_below = dense_below
        self._grid: dict[AttentionMode, dict[int, ExpectedSupport]] = {}
        self._learnt: dict[AttentionMode, Learnt] = {}
        """Of the modes that were last heard of; the one unheard of for the longest comes first."""
        self._mass = Dropped(num=0.0, expected=0.0, found=0.0)
        self.num_lessons = 0
        """How often a correction has changed."""

    def at(self, mode: AttentionMode, context_len: int) -> ExpectedSupport:
        """Of one generated token with so many before it and itself."""
        found = self.uncorrected(mode, context_len)
        if found.dense_share >= 1.0:
            return found
        attended = min(found.tokens_attended * self.correction(mode), found.tokens_visible)
        share, mass = found.dense_share, found.dropped_mass
        if attended >= found.tokens_visible:
            share, mass = 1.0, 0.0
        elif mode.token_budget is not None and mass is not None:
            mass = min(1.0, mass * self._mass.factor)
        return ExpectedSupport(
            tokens_visible=found.tokens_visible, tokens_attended=attended, dense_share=share, dropped_mass=mass
        )

    def correction(self, mode: AttentionMode) -> float:
        """How many times as many tokens are attended as the profile says; 1 before it is known."""
        return math.exp(self._learnt[mode].log_factor) if mode in self._learnt else 1.0

    def uncorrected(self, mode: AttentionMode, context_len: int) -> ExpectedSupport:
        """The same by the profile alone."""
        visible = self.visible(context_len)
        if not mode.is_sparse or context_len < self._dense_below:
            return ExpectedSupport(tokens_visible=visible, tokens_attended=visible, dense_share=1.0, dropped_mass=0.0)
        place = math.log(context_len, GRID)
        index = math.floor(place)
        low, high = self._point(mode, index), self._point(mode, index + 1)
        share, mass = place - index, low.dropped_mass
        if mass is not None and high.dropped_mass is not None:
            mass += (high.dropped_mass - mass) * share
        attended = low.tokens_attended + (high.tokens_attended - low.tokens_attended) * share
        return ExpectedSupport(
            tokens_visible=visible,
            tokens_attended=min(attended, visible),
            dense_share=low.dense_share + (high.dense_share - low.dense_share) * share,
            dropped_mass=mass,
        )

    def over(self, mode: AttentionMode, num_prompt: int, num_tokens: int) -> ExpectedSupport:
        """Mean over the generated tokens after the first."""
        return self._mean(self.at, mode, num_prompt, num_tokens)

    def _mean(
        self, at: Callable[[AttentionMode, int], ExpectedSupport], mode: AttentionMode, num_prompt: int, num_tokens: int
    ) -> ExpectedSupport:
        if num_tokens < 2:
            return at(mode, num_prompt + 1)
        ends = num_prompt + 1, num_prompt + num_tokens - 1
        middle = (ends[0] + ends[1]) // 2
        first, half, last = at(mode, ends[0]), at(mode, middle), at(mode, ends[1])
        mass = None
        if first.dropped_mass is not None and half.dropped_mass is not None and last.dropped_mass is not None:
            mass = _simpson(first.dropped_mass, half.dropped_mass, last.dropped_mass)
        return ExpectedSupport(
            tokens_visible=_simpson(first.tokens_visible, half.tokens_visible, last.tokens_visible),
            tokens_attended=_simpson(first.tokens_attended, half.tokens_attended, last.tokens_attended),
            dense_share=_simpson(first.dense_share, half.dense_share, last.dense_share),
            dropped_mass=mass,
        )

    def observe(self, mode: AttentionMode, num_prompt: int, num_tokens: int, report: SupportReport) -> None:
        """What a request of these lengths did.

        It is compared with the profile alone, and not with what was expected when it came: many may end that came
        before the first of them taught anything.
        """
        if not mode.is_sparse or report.tokens_visible <= 0:
            return
        expected = self._mean(self.uncorrected, mode, num_prompt, num_tokens)
        if mode.token_budget is not None:
            if report.audit is not None and expected.dropped_mass:
                self._mass = self._mass.after(report.audit.num_audits, expected.dropped_mass, report.audit.dropped_mass)
            return
        share = report.tokens_attended / report.tokens_visible / (expected.tokens_attended / expected.tokens_visible)
        known = self._learnt.pop(mode, Learnt(num=0, log_factor=0.0))
        if len(self._learnt) >= MAX_MODES:
            del self._learnt[next(iter(self._learnt))]
        self._learnt[mode] = known.after(min(MAX_LOG_FACTOR, max(-MAX_LOG_FACTOR, math.log(share))))
        self.num_lessons += 1

    def state(self) -> SavedSupport:
        """What was learnt, to be kept."""
        learnt = {mode.max_dropped_mass: one for mode, one in self._learnt.items() if mode.max_dropped_mass is not None}
        return SavedSupport(learnt=learnt, mass=self._mass)

    def restore(self, saved: SavedSupport) -> None:
        """What an earlier forecast had learnt. Raises ValueError if that cannot be."""
        mass = saved.mass
        is_right = all(
            0.0 < limit < 1.0 and one.num >= 0 and abs(one.log_factor) <= MAX_LOG_FACTOR
            for limit, one in saved.learnt.items()
        )
        has_audits = 0.0 < mass.num <= 2 * KEPT_AUDITS and 0.0 < mass.expected <= mass.num
        if not is_right or not (has_audits or mass.num == mass.expected == 0.0) or not 0.0 <= mass.found <= mass.num:
            raise ValueError("what was learnt of the support holds a number that cannot be")
        last = list(saved.learnt.items())[-MAX_MODES:]
        self._learnt = {AttentionMode(max_dropped_mass=mass): one for mass, one in last}
        self._mass = saved.mass
        self.num_lessons += 1

    def visible(self, context_len: int) -> float:
        """Tokens that a query sees, mean over the layers."""
        seen = sum([count * min(context_len, window or context_len) for window, count in self._num_with])
        return seen / len(self._windows)

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


def _simpson(first: float, half: float, last: float) -> float:
    """The mean over a stretch, from both its ends and its middle."""
    return (first + 4 * half + last) / 6
