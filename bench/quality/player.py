"""Plays forced tokens through a model: passages as prompts, what follows one token at a time under a given attention.

It drives the runner as the engine does, without scheduler and sampling. Sequences of one passage share its pages, as
requests of one prompt do; everything played is computed sparsely, questions too, which is harder than serving, where
a question is part of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch
from passages import Sequence

from vashista.engine.attention.policy import AttentionPolicy, RequestPolicy, load_profile, make_policy
from vashista.engine.config import EngineConfig
from vashista.engine.messages import AttentionMode, SamplingParams, Submit, SupportReport
from vashista.engine.model_config import load_model_config
from vashista.engine.pages import root_hash
from vashista.engine.request import Request
from vashista.engine.runner import Runner
from vashista.engine.scheduler import Batch, BatchItem
from vashista.engine.support import SupportTally, merge_reports

CHUNK_TOKENS = {"cpu": 512, "cuda": 8192}


def load(config: EngineConfig, audit_rate: float) -> tuple[Runner, AttentionPolicy]:
    """A model, and the engine's policy for it, sparse in contexts of any length."""
    config = msgspec.structs.replace(config, audit_rate=audit_rate, dense_below=0)
    runner = Runner(config, load_model_config(config.model_dir))
    return runner, make_policy(config, runner.attention_shape, load_profile(config))


def request_of(token_ids: list[int], pages: list[int], name: str) -> Request:
    """A request that has its pages."""
    sampling = SamplingParams(seed=0, max_tokens=1)
    request = Request(Submit(name, token_ids, sampling, arrival_s=0.0), root_hash("quality"))
    request.pages = pages
    return request


class Player:
    """A model with one attention module, and the passages whose pages it holds."""

    def __init__(self, config: EngineConfig, audit_rate: float) -> None:
        self.runner, self._policy = load(config, audit_rate)
        self._page_size = config.page_size
        self._passages: dict[int, list[int]] = {}
        self._num_used = 0

    def read(self, sequences: list[Sequence], on_tokens: Callable[[int], None]) -> None:
        """Compute the passage of each sequence, in full attention; forgets all passages read before."""
        self._passages, self._num_used = {}, 0
        for sequence in sequences:
            if sequence.passage in self._passages:
                continue
            assert sequence.start % self._page_size == 0
            pages = self._take(sequence.start)
            request = request_of(sequence.token_ids[: sequence.start], pages, "passage")
            chunk = CHUNK_TOKENS[self.runner.device.type]
            for start in range(0, sequence.start, chunk):
                size = min(chunk, sequence.start - start)
                self.runner.execute(Batch([BatchItem(request, start, size)]), lambda item: False)
                on_tokens(size)
            self._passages[sequence.passage] = pages

    def play(self, sequences: list[Sequence], mode: AttentionMode) -> tuple[list[torch.Tensor], SupportReport | None]:
        """Log probabilities of each sequence's scored tokens, whether each was the likeliest, and what was left out.

        Returns [scored, 2] a sequence: log probability in nats, and 1 where no token was likelier.
        """
        num_used = self._num_used
        heads = self.runner.attention_shape.num_layers * self.runner.attention_shape.num_kv_heads
        players = []
        for index, sequence in enumerate(sequences):
            pages = self._passages[sequence.passage] + self._take(len(sequence.token_ids) - sequence.start)
            policy = self._policy.start(mode, sequence.token_ids) if mode.is_sparse else None
            players.append(
                _Playing(request_of(sequence.token_ids, pages, str(index)), sequence, policy, SupportTally(heads))
            )
        steps = max(len(sequence.token_ids) - sequence.start for sequence in sequences) - 1
        for step in range(steps):
            self._step([p for p in players if p.at(step) < len(p.sequence.token_ids) - 1], step)
        self._num_used = num_used
        reports = [report for p in players if p.policy is not None and (report := p.tally.report())]
        return [torch.stack(p.scores) for p in players], merge_reports(reports)

    def _step(self, players: list[_Playing], step: int) -> None:
        items = [BatchItem(p.request, p.at(step), 1) for p in players]
        policies = {p.request.id: p.policy for p in players}

        def select(item: BatchItem):  # type: ignore[no-untyped-def]
            policy = policies[item.request.id]
            return policy.select(item.end) if policy is not None else None

        output = self.runner.execute(Batch(items), lambda item: True, select)
        logits = torch.log_softmax(self.runner.logits(output.hidden), dim=-1)
        supports = output.take_support()
        for row, p in enumerate(players):
            support = supports.get(p.request.id)
            if support is not None and p.policy is not None:
                p.tally.add(support)
                p.policy.learn(support)
            following = p.at(step) + 1
            if following >= len(p.sequence.token_ids) - p.sequence.scored:
                value = logits[row, p.sequence.token_ids[following]]
                p.scores.append(torch.stack([value, (value >= logits[row].max()).float()]).cpu())

    def _take(self, num_tokens: int) -> list[int]:
        first, self._num_used = self._num_used, self._num_used - (-num_tokens // self._page_size)
        if self._num_used > self.runner.num_pages:
            raise SystemExit(f"{self._num_used} KV pages are needed; {self.runner.num_pages} fit: play fewer passages")
        return list(range(first, self._num_used))


class _Playing:
    """A sequence in play."""

    def __init__(self, request: Request, sequence: Sequence, policy: RequestPolicy | None, tally: SupportTally) -> None:
        self.request, self.sequence, self.policy, self.tally = request, sequence, policy, tally
        self.scores: list[torch.Tensor] = []

    def at(self, step: int) -> int:
        return self.sequence.start + step
