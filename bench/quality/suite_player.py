"""Plays prompts through a model in this process: read densely, then one token at a time under a given attention.

`suite.py` makes one `SuitePlayer` for each attention module and batch. It drives the runner as the engine does, without
scheduler and sampling, so that one reading serves every mode: what follows the reading is written over by the next
mode. Sparse attention begins with the question, which is harder than serving, where a question is part of the prompt
and is read densely; or with the answer, as served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from player import load, request_of

from vashista.engine.attention.policy import RequestPolicy
from vashista.engine.attention.prompt_cpu import page_runs
from vashista.engine.attention.sparse_cpu import SparseCpuAttention
from vashista.engine.config import EngineConfig
from vashista.engine.messages import AttentionMode, SupportReport
from vashista.engine.request import Request
from vashista.engine.scheduler import Batch, BatchItem
from vashista.engine.step import Selection
from vashista.engine.support import SpanSupport, SupportTally

CHUNK_TOKENS = {"cpu": 512, "cuda": 16384}


@dataclass(frozen=True)
class Script:
    """One prompt to play."""

    token_ids: list[int]
    start: int
    """Tokens before this one are read densely, once."""
    sparse_start: int
    """Tokens from this one on attend as the mode says."""
    max_tokens: int = 0
    """Generated greedily behind the prompt."""
    num_scored: int = 0
    """Of the prompt's last tokens, judged by their log probability."""


@dataclass
class Performance:
    """What one script came to under one mode."""

    token_ids: list[int] = field(default_factory=list)
    """Generated."""
    logprobs: list[float] = field(default_factory=list)
    """Of the scored tokens, nats."""
    best: list[int] = field(default_factory=list)
    """The likeliest token after each step."""
    support: SupportReport | None = None
    steps: list[SpanSupport | None] = field(default_factory=list)
    """What each step left out; None for a dense one."""


class SuitePlayer:
    """A model with one attention module, and the scripts that it has read."""

    def __init__(self, config: EngineConfig, audit_rate: float) -> None:
        self.config = config
        self.runner, self._policy = load(config, audit_rate)
        self._scripts: list[Script] = []
        self._pages: list[list[int]] = []

    def read(self, scripts: Sequence[Script], on_tokens: Callable[[int], None]) -> None:
        """Compute what comes before each script's start; forgets all scripts read before."""
        self._scripts, self._pages = list(scripts), []
        used = 0
        for script in scripts:
            count = -(-(len(script.token_ids) + script.max_tokens) // self.config.page_size)
            self._pages.append(list(range(used, used + count)))
            used += count
        if used > self.runner.num_pages:
            raise SystemExit(f"{used} KV pages are needed; {self.runner.num_pages} fit: play fewer at a time (--batch)")
        chunk = CHUNK_TOKENS[self.runner.device.type]
        items: list[BatchItem] = []
        for index, script in enumerate(scripts):
            request = self._request(index)
            start = 0
            while start < script.start:
                size = min(chunk - sum(item.num_tokens for item in items), script.start - start)
                items.append(BatchItem(request, start, size))
                start += size
                if sum(item.num_tokens for item in items) == chunk:
                    self._read(items, on_tokens)
                    items = []
        if items:
            self._read(items, on_tokens)

    def read_as(self, other: SuitePlayer) -> None:
        """Take over what another module's player has read: keys and values are the same, summaries are made anew.

        For the CPU's sparse modules, whose store is one tensor a layer.
        """
        ours, theirs = self.runner.attention, other.runner.attention
        assert isinstance(ours, SparseCpuAttention)
        assert isinstance(theirs, SparseCpuAttention)
        self._scripts, self._pages = other._scripts, other._pages
        size = self.config.page_size
        runs = [page_runs(pages, s.start, size) for s, pages in zip(self._scripts, self._pages, strict=True)]
        ours.copy_cache(theirs, [run for each in runs for run in each])

    def _read(self, items: list[BatchItem], on_tokens: Callable[[int], None]) -> None:
        self.runner.execute(Batch(items), lambda item: False)
        on_tokens(sum(item.num_tokens for item in items))

    def play(
        self, mode: AttentionMode, selection: Selection | None = None, num_scripts: int | None = None
    ) -> list[Performance]:
        """Every script, or the first ones, from start to end. selection: of every step, in place of the mode's."""
        heads = self.runner.attention_shape.num_layers * self.runner.attention_shape.num_kv_heads
        playing = []
        for index, script in enumerate(self._scripts[:num_scripts]):
            policy = self._policy.start(mode, script.token_ids) if mode.is_sparse else None
            playing.append(_Playing(self._request(index), script, policy, SupportTally(heads), selection))
        active = [p for p in playing if not p.is_done]
        while active:
            self._step(active)
            active = [p for p in active if not p.is_done]
        for p in playing:
            if p.policy is not None:
                p.performance.support = p.tally.report()
        return [p.performance for p in playing]

    def _step(self, active: list[_Playing]) -> None:
        by_id = {p.request.id: p for p in active}
        items = [BatchItem(p.request, p.at, 1) for p in active]
        output = self.runner.execute(Batch(items), lambda item: True, lambda item: by_id[item.request.id].select(item))
        logits = self.runner.logits(output.hidden)
        best, supports = logits.argmax(-1).tolist(), output.take_support()
        scored = [(row, p) for row, p in enumerate(active) if p.is_scored]
        values = []
        if scored:
            rows = torch.tensor([row for row, _ in scored], device=logits.device)
            following = torch.tensor([p.request.token_ids[p.at + 1] for _, p in scored], device=logits.device)
            values = torch.log_softmax(logits[rows], -1).gather(1, following[:, None]).squeeze(1).tolist()
        for (_, p), value in zip(scored, values, strict=True):
            p.performance.logprobs.append(value)
        for p, token in zip(active, best, strict=True):
            support = supports.get(p.request.id)
            p.performance.best.append(token)
            p.performance.steps.append(support)
            if support is not None and p.policy is not None:
                p.tally.add(support)
                p.policy.learn(support)
            p.advance(token)

    def covering(self) -> Selection:
        """A selection that leaves nothing out, and yet goes through the sparse kernels."""
        shape = self.runner.attention_shape
        budgets = torch.full((shape.num_layers, shape.num_kv_heads), 2 * self.runner.max_context, dtype=torch.int32)
        return Selection(budgets, [])

    def _request(self, index: int) -> Request:
        """A new one: what an earlier mode generated is forgotten."""
        return request_of(list(self._scripts[index].token_ids), self._pages[index], str(index))


class _Playing:
    """A script in play."""

    def __init__(
        self,
        request: Request,
        script: Script,
        policy: RequestPolicy | None,
        tally: SupportTally,
        selection: Selection | None,
    ) -> None:
        self.request, self.script, self.policy, self.tally = request, script, policy, tally
        self.selection = selection
        self.at = script.start
        self.performance = Performance()

    @property
    def is_done(self) -> bool:
        """All that was to be generated is there, or all that is judged is judged."""
        if self.script.max_tokens:
            return len(self.performance.token_ids) == self.script.max_tokens
        return self.at >= len(self.script.token_ids) - 1

    @property
    def is_scored(self) -> bool:
        """Whether the token after this one is judged."""
        num_tokens = len(self.script.token_ids)
        return num_tokens - self.script.num_scored <= self.at + 1 < num_tokens

    def select(self, item: BatchItem) -> Selection | None:
        if item.start < self.script.sparse_start:
            return None
        return self.selection if self.policy is None else self.policy.select(item.end)

    def advance(self, token: int) -> None:
        if self.at == len(self.request.token_ids) - 1 and self.script.max_tokens:
            self.request.token_ids.append(token)
            self.performance.token_ids.append(token)
        self.at += 1
