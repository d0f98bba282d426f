"""The engine's busy time, and each request's share of it: booked after every step, whatever became of the requests.

The engine measures a step from the scheduler's first look to its last event and books it here; the shares travel in
the step's `StepReport`, the total in `EngineStats`. Both are exact to rounding, so that the shares of all requests, the
aborted and failed ones too, add up to the total. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vashista.engine.messages import SamplingParams
from vashista.engine.predict.features import COLD_KEEP, FEW_TOKENS, StepFeatures, computed, idle_of
from vashista.engine.scheduler import Batch, BatchItem
from vashista.engine.support import SpanSupport
from vashista.engine.work import WorkModel, divide


class BusyTime:
    """The books of one engine."""

    def __init__(self, model: WorkModel, prompt_rows: Sequence[int] = ()) -> None:
        """prompt_rows: as in `SchedulerRules`."""
        self._model = model
        self._prompt_rows = prompt_rows
        self.total_s = 0.0
        """Of all steps so far."""
        self.shares: dict[str, float] = {}
        """Of the last step: seconds by request id."""
        self.features = StepFeatures()
        """Of the last batch that was weighed."""
        self.cold = 0.0
        """Of the next step, if it has few tokens."""

    def weigh(
        self,
        batch: Batch,
        support: Mapping[str, SpanSupport],
        needs_all_rows: Callable[[BatchItem], bool] = lambda item: False,
        pause_s: float = 0.0,
    ) -> dict[str, float]:
        """The work of each request in a batch that was computed, before its new tokens are added.

        `support` says what the sparse items attended to, `pause_s` how long the engine had nothing to do before. What
        the step's time is made of is counted on the way.
        """
        num_single = sum(item.num_tokens == 1 for item in batch.items)
        num_tokens, is_split = computed(num_single, batch.num_tokens - num_single, self._prompt_rows)
        self.features = StepFeatures(num_tokens, num_requests=len(batch.items), idle=idle_of(pause_s))
        self.features.split = float(is_split)
        if batch.num_tokens > FEW_TOKENS:
            self.cold = 1.0
        else:
            self.features.cold = self.cold
            self.cold *= COLD_KEEP
        return {
            item.request.id: self._work(item, support.get(item.request.id), needs_all_rows(item))
            for item in batch.items
        }

    def book(self, works: Mapping[str, float], seconds: float) -> None:
        """A step of these works took `seconds`."""
        self.shares = dict(zip(works, divide(seconds, list(works.values())), strict=True))
        self.total_s += seconds

    def rest(self) -> None:
        """A step that computed nothing."""
        self.shares = {}

    def _work(self, item: BatchItem, support: SpanSupport | None, needs_all_rows: bool) -> float:
        counts, sampling = self.features, item.request.sampling
        if support is None:
            num_pairs: float = self._model.dense_pairs(item.start, item.end)
            if item.num_tokens == 1:
                counts.decode_pairs += num_pairs
            else:
                counts.prompt_pairs += num_pairs
        else:
            num_pairs = self._model.sparse_pairs(support.tokens_attended, support.tokens_visible)
            counts.num_sparse += 1
            counts.kept_pairs += support.tokens_attended
            counts.scored_pairs += num_pairs - support.tokens_attended
        num_rows = item.num_tokens if needs_all_rows else int(item.is_caught_up)
        counts.num_rows += num_rows
        if item.is_caught_up:
            counts.num_drawn += sampling.temperature > 0
            counts.num_shaped += is_shaped(sampling, item.request.num_output_tokens)
        return self._model.item(item.num_tokens, num_rows, num_pairs)


def is_shaped(sampling: SamplingParams, num_output_tokens: int = 0) -> bool:
    """Whether logits are masked or changed before the next token is chosen."""
    return bool(
        sampling.grammar
        or sampling.logit_bias
        or sampling.min_tokens > num_output_tokens
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )
