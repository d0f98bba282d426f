"""Decode attention of the product in plain torch, with a tail or without, for many contexts at once.

`TailAttention` is given to the model's layers in place of an attention module. It writes the step's keys and values to
its own store (`tail_store.py`) and lets every context attend as a `Tail` says; retrieval heads attend to everything, as
the product's policy has it. With an `Audit` it attends in full and, with the very same queries, measures what every
tail would have given.

Shapes: g query heads a KV head; q [num_contexts, num_kv_heads, g, head_dim], float32, times the scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tail_rules import GROUP_TOKENS, PLAIN, Kept, Tail, add_tail, budget_of, is_dropped, log_masses
from tail_store import CHUNK_BYTES, LayerStore

from vashista.engine.attention.capture import rotated
from vashista.engine.attention.interface import AttentionShape
from vashista.engine.attention.rules import NUM_RECENT, NUM_SINKS

LEAST_BUDGET = NUM_SINKS + NUM_RECENT + GROUP_TOKENS
"""What is always kept, at most."""


class Audit:
    """Sums over steps of what the tails give; [num_tails, num_layers, num_heads] float64 where nothing else is said."""

    def __init__(self, tails: Sequence[Tail], shape: AttentionShape) -> None:
        self.tails, self._num_kv_heads = list(tails), shape.num_kv_heads
        size = (len(self.tails), shape.num_layers, shape.num_heads)
        self.error, self.told = (torch.zeros(size, dtype=torch.float64, device=shape.device) for _ in range(2))
        """Relative errors of the head's result; tail's mass as a share of all true mass."""
        self.true = torch.zeros(size[1:], dtype=torch.float64, device=shape.device)
        """Share of all mass that is dropped."""
        self.num = 0

    def factors(self, index: int) -> torch.Tensor:
        """[num_layers, num_kv_heads, g]: logs of what a tail wants of other text; the first tail has to be plain.

        The factor that makes its mass true on the mean, if it wants one; -inf where it does not gain enough.
        """
        tail, told = self.tails[index], self.told[index]
        log_f = torch.where((told > 0) & (self.true > 0), self.true / told, 1.0).log()
        if tail.factor != "head":
            log_f = torch.zeros_like(log_f)
        if tail.gain:
            log_f = log_f.masked_fill(self.error[index] > tail.gain * self.error[0], -torch.inf)
        return log_f.float().unflatten(1, (self._num_kv_heads, -1))


class TailAttention:
    """See the module's text."""

    def __init__(self, shape: AttentionShape, layers: Sequence[LayerStore], whole: torch.Tensor, budget: int) -> None:
        """whole: [num_layers, num_kv_heads], bool: heads that attend to everything; budget: tokens of the others."""
        self.shape, self.layers, self.budget = shape, layers, budget
        self.whole = whole
        self._runs: dict[tuple[str, int], list[tuple[slice, bool]]] = {}
        self.tail = PLAIN
        self.audit: Audit | None = None
        self.factors: dict[str, torch.Tensor] = {}
        """Of each tail's name: [num_layers, num_kv_heads, g], logs."""
        self._traded: dict[str, list[list[int]]] = {}
        self._positions = self._cos = self._sin = torch.empty(0)

    def begin(self, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """positions: [num_contexts], int64: of the step's one token of each context."""
        self._positions, self._cos, self._sin = positions, cos, sin

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `Attention.forward`; one row a context."""
        s, store = self.shape, self.layers[layer]
        q, k, v = qkv.split((s.num_heads, s.num_kv_heads, s.num_kv_heads), dim=1)
        q, k = (rotated(x, self._cos, self._sin) for x in (q, k))
        store.write(self._positions, k, v)
        q = q.float().unflatten(1, (s.num_kv_heads, -1)) * s.scale
        out = torch.empty_like(q)
        at = self.tail.name, layer
        if at not in self._runs:
            row = self.whole[layer].tolist()
            self._runs[at] = runs_of([is_whole or (layer, h) in self.tail.full for h, is_whole in enumerate(row)])
        for heads, is_whole in self._runs[at]:
            part = q[:, heads]
            if is_whole or self.tail.is_dense:
                out[:, heads], log_all = dense(part, store, heads, self._positions)
                if self.audit is not None and not is_whole:
                    self._measure(layer, heads, part, out[:, heads], log_all)
            else:
                out[:, heads] = self._attend(layer, heads, part)
        return out.flatten(1).to(qkv.dtype)

    def _attend(self, layer: int, heads: slice, q: torch.Tensor) -> torch.Tensor:
        """[num_contexts, heads, g, head_dim]: by the tail."""
        store, tail = self.layers[layer], self.tail
        kept = keep(
            q, store, heads, self._positions, self._budgets(tail, layer, heads), tail.mass == "exact", tail.pool
        )
        return add_tail(tail, q, store, heads, kept, self._factors(tail, layer, heads))[0] if tail.mass else kept.result

    def _budgets(self, tail: Tail, layer: int, heads: slice) -> list[int]:
        """Tokens of each of the heads."""
        budget = budget_of(tail, self.budget)
        if tail.layers:
            return [int(tail.layers[layer] * budget)] * (heads.stop - heads.start)
        if tail.trade == 1 or tail.name not in self.factors:
            return [budget] * (heads.stop - heads.start)
        if tail.name not in self._traded:
            has_tail = torch.isfinite(self.factors[tail.name]).all(2).cpu() & ~self.whole
            num_with, num_without = int(has_tail.sum()), int((~has_tail & ~self.whole).sum())
            less = max(int(tail.trade * budget) // GROUP_TOKENS * GROUP_TOKENS, LEAST_BUDGET)
            more = budget + (budget - less) * num_with // max(num_without, 1) // GROUP_TOKENS * GROUP_TOKENS
            self._traded[tail.name] = torch.where(has_tail, less, more).tolist()
        return self._traded[tail.name][layer][heads]

    def _factors(self, tail: Tail, layer: int, heads: slice) -> torch.Tensor:
        """[heads, g], logs; zero where they are being measured."""
        if not tail.is_measured:
            return torch.empty(0)
        s = self.shape
        none = torch.zeros(s.num_layers, s.num_kv_heads, s.num_heads // s.num_kv_heads, device=s.device)
        return self.factors.get(tail.name, none)[layer, heads]

    def _measure(self, layer: int, heads: slice, q: torch.Tensor, out: torch.Tensor, log_all: torch.Tensor) -> None:
        """What every tail would have given; out, log_all: [num_contexts, heads, g, ...], exact."""
        audit, store, g = self.audit, self.layers[layer], q.shape[2]
        assert audit is not None
        kept: dict[tuple[int, ...], Kept] = {}
        at = slice(heads.start * g, heads.stop * g)
        norm = out.norm(dim=3)
        for index, tail in enumerate(audit.tails):
            budgets = self._budgets(tail, layer, heads)
            setting = (*budgets, tail.pool)
            if setting not in kept:
                kept[setting] = keep(q, store, heads, self._positions, budgets, True, tail.pool)
            own, log_tail = kept[setting].result, None
            if tail.mass:
                own, log_tail = add_tail(tail, q, store, heads, kept[setting], self._factors(tail, layer, heads))
            audit.error[index, layer, at] += ((own - out).norm(dim=3) / norm).double().sum(0).flatten()
            if log_tail is not None:
                audit.told[index, layer, at] += (log_tail - log_all).double().exp().sum(0).flatten()
        first = kept[(*[self.budget] * q.shape[1], 1)]
        assert first.exact is not None
        dropped = first.exact.masked_fill(~is_dropped(first, first.exact.shape[3]).unsqueeze(2), -torch.inf)
        audit.true[layer, at] += (dropped.logsumexp(3) - log_all).double().exp().sum(0).flatten()
        if layer == 0 and heads.start == 0:
            audit.num += q.shape[0]


def runs_of(whole: Sequence[bool]) -> list[tuple[slice, bool]]:
    """Neighbouring KV heads that are alike."""
    runs: list[tuple[slice, bool]] = []
    for head, is_whole in enumerate(whole):
        if runs and runs[-1][1] == is_whole:
            runs[-1] = (slice(runs[-1][0].start, head + 1), is_whole)
        else:
            runs.append((slice(head, head + 1), is_whole))
    return runs


def dense(
    q: torch.Tensor, store: LayerStore, heads: slice, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to everything up to each position: ([num_contexts, heads, g, head_dim], [..., g] log of the mass)."""
    results, masses = [], []
    chunk = max(1, CHUNK_BYTES // (4 * store.keys[0, heads].numel()))
    places = torch.arange(store.keys.shape[2], device=q.device)
    for first in range(0, q.shape[0], chunk):
        part = slice(first, first + chunk)
        logits = q[part] @ store.keys[part, heads].float().transpose(2, 3)
        logits.masked_fill_((places > positions[part, None])[:, None, None], -torch.inf)
        masses.append(logits.logsumexp(3))
        results.append(torch.exp(logits - masses[-1].unsqueeze(3)) @ store.values[part, heads].float())
    return torch.cat(results), torch.cat(masses)


def keep(
    q: torch.Tensor,
    store: LayerStore,
    heads: slice,
    positions: torch.Tensor,
    budgets: Sequence[int],
    with_exact: bool,
    pool: int = 1,
) -> Kept:
    """The product's selection by its coded summaries, and exact attention to it.

    budgets: tokens of each head, the same for all where a pool of more groups has its best tokens kept.
    """
    fine = store.planes[GROUP_TOKENS]
    num_groups = fine.mean.shape[2]
    starts = torch.arange(num_groups, device=q.device) * GROUP_TOKENS
    is_there = starts <= positions[:, None]
    forced = (starts < NUM_SINKS) | (starts + GROUP_TOKENS > positions[:, None] + 1 - NUM_RECENT)
    is_free = (is_there & ~forced).unsqueeze(1)
    ranking = log_masses(PLAIN, q, fine, heads).amax(2)
    ranking = ranking.masked_fill(forced.unsqueeze(1), torch.inf).masked_fill(~is_there.unsqueeze(1), -torch.inf)
    assert min(budgets) >= LEAST_BUDGET, f"a budget of {min(budgets)} does not hold what is always kept"
    counts = torch.tensor([pool * budget // GROUP_TOKENS for budget in budgets], device=q.device)
    most = min(pool * max(budgets) // GROUP_TOKENS, num_groups)
    best, groups = ranking.topk(most, dim=2)
    is_kept = (torch.arange(most, device=q.device) < counts[:, None])[None]
    row = store.rows[:, None, None]
    head = torch.arange(heads.start, heads.stop, device=q.device)[None, :, None]
    keys, values = (x.unflatten(2, (-1, GROUP_TOKENS))[row, head, groups].float() for x in (store.keys, store.values))
    logits = q @ keys.flatten(2, 3).transpose(2, 3)
    places = (groups.unsqueeze(3) * GROUP_TOKENS + torch.arange(GROUP_TOKENS, device=q.device)).flatten(2)
    is_seen = (places <= positions[:, None, None]) & is_kept.repeat_interleave(GROUP_TOKENS, 2)
    logits = logits.masked_fill(~is_seen.unsqueeze(2), -torch.inf)
    if pool > 1:
        likely = logits.amax(2).masked_fill((best == torch.inf).repeat_interleave(GROUP_TOKENS, 2), torch.inf)
        chosen = torch.zeros_like(likely, dtype=torch.bool)
        chosen.scatter_(2, likely.topk(min(budgets[0], likely.shape[2]), dim=2).indices, True)
        logits = logits.masked_fill(~chosen.unsqueeze(2), -torch.inf)
    log_mass = logits.logsumexp(3, keepdim=True)
    result = torch.exp(logits - log_mass) @ values.flatten(2, 3)
    log_group = logits.unflatten(3, (-1, GROUP_TOKENS)).logsumexp(4)
    exact = exact_masses(q, store, heads, positions) if with_exact else None
    return Kept(groups, is_kept, is_free, log_group, log_mass, result, exact)


def exact_masses(q: torch.Tensor, store: LayerStore, heads: slice, positions: torch.Tensor) -> torch.Tensor:
    """[num_contexts, heads, g, num_groups]: log of each group's mass."""
    masses = []
    chunk = max(1, CHUNK_BYTES // (4 * store.keys[0, heads].numel()))
    places = torch.arange(store.keys.shape[2], device=q.device)
    for first in range(0, q.shape[0], chunk):
        part = slice(first, first + chunk)
        logits = q[part] @ store.keys[part, heads].float().transpose(2, 3)
        logits.masked_fill_((places > positions[part, None])[:, None, None], -torch.inf)
        masses.append(logits.unflatten(3, (-1, GROUP_TOKENS)).logsumexp(4))
    return torch.cat(masses)
