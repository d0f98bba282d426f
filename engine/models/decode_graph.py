"""Steps of a model on a GPU as CUDA graphs: one launch in place of several hundred.

A step of single queries takes a few milliseconds of a GPU and, launched kernel by kernel from Python, tens of
milliseconds of a CPU; so do short prompts. `Decoder` makes one `DecodeGraphs` on a GPU, for steps in which every
request has one token, for chunks of prompts to PROMPT_ROWS tokens in all, and for steps of both. The latter are two
graphs, one behind the other: the weights are read twice, which takes less than launching the layers once, the graphs
are those that are there anyway, and a stream's hidden states are the same whether a prompt is read beside it or not.

Either part is padded to one of a few numbers of rows; what else has to be equal for two steps to share a graph is the
attention module's to say (`Capturable.graph_key`). A graph is captured when its key comes for the SEEN-th time, so that
odd steps do not cost a capture each; until then, and for all other steps, the layers are launched as ever.

All graphs share one pool for what their kernels leave to one another; each has tensors of its own, for what comes in
and for what attention reports: 18 MiB for 32 streams that keep 1,024 tokens a head, 165 MiB for 32 that keep 65,536
(sizes added up; 32 layers, 8 KV heads). So there are at most MAX_GRAPHS, whose own tensors take at most GRAPH_SHARE of
the memory that is free once the KV pages are reserved, or one graph that takes more; those used least recently go.
Where the memory does not suffice for one more of prompts, those of prompts are given up; where it does not for a decode
step, all are. Such steps are then launched layer by layer for a while (`capture_pause.py`), and captured again within
the same share of what is free then.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from vashista.engine.attention.interface import Attention, Capturable
from vashista.engine.memory import free_bytes
from vashista.engine.models.capture_pause import CapturePause
from vashista.engine.predict.features import rows_of_prompts
from vashista.engine.step import Span, StepInput

if TYPE_CHECKING:
    from vashista.engine.models.decoder import Decoder

SEEN = 3
MAX_GRAPHS = 48
GRAPH_SHARE = 0.5
"""Of the memory that KV pages leave free; the other half is for what the layers and the sampler work on."""
PROMPT_ROWS = (32, 64, 128, 256, 384, 512, 768, 1024)
"""Tokens that the chunks of a step are padded to. Of more a model large enough to matter computes longer than they take
to be launched (8 G parameters: 37 ms, H100)."""
MAX_PROMPTS = 32
"""Chunks in one graph."""
MAX_KEYS = 1024
"""Keys whose steps are counted."""
NUM_WARM_RUNS = 2
"""Before a capture: kernels are compiled and workspaces allocated outside of it."""

Replay = Callable[[], None]


class Capture(Protocol):
    """Captures on one device."""

    def __call__(self, compute: Callable[[], None]) -> Replay:
        """Run a function over fixed tensors, and return what runs it again."""

    def bytes_taken(self) -> int:
        """Bytes that tensors take on the device."""


def num_rows_of(num_spans: int) -> int:
    """Rows of the graph for so many requests: 1, 2, 4, then multiples of 8."""
    if num_spans <= 2:
        return num_spans
    return 4 if num_spans <= 4 else -(-num_spans // 8) * 8


def num_prompt_rows_of(num_tokens: int) -> int | None:
    """Rows of the graph for chunks of so many tokens in all; None where there is none."""
    return rows_of_prompts(num_tokens, PROMPT_ROWS) or None


class CudaCapture:
    """Captures on a GPU, into one pool of memory; satisfies `Capture`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # one: on each stream the products keep a workspace

    def __call__(self, compute: Callable[[], None]) -> Replay:
        """See `Capture`."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(NUM_WARM_RUNS):
                    compute()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                compute()
        replay: Replay = graph.replay
        return replay

    def bytes_taken(self) -> int:
        """See `Capture`."""
        return torch.cuda.memory_allocated(self._device)


@dataclass(slots=True)
class DecodeGraph:
    """One captured step and the tensors that it works on."""

    replay: Replay
    fixed: object
    token_ids: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor
    """[num_rows, hidden_size], final and normed."""
    num_bytes: int
    """Of all these tensors."""


@dataclass(frozen=True)
class _Prompt:
    """The key of chunks of prompts."""

    num_rows: int


@dataclass(frozen=True, slots=True)
class _Part:
    """What one graph computes of a step: spans that are neighbours."""

    key: Hashable
    num_rows: int
    spans: list[Span]

    @property
    def num_tokens(self) -> int:
        """Of all spans."""
        return sum(span.num_queries for span in self.spans)

    @property
    def rows(self) -> slice:
        """Of the step's tokens."""
        start = self.spans[0].query_start
        return slice(start, start + self.num_tokens)


class DecodeGraphs:
    """The captured steps of one model with one attention module."""

    def __init__(
        self,
        model: Decoder,
        attention: Capturable,
        capture: Capture,
        room: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """room: bytes that the graphs' own tensors may take together; asked now, and when captures begin anew."""
        self._model = model
        self._attention = attention
        self._capture = capture
        self._room = room
        self._max_bytes = room()
        self._graphs: OrderedDict[Hashable, DecodeGraph] = OrderedDict()
        self._counts: OrderedDict[Hashable, int] = OrderedDict()
        self._pause, self._prompt_pause = CapturePause(clock), CapturePause(clock)
        """After the failure of a decode step, of all graphs; after that of a prompt, of those of prompts."""

    @classmethod
    def make(cls, model: Decoder, attention: Attention) -> DecodeGraphs | None:
        """None where the device has no graphs, or the attention module, whose store is reserved, cannot be captured."""
        device = model.embedding.device
        if device.type != "cuda" or not isinstance(attention, Capturable):
            return None
        return cls(model, attention, CudaCapture(device), lambda: int(GRAPH_SHARE * free_bytes(device)))

    def run(self, step: StepInput, attention: Attention) -> torch.Tensor | None:
        """Final, normed hidden states of all rows: [num_tokens, hidden_size]; None where no graph serves the step."""
        parts = self._parts(step.spans) if attention is self._attention else []
        found = [self._graph(part) for part in parts]  # of all, so that each is counted
        graphs = [graph for graph in found if graph is not None]
        if not graphs or len(graphs) < len(parts):
            return None
        played = list(zip(parts, graphs, strict=True))
        for part, graph in reversed(played):  # decoding requests last: the support is theirs
            graph.token_ids[: part.num_tokens].copy_(step.token_ids[part.rows])
            graph.positions[: part.num_tokens].copy_(step.positions[part.rows])
            self._attention.fill(graph.fixed, part.spans)
        for _, graph in reversed(played):
            graph.replay()
        return torch.cat([graph.hidden[: part.num_tokens] for part, graph in played])

    def _parts(self, spans: list[Span]) -> list[_Part]:
        """The decoding requests that come first, and all others as prompts; nothing where that cannot be captured."""
        num_single = next((index for index, span in enumerate(spans) if span.num_queries > 1), len(spans))
        singles, prompts, parts = spans[:num_single], spans[num_single:], []
        if singles:
            num_rows = num_rows_of(num_single)
            parts.append(_Part(self._attention.graph_key(singles, num_rows), num_rows, singles))
        if prompts:
            found = num_prompt_rows_of(sum(span.num_queries for span in prompts))
            is_odd = len(prompts) > MAX_PROMPTS or any(span.selection is not None for span in prompts)
            if found is None or is_odd or self._prompt_pause.holds:
                return []
            parts.append(_Part(_Prompt(found), found, prompts))
        return parts

    def _graph(self, part: _Part) -> DecodeGraph | None:
        """Its graph, which is captured if it is time; else None."""
        graph = self._graphs.get(part.key)
        if graph is None:
            if self._is_held(part.key) or not self._is_due(part.key):
                return None
            with contextlib.suppress(torch.OutOfMemoryError):
                graph = self._add(part.key, part.num_rows)
            if graph is None:  # and not while the exception lives, which keeps the tensors of what failed
                self._give_up(part.key)
                return None
        self._graphs.move_to_end(part.key)
        return graph

    def _is_held(self, key: Hashable) -> bool:
        """Whether it is too early to capture it after what failed."""
        is_prompt = isinstance(key, _Prompt)
        return self._pause.holds_key(key) or (is_prompt and self._prompt_pause.holds_key(key))

    def _is_due(self, key: Hashable) -> bool:
        count = self._counts.pop(key, 0) + 1
        if count >= SEEN:
            return True
        self._counts[key] = count
        while len(self._counts) > MAX_KEYS:
            self._counts.popitem(last=False)
        return False

    def _give_up(self, key: Hashable) -> None:
        """Launch such steps layer by layer for a while: slower, and the memory is there for the requests."""
        if isinstance(key, _Prompt):
            pause, what = self._prompt_pause, "prompts"
            for old in [old for old in self._graphs if isinstance(old, _Prompt)]:
                del self._graphs[old]
        else:
            pause, what = self._pause, "decode steps"
            self._graphs.clear()
        pause_s = pause.begin(key)
        gc.collect()
        torch.cuda.empty_cache()
        sys.stderr.write(
            f"engine: no memory for CUDA graphs (time {pause.num_failures} for {what}): {what} are launched layer by "
            f"layer for {pause_s:.0f} s, which is slower, then captured again; lower kv_memory_fraction or "
            "kv_cache_bytes\n"
        )

    def _add(self, key: Hashable, num_rows: int) -> DecodeGraph:
        """Capture a step of padding."""
        if not self._graphs and self._pause.num_failures:
            self._max_bytes = self._room()
        graph = self._make(key, num_rows)
        if graph.num_bytes > self._max_bytes and self._pause.num_failures:
            raise torch.OutOfMemoryError("This graph alone takes more than all may, and graphs have failed before.")
        while self._graphs and not self._has_room(graph.num_bytes):
            self._graphs.popitem(last=False)

        def compute() -> None:
            self._attention.use(graph.fixed, *self._model.rotary(graph.positions))
            graph.hidden.copy_(self._model.through_layers(graph.token_ids, self._attention))

        graph.replay = self._capture(compute)
        self._graphs[key] = graph
        return graph

    def _make(self, key: Hashable, num_rows: int) -> DecodeGraph:
        """The tensors of a graph that is to be captured."""
        before, attention, embedding = self._capture.bytes_taken(), self._attention, self._model.embedding
        is_prompt = isinstance(key, _Prompt)
        fixed = attention.fix_prompts(num_rows, MAX_PROMPTS) if is_prompt else attention.fix(key, num_rows)
        token_ids = torch.zeros(num_rows, dtype=torch.int64, device=embedding.device)
        return DecodeGraph(
            replay=lambda: None,
            fixed=fixed,
            token_ids=token_ids,
            positions=torch.zeros_like(token_ids),
            hidden=torch.zeros(num_rows, embedding.shape[1], dtype=embedding.dtype, device=embedding.device),
            num_bytes=self._capture.bytes_taken() - before,
        )

    def _has_room(self, num_bytes: int) -> bool:
        """For one more graph with tensors of so many bytes."""
        taken = sum(graph.num_bytes for graph in self._graphs.values())
        return len(self._graphs) < MAX_GRAPHS and taken + num_bytes <= self._max_bytes
