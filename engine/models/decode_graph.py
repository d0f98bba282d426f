"""Steps of a model on a GPU as CUDA graphs: one launch in place of several hundred.

A step of single queries takes a few milliseconds of a GPU and, launched kernel by kernel from Python, tens of
milliseconds of a CPU; so does a short prompt. `Decoder` makes one `DecodeGraphs` on a GPU, for steps in which every
request has one token, and for those of one chunk of one prompt, to PROMPT_ROWS tokens. A step is padded to one of a few
numbers of rows; what else has to be equal for two steps to share a graph is the attention module's to say
(`Capturable.graph_key`). A graph is captured when its key comes for the SEEN-th time, so that odd steps do not cost a
capture each; until then, and for all other steps, the layers are launched as ever. All graphs share one pool of memory;
the ones used least recently go first. Where the memory does not suffice for one more of a prompt, those of prompts are
given up; where it does not for a decode step, all are; and no new key of such steps is captured.
"""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vashista.engine.attention.interface import Attention, Capturable
from vashista.engine.step import StepInput

if TYPE_CHECKING:
    from vashista.engine.models.decoder import Decoder

SEEN = 3
MAX_GRAPHS = 48
PROMPT_ROWS = (32, 64, 128, 256, 384, 512, 768, 1024)
"""Tokens that a chunk of a prompt is padded to. Of longer ones a model large enough to matter computes longer than they
take to be launched (8 G parameters: 37 ms, H100)."""
MAX_KEYS = 1024
"""Keys whose steps are counted."""
NUM_WARM_RUNS = 2
"""Before a capture: kernels are compiled and workspaces allocated outside of it."""

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]
"""Runs a function over fixed tensors, and returns what runs it again."""


def num_rows_of(num_spans: int) -> int:
    """Rows of the graph for so many requests: 1, 2, 4, then multiples of 8."""
    if num_spans <= 2:
        return num_spans
    return 4 if num_spans <= 4 else -(-num_spans // 8) * 8


def num_prompt_rows_of(num_tokens: int) -> int | None:
    """Rows of the graph for a chunk of so many tokens; None where there is none."""
    return next((rows for rows in PROMPT_ROWS if rows >= num_tokens), None)


class CudaCapture:
    """Captures on one device, into one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], None]) -> Replay:
        """See `Capture`."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_RUNS):
                    compute()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                compute()
        replay: Replay = graph.replay
        return replay


@dataclass(slots=True)
class DecodeGraph:
    """One captured step and the tensors that it works on."""

    replay: Replay
    fixed: object
    token_ids: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor
    """[num_rows, hidden_size], final and normed."""


@dataclass(frozen=True)
class _Prompt:
    """The key of a chunk of a prompt."""

    num_rows: int


class DecodeGraphs:
    """The captured steps of one model with one attention module."""

    def __init__(self, model: Decoder, attention: Capturable, capture: Capture) -> None:
        self._model = model
        self._attention = attention
        self._capture = capture
        self._graphs: OrderedDict[Hashable, DecodeGraph] = OrderedDict()
        self._counts: OrderedDict[Hashable, int] = OrderedDict()
        self._is_full = self._has_no_prompts = False

    @classmethod
    def make(cls, model: Decoder, attention: Attention) -> DecodeGraphs | None:
        """None where the device has no graphs, or the attention module cannot be captured."""
        device = model.embedding.device
        if device.type != "cuda" or not isinstance(attention, Capturable):
            return None
        return cls(model, attention, CudaCapture(device))

    def run(self, step: StepInput, attention: Attention) -> torch.Tensor | None:
        """Final, normed hidden states of all rows: [num_tokens, hidden_size]; None where no graph serves the step."""
        num_spans, num_tokens = len(step.spans), step.token_ids.shape[0]
        if attention is not self._attention:
            return None
        key: Hashable
        if num_tokens == num_spans:
            num_rows = num_rows_of(num_spans)
            key = self._attention.graph_key(step.spans, num_rows)
        elif num_spans == 1 and not self._has_no_prompts and (found := num_prompt_rows_of(num_tokens)) is not None:
            num_rows, key = found, _Prompt(found)
        else:
            return None
        graph = self._graphs.get(key)
        if graph is None:
            if self._is_full or not self._is_due(key):
                return None
            try:
                graph = self._add(key, num_rows)
            except torch.OutOfMemoryError:
                self._give_up(key)
                return None
        self._graphs.move_to_end(key)
        graph.token_ids[:num_tokens].copy_(step.token_ids)
        graph.positions[:num_tokens].copy_(step.positions)
        self._attention.fill(graph.fixed, step.spans)
        graph.replay()
        return graph.hidden[:num_tokens].clone()

    def _is_due(self, key: Hashable) -> bool:
        count = self._counts.pop(key, 0) + 1
        if count >= SEEN:
            return True
        self._counts[key] = count
        while len(self._counts) > MAX_KEYS:
            self._counts.popitem(last=False)
        return False

    def _give_up(self, key: Hashable) -> None:
        """Launch such steps layer by layer from now on: slower, and the memory is there for the requests."""
        if isinstance(key, _Prompt):
            self._has_no_prompts, what = True, "prompts"
            for old in [old for old in self._graphs if isinstance(old, _Prompt)]:
                del self._graphs[old]
        else:
            self._is_full, what = True, "decode steps"
            self._graphs.clear()
        gc.collect()
        torch.cuda.empty_cache()
        sys.stderr.write(
            f"engine: no memory for CUDA graphs: {what} are launched layer by layer, which is slower; "
            "lower kv_memory_fraction or kv_cache_bytes\n"
        )

    def _add(self, key: Hashable, num_rows: int) -> DecodeGraph:
        """Capture a step of padding."""
        while len(self._graphs) >= MAX_GRAPHS:
            self._graphs.popitem(last=False)
        model = self._model
        token_ids = torch.zeros(num_rows, dtype=torch.int64, device=model.embedding.device)
        hidden = torch.zeros(num_rows, model.config.hidden_size, dtype=model.embedding.dtype, device=token_ids.device)
        graph = DecodeGraph(
            replay=lambda: None,
            fixed=self._attention.fix_prompt(num_rows)
            if isinstance(key, _Prompt)
            else self._attention.fix(key, num_rows),
            token_ids=token_ids,
            positions=torch.zeros_like(token_ids),
            hidden=hidden,
        )

        def compute() -> None:
            self._attention.use(graph.fixed, *model.rotary(graph.positions))
            graph.hidden.copy_(model.through_layers(graph.token_ids, self._attention))

        graph.replay = self._capture(compute)
        self._graphs[key] = graph
        return graph
