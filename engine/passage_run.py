"""Runs passages of text through a model, one at a time, with observers in its attention and a clock on its steps.

`engine/calibrate.py` and `engine/diagnose.py` use it. It drives the runner as the engine does, without scheduler and
sampling: prompt chunks, with captures on the way (`engine/attention/capture.py`), then decode steps against the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence

import torch

from vashista.engine.attention.capture import CapturingAttention, Observer
from vashista.engine.config import EngineConfig
from vashista.engine.errors import NotEnoughMemoryError
from vashista.engine.messages import SamplingParams, Submit
from vashista.engine.model_config import ModelConfig
from vashista.engine.models.decode_graph import SEEN
from vashista.engine.pages import root_hash
from vashista.engine.request import Request
from vashista.engine.runner import Progress, Runner
from vashista.engine.scheduler import Batch, BatchItem
from vashista.engine.step import Selection

CHUNK_TOKENS = {"cpu": 512, "cuda": 4096}
NUM_WARM_STEPS, NUM_TIMED_STEPS = SEEN, 15
"""Decode steps of each case: untimed ones, the last of which is captured on a GPU, then those whose median counts."""


class PassageRun:
    """A model that reads passages of up to `max_tokens` tokens."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        observer: Observer,
        progress: Progress | None = None,
    ) -> None:
        """Loads the model; config.max_context is the longest passage. Raises the engine's errors of a start."""
        self.runner = Runner(config, model_config, progress)
        needed = -(-self.runner.max_context // config.page_size)
        if self.runner.num_pages < needed:
            raise NotEnoughMemoryError(
                f"A context of {self.runner.max_context} tokens needs {needed} KV pages; there is room for "
                f"{self.runner.num_pages}."
            )
        self._pages = list(range(needed))
        self._attention = CapturingAttention(self.runner.attention, self.runner.attention_shape, observer)
        self.runner.attention = self._attention

    def observe_with(self, observer: Observer) -> None:
        """What is captured from now on goes to this observer."""
        self._attention.observer = observer

    def read(
        self,
        token_ids: list[int],
        positions: Collection[int],
        on_tokens: Callable[[int], None] = lambda num_tokens: None,
    ) -> None:
        """Compute a passage and capture `positions`; `on_tokens` is called with the number of tokens of each chunk."""
        request = self._request(token_ids)
        chunk = CHUNK_TOKENS[self.runner.device.type]
        self._attention.watch(positions)
        for start in range(0, len(token_ids), chunk):
            num_tokens = min(chunk, len(token_ids) - start)
            self.runner.execute(Batch([BatchItem(request, start, num_tokens)]), lambda item: False)
            on_tokens(num_tokens)

    @property
    def is_sparse(self) -> bool:
        """Whether the attention module can leave tokens out."""
        return self._attention.name != "dense"

    def time_steps(self, token_ids: list[int], cases: Sequence[tuple[int, int | None]]) -> list[float]:
        """Median seconds of a decode step in each case, after `read` of the same passage; captures nothing.

        A case is a context length, and the tokens that every KV head keeps or None for all. The cases take turns, so
        that whatever else the machine does slows all of them alike. A step is computed again and again and overwrites
        the key and value of its own position alone; read the passage again before capturing anything more.
        """
        self._attention.watch(())
        self.runner.attention = self._attention.inner  # steps of its own are captured as CUDA graphs, as when it serves
        work = [
            (self._request(token_ids[:context_len]), context_len, None if budget is None else self._selection(budget))
            for context_len, budget in cases
        ]
        times_s: list[list[float]] = [[] for _ in cases]
        for _ in range(NUM_WARM_STEPS + NUM_TIMED_STEPS):
            for found, (request, context_len, selection) in zip(times_s, work, strict=True):
                started_s = time.perf_counter()
                self._decode(request, context_len, selection)
                self._synchronize()
                found.append(time.perf_counter() - started_s)
        self.runner.attention = self._attention
        return [statistics.median(found[NUM_WARM_STEPS:]) for found in times_s]

    def _decode(self, request: Request, context_len: int, selection: Selection | None) -> None:
        """One step for the last token, to the choice of the next."""
        batch = Batch([BatchItem(request, context_len - 1, 1)])
        output = self.runner.execute(batch, lambda item: True, lambda item: selection)
        best = self.runner.logits(output.hidden).argmax(dim=-1)
        output.take_support()
        best.tolist()

    def _selection(self, token_budget: int) -> Selection:
        """The same budget for every KV head, and no audits."""
        shape = self.runner.attention_shape
        budgets = torch.full((shape.num_layers, shape.num_kv_heads), token_budget, dtype=torch.int32)
        return Selection(budgets, [])

    def _request(self, token_ids: list[int]) -> Request:
        submit = Submit("passage", token_ids, SamplingParams(seed=0, max_tokens=1), arrival_s=0.0)
        request = Request(submit, root_hash("passage"))
        request.pages = self._pages
        return request

    def _synchronize(self) -> None:
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)
