"""What a step that the scheduler thinks of would take, by what the engine has learnt of its steps. No torch here.

`Scheduler` builds an estimate item by item for the promise to running streams, `Deadlines` for requests that are late.
The coefficients are those of `engine/predict/step_time.py`; the time between two steps counts with the step. That the
first steps after a prompt or a pause take longer (`StepFeatures.cold`, `.idle`) is left out: a step may not look
shorter for more tokens. It does so once, from the most of `prompt_rows` to one more: then its weights are read once.
"""

from __future__ import annotations

from collections.abc import Sequence

from vashista.engine.busy_time import is_shaped
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.features import computed
from vashista.engine.scheduler import BatchItem
from vashista.engine.work import GROUP_TOKENS, WorkModel


class ModelledStep:
    """A step that grows by items; the `StepEstimate` of `engine/scheduler.py`."""

    def __init__(
        self,
        coefficients: StepCoefficients,
        work: WorkModel,
        whole_share: float = 0.0,
        prompt_rows: Sequence[int] = (),
    ) -> None:
        """whole_share: of the KV heads, those that attend to everything in every mode.

        prompt_rows: as in `SchedulerRules`.
        """
        self._costs = coefficients
        self._work = work
        self._whole_share = whole_share
        self._prompt_rows = prompt_rows
        self._num_tokens = self._num_single = 0
        self._items_s = 0.0

    def add(self, item: BatchItem) -> None:
        """The step computes this, too."""
        self._num_tokens += item.num_tokens
        self._num_single += item.num_tokens == 1
        self._items_s += self._item_s(item)

    def seconds(self, extra: BatchItem | None = None) -> float:
        """Of all items, and one more, with the pause before the next step."""
        num_tokens, num_single, items_s = self._num_tokens, self._num_single, self._items_s
        if extra is not None:
            num_tokens += extra.num_tokens
            num_single += extra.num_tokens == 1
            items_s += self._item_s(extra)
        num_computed, is_split = computed(num_single, num_tokens - num_single, self._prompt_rows)
        if is_split:
            items_s += self._costs.count_s("split")
        return self._costs.tokens_s(num_computed) + items_s + self._costs.gap_s

    def _item_s(self, item: BatchItem) -> float:
        """Without its tokens' part."""
        costs, request = self._costs, item.request
        sampling = request.sampling
        seconds = costs.count_s("num_requests")
        num_rows = 0
        if sampling.prompt_logprobs is not None and item.start < request.num_prompt_tokens:
            num_rows = item.num_tokens
        elif item.end >= request.num_known_tokens:
            num_rows = 1
        seconds += num_rows * costs.count_s("num_rows")
        if item.end >= request.num_known_tokens:
            seconds += (sampling.temperature > 0) * costs.count_s("num_drawn")
            seconds += is_shaped(sampling, request.num_output_tokens) * costs.count_s("num_shaped")
        return seconds + self._attention_s(item)

    def _attention_s(self, item: BatchItem) -> float:
        """Of a sparse token whose budget is not known before its step, as much as a dense one takes at most."""
        costs, mode = self._costs, item.request.submit.attention
        num_pairs = self._work.dense_pairs(item.start, item.end)
        if item.num_tokens > 1:
            return num_pairs * costs.count_s("prompt_pairs")
        dense_s = num_pairs * costs.count_s("decode_pairs")
        if not mode.is_sparse or not item.is_generated:
            return dense_s
        kept = float(num_pairs)
        if mode.token_budget is not None:
            kept = min(num_pairs, mode.token_budget * sum(count for _, count in self._work.windows))
            kept += self._whole_share * (num_pairs - kept)
        sparse_s = kept * costs.count_s("kept_pairs") + num_pairs / GROUP_TOKENS * costs.count_s("scored_pairs")
        sparse_s += costs.count_s("num_sparse")
        return max(dense_s, sparse_s) if mode.token_budget is None else sparse_s
