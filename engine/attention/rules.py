"""Which groups of tokens a query would keep, and what it loses: the selection rules as plain torch, for measuring.

`engine/calibrate.py`, `engine/diagnose.py`, tests and the quality benchmark call this with captured queries and keys
(`engine/attention/capture.py`); the kernels compute the same from 8-bit summaries. A group is `group_tokens` tokens
that are neighbours by position. For a query head q and the n keys k of a group, with logits s = scale * q.k:

    mean           log n + scale * q.m                                  m = mean of k; the paper's, arXiv 2602.13804
    mean_variance  log n + scale * q.m + scale^2 / 2 * sum_d q_d^2 v_d  v_d = variance of k_d; the second cumulant
    box            log n + scale * sum_d max(q_d h_d, q_d l_d)          h, l = max, min of k; Quest, arXiv 2406.10774
    window         the group's position: the newest are kept

The score of a KV head is the largest over the heads of its query group. The groups of the first `num_sinks` and of the
last `num_recent` tokens are always kept, the others by falling score, ties by position, until the budget is used.

Shapes: q [num_heads, head_dim], keys [num_kv_heads, num_tokens, head_dim], logits [num_heads, num_tokens]; float32 or
float64, any device; query head h belongs to KV head h // (num_heads / num_kv_heads). `first` is the position of the
first key, for layers with a sliding window. With d the keys dropped and S those kept:

    dropped mass  tau = Z_D / (Z_S + Z_D)         Z_X = sum over X of exp(s)
    support gap   Delta = log Z_S - max over D of s
    bound         tau <= |D| e^-Delta / (1 + |D| e^-Delta)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vashista.engine.support_profile import Rule

GROUP_TOKENS = 16
NUM_SINKS = 16
NUM_RECENT = 64


@dataclass(frozen=True)
class Groups:
    """How positions `first` to `first + num_tokens - 1` fall into groups that start at multiples of `group_tokens`."""

    num_tokens: int
    first: int = 0
    group_tokens: int = GROUP_TOKENS

    @property
    def num_groups(self) -> int:
        """Groups that hold at least one of the tokens."""
        return (self.first + self.num_tokens - 1) // self.group_tokens - self.first // self.group_tokens + 1

    @property
    def skipped(self) -> int:
        """Places of the first group before the first token."""
        return self.first % self.group_tokens

    def of_tokens(self, device: torch.device | None = None) -> torch.Tensor:
        """[num_tokens] int64: each token's group, counted from the first one."""
        return (torch.arange(self.num_tokens, device=device) + self.skipped) // self.group_tokens

    def sizes(self, device: torch.device | None = None) -> torch.Tensor:
        """[num_groups] int64: tokens of each group."""
        return torch.bincount(self.of_tokens(device), minlength=self.num_groups)

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """Sums over each group's tokens: [..., num_tokens] -> [..., num_groups]."""
        out = x.new_zeros(*x.shape[:-1], self.num_groups)
        return out.index_add_(-1, self.of_tokens(x.device), x)

    def forced(self, num_sinks: int, num_recent: int, device: torch.device | None = None) -> torch.Tensor:
        """[num_groups] bool: the groups of the first `num_sinks` positions of the request and of the last tokens."""
        groups = torch.arange(self.num_groups, device=device)
        starts = groups * self.group_tokens + self.first - self.skipped
        return (starts < num_sinks) | (starts + self.group_tokens > self.first + self.num_tokens - num_recent)


def logits_of(q: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """[num_heads, num_tokens]"""
    num_kv_heads, num_tokens, head_dim = keys.shape
    grouped = q.view(num_kv_heads, -1, head_dim)
    return (grouped @ keys.transpose(1, 2)).view(-1, num_tokens) * scale


def group_scores(rule: Rule, q: torch.Tensor, keys: torch.Tensor, scale: float, groups: Groups) -> torch.Tensor:
    """[num_kv_heads, num_groups]: what the rule ranks groups by."""
    num_kv_heads, _, head_dim = keys.shape
    if rule is Rule.WINDOW:
        return torch.arange(groups.num_groups, dtype=q.dtype, device=q.device).expand(num_kv_heads, -1)
    grouped = q.view(num_kv_heads, -1, head_dim)
    sizes = groups.sizes(keys.device)
    logs = sizes.to(q.dtype).log()
    if rule is Rule.BOX:
        high, low = (_extreme(keys, groups, kind) for kind in ("amax", "amin"))
        # max(q h, q l) is q h for positive q and q l for negative q.
        scores = grouped.clamp(min=0) @ high.transpose(1, 2) + grouped.clamp(max=0) @ low.transpose(1, 2)
        return (scale * scores + logs).amax(1)
    mean = groups.sums(keys.transpose(1, 2)) / sizes
    scores = scale * (grouped @ mean)
    if rule is Rule.MEAN_VARIANCE:
        centred = keys.transpose(1, 2) - mean[..., groups.of_tokens(keys.device)]
        variance = groups.sums(centred.square()) / sizes
        scores = scores + scale**2 / 2 * (grouped.square() @ variance)
    return (scores + logs).amax(1)


def _extreme(keys: torch.Tensor, groups: Groups, kind: str) -> torch.Tensor:
    """[num_kv_heads, num_groups, head_dim]: largest or smallest value of each dimension."""
    index = groups.of_tokens(keys.device)[None, :, None].expand_as(keys)
    out = keys.new_empty(keys.shape[0], groups.num_groups, keys.shape[2])
    return out.scatter_reduce_(1, index, keys, kind, include_self=False)


def keep_order(scores: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """[num_kv_heads, num_groups] int64: groups in the order in which a growing budget takes them.

    scores: [num_kv_heads, num_groups]; forced: [num_groups] bool. Forced groups come first, then falling scores; ties
    by position.
    """
    return scores.masked_fill(forced, torch.inf).argsort(dim=1, descending=True, stable=True)


def keep(
    scores: torch.Tensor,
    budget: int | Sequence[int],
    groups: Groups,
    num_sinks: int = NUM_SINKS,
    num_recent: int = NUM_RECENT,
) -> torch.Tensor:
    """[num_kv_heads, num_groups] bool: the groups kept with this budget, in tokens, of all or of each KV head.

    A budget buys budget // group_tokens groups, at least the forced ones; one that covers all tokens keeps all.
    """
    forced = groups.forced(num_sinks, num_recent, scores.device)
    budgets = torch.as_tensor(budget, device=scores.device).expand(scores.shape[0])
    counts = (budgets // groups.group_tokens).clamp(min=int(forced.sum()))
    counts = torch.where(budgets >= groups.num_tokens, groups.num_groups, counts)
    rank = torch.empty_like(scores, dtype=torch.int64)
    places = torch.arange(groups.num_groups, device=scores.device).expand_as(rank)
    rank.scatter_(1, keep_order(scores, forced), places)
    return rank < counts[:, None]


def dropped_mass(logits: torch.Tensor, kept: torch.Tensor, groups: Groups) -> torch.Tensor:
    """[num_heads]: exact share of the softmax outside of the kept groups. kept: [num_kv_heads, num_groups] bool."""
    dropped = ~_tokens_of_heads(kept, groups, logits.shape[0])
    return torch.softmax(logits.double(), dim=1).mul(dropped).sum(1)


def dropped_mass_curve(logits: torch.Tensor, order: torch.Tensor, groups: Groups) -> torch.Tensor:
    """[num_heads, num_groups + 1] float64: the dropped mass of each head when its KV head keeps 0, 1, ... groups.

    order: [num_kv_heads, num_groups], of `keep_order`.
    """
    mass = groups.sums(torch.softmax(logits.double(), dim=1))
    group_size = logits.shape[0] // order.shape[0]
    ordered = mass.gather(1, order.repeat_interleave(group_size, 0))
    # Summed from the small end: a dropped mass of 1e-12 is not 1 less a sum of rounding errors.
    left = ordered.flip(1).cumsum(1).flip(1)
    return torch.cat([left, left.new_zeros(left.shape[0], 1)], dim=1)


def support_gap(logits: torch.Tensor, kept: torch.Tensor, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """([num_heads] support gap in nats, +inf where nothing is dropped; [num_heads] bound of the dropped mass)."""
    tokens = _tokens_of_heads(kept, groups, logits.shape[0])
    logits = logits.double()
    log_kept = logits.masked_fill(~tokens, -torch.inf).logsumexp(1)
    gap = log_kept - logits.masked_fill(tokens, -torch.inf).amax(1)
    bound = torch.sigmoid((~tokens).sum(1).double().log() - gap)
    return gap, bound


@dataclass(frozen=True)
class Support:
    """How few tokens hold the mass of each query head; [num_heads] float64 each."""

    effective: torch.Tensor
    """exp(H(p)), tokens."""
    tokens_90: torch.Tensor
    """Fewest tokens with 90 % of the mass."""
    tokens_99: torch.Tensor


def support_of(logits: torch.Tensor) -> Support:
    """Exact support of dense attention."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    p = log_p.exp()
    # 0 * -inf is 0 here: a key of no mass adds no entropy.
    effective = torch.special.entr(p).sum(1).exp()
    covered = p.sort(dim=1, descending=True).values.cumsum(1)
    # A sum that is the share but for rounding has reached it.
    counts = [
        (covered < share * (1 - 1e-12)).sum(1).add(1).clamp(max=logits.shape[1]).double() for share in (0.9, 0.99)
    ]
    return Support(effective, *counts)


def _tokens_of_heads(kept: torch.Tensor, groups: Groups, num_heads: int) -> torch.Tensor:
    """[num_heads, num_tokens] bool."""
    return kept[:, groups.of_tokens(kept.device)].repeat_interleave(num_heads // kept.shape[0], 0)
