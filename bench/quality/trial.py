"""Sparse attention in plain torch with any rule of `candidates.py`, inside the real model.

`TrialAttention` stands in a runner in place of its dense module, whose store it uses; every query of a span with a
selection keeps its own budget, so a forced text can be computed in one step: keys and values of its tokens follow from
the layer below, and a group that a query ranks is complete by then, since the newest tokens are always kept.
`play_at_once` does so; `Player.play` gives the same one token at a time. Models without sliding windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from candidates import GROUP_TOKENS, Candidate, exact, of_groups
from passages import Sequence
from player import Player, request_of

from vashista.engine.attention.capture import rotated
from vashista.engine.attention.interface import Attention, AttentionShape
from vashista.engine.attention.rules import NUM_RECENT, NUM_SINKS
from vashista.engine.scheduler import Batch, BatchItem
from vashista.engine.step import Selection, Span, StepInput
from vashista.engine.support import SpanSupport

MAX_SPANS = 16
"""Spans computed together; bounds memory (16 of 255 queries at 16k: 2 GB of logits)."""


@dataclass(slots=True)
class Dropped:
    """Sums of exact dropped masses over head-steps."""

    num: int = 0
    worst: float | torch.Tensor = 0.0
    """Of the worst head of each query group, as audits count it."""
    mean: float | torch.Tensor = 0.0
    """Of the mean of each query group."""

    def add(self, dropped: torch.Tensor) -> None:
        """dropped: [num_kv_heads, g, n]."""
        self.num += dropped.shape[0] * dropped.shape[2]
        self.worst = self.worst + dropped.amax(1).sum()
        self.mean = self.mean + dropped.mean(1).sum()


class TrialAttention:
    """See the module's text; satisfies `Attention`."""

    def __init__(self, inner: Attention, shape: AttentionShape) -> None:
        if any(window is not None for window in shape.layer_windows):
            raise SystemExit("this model has layers with a sliding window, which these rules are not written for")
        self.inner, self.shape, self.name = inner, shape, "trial"
        self.candidate: Candidate | None = None
        self.dropped = Dropped()
        self._spans: list[Span] = []
        self._cos = self._sin = torch.empty(0)

    def page_bytes(self) -> int:
        """Of the wrapped module."""
        return self.inner.page_bytes()

    def allocate(self, num_pages: int) -> None:
        """Of the wrapped module."""
        self.inner.allocate(num_pages)

    def begin(self, step: StepInput, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """See `Attention.begin`."""
        self.inner.begin(step, cos, sin)
        self._spans = [span for span in step.spans if span.selection is not None]
        self._cos, self._sin = cos, sin

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `Attention.forward`: the wrapped module writes the cache and serves spans without a selection."""
        if not self._spans:
            return self.inner.forward(layer, qkv)
        q = rotated(qkv[:, : self.shape.num_heads], self._cos, self._sin)
        out = self.inner.forward(layer, qkv)
        alike: dict[tuple[int, int], list[Span]] = {}
        for span in self._spans:
            alike.setdefault((span.num_queries, span.context_len), []).append(span)
        for spans in alike.values():
            for start in range(0, len(spans), MAX_SPANS):
                self._attend(layer, spans[start : start + MAX_SPANS], q, out)
        return out

    def take_support(self) -> list[SpanSupport]:
        """Masses are summed in `dropped`; here only counts."""
        s = self.shape
        nan = float("nan")
        return [SpanSupport(0, 0, s.num_visible(span.context_len), 1.0, nan, nan, []) for span in self._spans]

    def read_cache(self, layer: int, pages: list[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the wrapped module."""
        return self.inner.read_cache(layer, pages, num_tokens)

    def _attend(self, layer: int, spans: list[Span], q: torch.Tensor, out: torch.Tensor) -> None:
        """Spans of the same lengths and budget, as if they were more KV heads of one request.

        q: [num_tokens, num_heads, head_dim], rotated; out: [num_tokens, num_heads * head_dim], of which the spans'
        rows are written.
        """
        s, span = self.shape, spans[0]
        assert self.candidate is not None
        assert span.selection is not None
        both = [self.inner.read_cache(layer, each.pages, each.context_len) for each in spans]
        keys, values = (torch.cat(parts).float() for parts in zip(*both, strict=True))
        pad = -span.context_len % GROUP_TOKENS
        keys, values = (torch.cat([x, x[:, -1:].expand(-1, pad, -1)], 1) for x in (keys, values))
        keys = keys.unflatten(1, (-1, GROUP_TOKENS))
        rows = torch.cat([torch.arange(each.query_start, each.query_start + each.num_queries) for each in spans])
        rows = rows.to(q.device)
        q = q[rows].float().view(len(spans), span.num_queries, s.num_kv_heads, -1, s.head_dim)
        q = q.permute(0, 2, 3, 1, 4).flatten(0, 1) * s.scale
        positions = torch.arange(span.start, span.context_len, device=q.device)[:, None]
        logits = exact(q, keys)
        logits.masked_fill_(torch.arange(logits.shape[-1], device=q.device) > positions, -torch.inf)
        budget = int(span.selection.budgets[layer, 0])
        kept = keep(self.candidate, q, keys, logits, positions, budget)
        log_all = logits.logsumexp(-1)
        logits.masked_fill_(~kept.unsqueeze(1), -torch.inf)
        log_kept = logits.logsumexp(-1)
        self.dropped.add(1 - (log_kept - log_all).double().exp())
        result = torch.exp(logits.sub_(log_kept.unsqueeze(-1))) @ values.unsqueeze(1)
        result = result.unflatten(0, (len(spans), s.num_kv_heads)).permute(0, 3, 1, 2, 4)
        out[rows] = result.reshape(len(rows), -1).to(out.dtype)


def keep(
    rule: Candidate, q: torch.Tensor, keys: torch.Tensor, logits: torch.Tensor, positions: torch.Tensor, budget: int
) -> torch.Tensor:
    """[num_kv_heads, n, num_tokens] bool: what each query keeps.

    q, keys: as in `candidates`; logits: [num_kv_heads, g, n, num_tokens], -inf after the query; positions: [n, 1]; a
    budget, in tokens, of less than the context.
    """
    starts = torch.arange(keys.shape[1], device=q.device) * GROUP_TOKENS
    forced = (starts < NUM_SINKS) | (starts + GROUP_TOKENS > positions + 1 - NUM_RECENT)
    candidates = starts <= positions
    forced = forced & candidates
    forced_tokens = forced.repeat_interleave(GROUP_TOKENS, 1)
    log_forced = logits.masked_fill(~forced_tokens, -torch.inf).logsumexp(-1, keepdim=True)
    unit = 1 if rule.ranks_tokens else GROUP_TOKENS
    scores = rule.scores(q, keys)
    is_free = (candidates & ~forced).repeat_interleave(GROUP_TOKENS // unit, 1)
    ranking = agree(rule.agree, scores, is_free, log_forced, unit)
    pool = rule.pool or 1
    if rule.ranks_tokens:
        return take(ranking.masked_fill(forced_tokens, torch.inf), budget)
    count = pool * budget // GROUP_TOKENS
    num_second = int(count * rule.second_share)
    groups = take(ranking.masked_fill(forced, torch.inf), count - num_second)
    if rule.second is not None:
        second = agree(rule.agree, rule.second(q, keys), is_free, log_forced, unit)
        groups = take(second.masked_fill(groups, torch.inf), count)
    tokens = groups.repeat_interleave(GROUP_TOKENS, 2)
    return refine(rule, q, keys, logits, tokens, forced_tokens, budget) if rule.pool else tokens


def refine(
    rule: Candidate,
    q: torch.Tensor,
    keys: torch.Tensor,
    logits: torch.Tensor,
    allowed: torch.Tensor,
    forced: torch.Tensor,
    budget: int,
) -> torch.Tensor:
    """The best tokens, or groups, of the `allowed` ones, and the `forced`; [num_kv_heads, n, num_tokens] all three."""
    log_forced = logits.masked_fill(~forced, -torch.inf).logsumexp(-1, keepdim=True)
    scores = logits if rule.pool_scores is None else rule.pool_scores(q, keys)
    is_free = allowed & ~forced
    unit = rule.pool_unit
    if unit > 1:
        scores = of_groups(scores.unflatten(-1, (-1, unit)))
        is_free, forced = is_free[..., ::unit], forced[..., ::unit]
    best = agree(rule.agree, scores, is_free.unsqueeze(1), log_forced, unit)
    kept = take(best.masked_fill(forced, torch.inf), budget // unit)
    return kept.repeat_interleave(unit, -1)


def take(ranking: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` best of the last dimension, and all that are +inf; as bools."""
    best = ranking.topk(min(count, ranking.shape[-1]), dim=-1, sorted=False).indices
    return (ranking == torch.inf).scatter_(-1, best, True)


def agree(how: str, scores: torch.Tensor, is_free: torch.Tensor, log_forced: torch.Tensor, unit: int) -> torch.Tensor:
    """One ranking of a query group: [num_kv_heads, n, units]; -inf where not free.

    is_free: [n, units] or [num_kv_heads, 1, n, units]; log_forced: [num_kv_heads, g, n, 1], log of the mass of what is
    kept anyway; unit: tokens that a score is the mean of.
    """
    scores = scores.masked_fill(~is_free, -torch.inf)
    if how in ("share", "shares"):
        log_free = scores.logsumexp(-1, keepdim=True) + torch.log(torch.tensor(float(unit)))
        scores = scores - torch.logaddexp(log_free, log_forced)
    return scores.amax(1) if how in ("max", "share") else scores.logsumexp(1)


class TrialPlayer(Player):
    """A player whose sequences may be played in one step each."""

    def play_at_once(self, sequences: list[Sequence], budget: int | None) -> list[torch.Tensor]:
        """As `Player.play`, but without a report; None plays in full attention."""
        num_used = self._num_used
        shape = self.runner.attention_shape
        size = (shape.num_layers, shape.num_kv_heads)
        items = []
        for index, sequence in enumerate(sequences):
            pages = self._passages[sequence.passage] + self._take(len(sequence.token_ids) - sequence.start)
            request = request_of(sequence.token_ids, pages, str(index))
            items.append(BatchItem(request, sequence.start, len(sequence.token_ids) - sequence.start - 1))
        selection = None
        if budget is not None:
            selection = Selection(torch.full(size, budget, dtype=torch.int32), [])
        output = self.runner.execute(Batch(items), lambda item: True, lambda item: selection)
        self._num_used = num_used
        scores = []
        for item, sequence in zip(items, sequences, strict=True):
            rows = output.rows[item.request.id]
            num_scored = min(sequence.scored, len(rows))
            hidden = output.hidden[rows.stop - num_scored : rows.stop]
            logits = torch.log_softmax(self.runner.logits(hidden), dim=-1)
            following = torch.tensor(sequence.token_ids[-num_scored:], device=logits.device)
            value = logits.gather(1, following[:, None]).squeeze(1)
            scores.append(torch.stack([value, (value >= logits.amax(1)).float()], 1).cpu())
        return scores
