"""Measures a model's support profile and a device's step times; the work behind `vashista calibrate`.

The model reads passages of text with dense attention. At positions near each context length the exact attention of
every query head is taken apart (`engine/attention/rules.py`): how many tokens hold the mass, and how much would be
dropped if the rule kept 1, 2, 3, ... groups. Averaged over positions that gives, for each (layer, KV head), the tokens
needed for each target. Then passages with a repetition show which heads retrieve (`engine/retrieval.py`). The result is
a `SupportProfile`, which the caller saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vashista.engine.attention.capture import Captured
from vashista.engine.attention.rules import (
    GROUP_TOKENS,
    NUM_RECENT,
    NUM_SINKS,
    Groups,
    dropped_mass_curve,
    group_scores,
    keep_order,
    logits_of,
    support_of,
)
from vashista.engine.config import EngineConfig
from vashista.engine.model_config import ModelConfig
from vashista.engine.model_digest import model_digest
from vashista.engine.passage_run import PassageRun
from vashista.engine.retrieval import RepeatedPassage, RetrievalTaker
from vashista.engine.runner import Progress
from vashista.engine.sample_text import spread_positions
from vashista.engine.step_times import measure_times
from vashista.engine.support_curves import Floats
from vashista.engine.support_profile import TARGETS, Rule, SupportProfile, SupportStats

SMALL_CONTEXT = 64
"""A step this short is timed too: it is nearly all overhead."""


@dataclass(frozen=True)
class CalibrationPlan:
    """What to measure."""

    contexts: Sequence[int]
    """Ascending."""
    num_positions: int
    """Queries measured at each context in each passage."""
    rule: Rule = Rule.MEAN_VARIANCE
    targets: Sequence[float] = TARGETS
    num_sinks: int = NUM_SINKS
    num_recent: int = NUM_RECENT

    def positions(self) -> dict[int, list[int]]:
        """For each position to capture, the indices of the contexts that it counts for."""
        found: dict[int, list[int]] = {}
        for index, context in enumerate(self.contexts):
            for position in spread_positions(context, self.num_positions):
                found.setdefault(position, []).append(index)
        return found

    def num_tokens(self, passages: Sequence[list[int]]) -> int:
        """That the model reads in all."""
        return sum(len(token_ids) + len(RepeatedPassage(token_ids).token_ids) for token_ids in passages)


@dataclass
class _HeadTally:
    """What was seen of one (layer, KV head, context)."""

    curve: Floats = field(default_factory=lambda: np.zeros(0))
    """Dropped mass with 0, 1, 2, ... groups kept, summed over queries; the largest of the query group."""
    num_forced: int = 0
    """Most groups that were always kept."""
    support: list[Floats] = field(default_factory=list)
    """A query each: [3, query group], effective tokens, tokens of 90 % and of 99 %."""

    def add(self, curve: Floats, num_forced: int, support: Floats) -> None:
        """Book one query."""
        longer, shorter = (curve, self.curve) if len(curve) > len(self.curve) else (self.curve, curve)
        longer = longer.copy()
        longer[: len(shorter)] += shorter  # a query with fewer groups drops nothing beyond them
        self.curve = longer
        self.num_forced = max(self.num_forced, num_forced)
        self.support.append(support)

    def tokens(self, targets: Sequence[float]) -> list[int]:
        """Tokens to keep for each target."""
        mean = self.curve / len(self.support)
        # A mean that is the target but for rounding is at the target.
        counts = [max(int(np.argmax(mean <= target * (1 + 1e-9))), self.num_forced) for target in targets]
        return [count * GROUP_TOKENS for count in counts]

    def stats(self) -> SupportStats:
        """Median and 90th percentile."""
        values = np.concatenate(self.support, axis=1)
        median, high = np.median(values, axis=1), np.quantile(values, 0.9, axis=1)
        return SupportStats(
            effective_median=float(median[0]),
            effective_p90=float(high[0]),
            tokens_90_median=float(median[1]),
            tokens_90_p90=float(high[1]),
            tokens_99_median=float(median[2]),
            tokens_99_p90=float(high[2]),
        )


class SupportTaker:
    """Books every captured query; its `observe` is the observer of a `PassageRun`."""

    def __init__(self, plan: CalibrationPlan, model_config: ModelConfig) -> None:
        self._plan = plan
        self._scale = model_config.head_dim**-0.5
        self.positions = plan.positions()
        size = (model_config.num_layers, model_config.num_kv_heads, len(plan.contexts))
        self._tallies = [[[_HeadTally() for _ in range(size[2])] for _ in range(size[1])] for _ in range(size[0])]

    def observe(self, seen: Captured) -> None:
        """Take one query's attention apart."""
        plan = self._plan
        groups = Groups(seen.keys.shape[1], seen.first, GROUP_TOKENS)
        q, keys = seen.query.double(), seen.keys.double()
        forced = groups.forced(plan.num_sinks, plan.num_recent, q.device)
        order = keep_order(group_scores(plan.rule, q, keys, self._scale, groups), forced)
        logits = logits_of(q, keys, self._scale)
        num_kv_heads = keys.shape[0]
        curves = dropped_mass_curve(logits, order, groups).view(num_kv_heads, -1, groups.num_groups + 1).amax(1)
        support = support_of(logits)
        values = torch.stack([support.effective, support.tokens_90, support.tokens_99]).view(3, num_kv_heads, -1)
        curve_rows, value_rows, num_forced = curves.cpu().numpy(), values.cpu().numpy(), int(forced.sum())
        for context in self.positions[seen.position]:
            for head in range(num_kv_heads):
                self._tallies[seen.layer][head][context].add(curve_rows[head], num_forced, value_rows[:, head])

    def tokens(self) -> list[list[list[list[int]]]]:
        """[num_layers][num_kv_heads][contexts][targets]"""
        targets = self._plan.targets
        return [[[tally.tokens(targets) for tally in head] for head in layer] for layer in self._tallies]

    def support(self) -> list[list[list[SupportStats]]]:
        """[num_layers][num_kv_heads][contexts]"""
        return [[[tally.stats() for tally in head] for head in layer] for layer in self._tallies]


def calibrate(
    config: EngineConfig,
    model_config: ModelConfig,
    plan: CalibrationPlan,
    passages: Sequence[list[int]],
    on_loaded: Progress | None = None,
    on_tokens: Callable[[int], None] = lambda num_tokens: None,
) -> SupportProfile:
    """Run the model over the passages, each as long as the last context, and fill a profile.

    config.max_context must be that length; config.attention decides whether sparse steps can be timed too. Steps are
    timed after the last passage. Raises the engine's errors of a start, and MeasurementError for more positions than a
    context has.
    """
    taker = SupportTaker(plan, model_config)
    run = PassageRun(config, model_config, taker.observe, on_loaded)
    for token_ids in passages:
        run.read(token_ids, taker.positions, on_tokens)
    times = measure_times(run, passages[-1], sorted({min(SMALL_CONTEXT, plan.contexts[0]), *plan.contexts}))
    retrieval = RetrievalTaker(model_config.num_layers, model_config.num_kv_heads, model_config.head_dim**-0.5)
    run.observe_with(retrieval.observe)
    for passage in map(RepeatedPassage, passages):
        retrieval.start(passage)
        run.read(passage.token_ids, passage.positions, on_tokens)
    return SupportProfile(
        model_digest=model_digest(config.model_dir),
        rule=plan.rule,
        group_tokens=GROUP_TOKENS,
        num_sinks=plan.num_sinks,
        num_recent=plan.num_recent,
        contexts=list(plan.contexts),
        num_positions=[plan.num_positions * len(passages)] * len(plan.contexts),
        targets=list(plan.targets),
        layer_windows=list(model_config.layer_windows),
        tokens=taker.tokens(),
        support=taker.support(),
        retrieval=retrieval.mass(),
        devices={run.runner.device_name: times},
    )
