"""A tail estimate: what dropped groups would have added to a head's result, from one mean value of each group.

With S kept, exact, and D dropped, for one query head (nats; q times the scale):

    out = (Z_S o_S + f sum_D w_u v_u) / (Z_S + f sum_D w_u)

    w_u  estimated mass of a dropped unit: n exp(q.m + c/2 sum_d q_d^2 var_d); c = 1 is the score by which the product
         ranks, c = 0 never exceeds the true mass (Jensen)
    v_u  mean value of the unit's tokens
    f    a factor: 1; one of each head, or 0, measured on other text; or what the kept groups say, whose mass is known

What is kept does not change. `TAILS` are the variants that `tail.py` measures; shapes as in `tail_attention.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from candidates import grow
from tail_store import LayerStore, Planes

GROUP_TOKENS = 16


@dataclass(frozen=True)
class Tail:
    """One variant; without a `mass` it is the product's attention."""

    name: str
    mass: str = ""
    """"", "estimate", or "exact": the true mass of each dropped group, which only an oracle knows."""
    variance: float = 1.0
    """c above."""
    border: float = math.inf
    """The deviation from which half of the variance goes on as a straight line (`candidates.grow`)."""
    cap: float = math.inf
    """The most that the variance adds, nats."""
    factor: str = ""
    """f: "" for 1; "head" for one of each query head, measured on other text; "kept" for what the less good half of the
    kept groups says."""
    gain: float = 0.0
    """Only in those query heads whose result's error, on other text, it brings to this share of the plain one or less;
    0 for all."""
    trade: float = 1.0
    """KV heads all of whose query heads have the tail keep this share of the budget; the others get what they leave."""
    share: float = 1.0
    """f once more."""
    mass_unit: int = 16
    value_unit: int = 16
    """64: one mean value of 64 tokens, kept ones included. It cannot be less than mass_unit."""
    is_coded: bool = True
    """Mean values in 8 bits; else exact."""
    budget: int | None = None
    """Tokens kept; None: what is asked for."""
    is_dense: bool = False
    full: tuple[tuple[int, int], ...] = ()
    """(layer, KV head) that attend to everything: in which of them what is lost is lost."""
    pool: int = 1
    """So many times the budget's groups are candidates, of which the best tokens are kept, without a tail."""
    layers: tuple[float, ...] = ()
    """What each layer's heads keep, in budgets."""

    @property
    def is_measured(self) -> bool:
        """Whether it wants to know something of other text first."""
        return self.factor == "head" or self.gain > 0


PLAIN = Tail("vashista")
DENSE = Tail("dense", is_dense=True)
CUMULANT = Tail("tail", "estimate")
JENSEN = Tail("tail, means only", "estimate", variance=0.0)
HALF = Tail("tail, half of the variance", "estimate", variance=0.5)
CHOSEN = replace(HALF, name="chosen: half of the variance", gain=0.6)
MOVED = (0.5, 0.5, 0.5, 0.5, 1, 1, 2, 2)
MOVED_MORE = (0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 4, 1)
"""Budgets by layer that keep as many tokens in all, for a model of eight layers."""
TAILS = [
    CUMULANT,
    JENSEN,
    HALF,
    replace(CUMULANT, name="tail, variance up to 1", cap=1.0),
    replace(CUMULANT, name="tail, factor of the kept", factor="kept"),
    replace(CUMULANT, name="tail, factor by head", factor="head"),
    CHOSEN,
    replace(CUMULANT, name="chosen: all of the variance", gain=0.6),
    replace(JENSEN, name="chosen: means only", gain=0.6),
    replace(CHOSEN, name="chosen: at 0.4", gain=0.4),
    replace(CHOSEN, name="chosen: at 0.8", gain=0.8),
    replace(CHOSEN, name="chosen: values of 64", value_unit=64),
    replace(CHOSEN, name="chosen: masses and values of 64", value_unit=64, mass_unit=64),
    replace(CHOSEN, name="chosen: exact values", is_coded=False),
    replace(CHOSEN, name="chosen: trade 1/2", trade=0.5),
    replace(CHOSEN, name="chosen: trade 1/4", trade=0.25),
    replace(CUMULANT, name="chosen: true masses", mass="exact", is_coded=False, gain=0.6),
    replace(CUMULANT, name="oracle: true masses", mass="exact", is_coded=False),
    replace(PLAIN, name="vashista, twice the budget", budget=-1),
    replace(CHOSEN, name="chosen, twice the budget", budget=-1),
    replace(CHOSEN, name="chosen, half the budget", budget=-2),
    replace(PLAIN, name="vashista, half the budget", budget=-2),
    replace(PLAIN, name="full in layers 0 to 4", full=tuple((layer, head) for layer in range(5) for head in (0, 1))),
    replace(PLAIN, name="full in layer 6", full=((6, 0), (6, 1))),
    replace(PLAIN, name="full in layers 6 and 7", full=((6, 0), (6, 1), (7, 0), (7, 1))),
    replace(PLAIN, name="full in layer 6, head 0", full=((6, 0),)),
    replace(PLAIN, name="full in layer 6, head 1", full=((6, 1),)),
    replace(PLAIN, name="best tokens of 2x the groups", pool=2),
    replace(PLAIN, name="best tokens of 4x the groups", pool=4),
    replace(PLAIN, name="moved: 2x in layers 6 and 7", layers=MOVED),
    replace(PLAIN, name="moved: 4x in layer 6", layers=MOVED_MORE),
    replace(JENSEN, name="moved: 4x in 6, tail of means", layers=MOVED_MORE),
    replace(CHOSEN, name="moved: 4x in 6, chosen tail", layers=MOVED_MORE),
    replace(CHOSEN, name="chosen: at 0.4, 2x in 6 and 7", gain=0.4, layers=MOVED),
]
"""A budget of -2 is half of the one asked for, of -1 twice."""


def budget_of(tail: Tail, asked: int) -> int:
    return {None: asked, -2: asked // 2, -1: asked * 2}[tail.budget]


def log_masses(tail: Tail, q: torch.Tensor, planes: Planes, heads: slice) -> torch.Tensor:
    """[num_contexts, heads, g, num_units]: log of each unit's mass, estimated."""
    mean = q @ planes.mean[:, heads].transpose(2, 3)
    if tail.variance:
        variance = q.square() @ planes.variance[:, heads].transpose(2, 3)
        half = variance / 2 if tail.border == math.inf else grow(variance, tail.border)
        mean += (tail.variance * half).clamp(max=tail.cap)
    return mean + math.log(planes.size)


@dataclass(frozen=True)
class Kept:
    """The kept part of a step; leading dimensions [num_contexts, heads]."""

    groups: torch.Tensor
    """[..., count], int64: forced ones first, then by falling score."""
    is_kept: torch.Tensor
    """[1, heads, count], bool: heads with less than the largest budget keep the first of them."""
    is_free: torch.Tensor
    """[num_contexts, 1, num_groups], bool: neither forced nor after the newest token."""
    log_group: torch.Tensor
    """[..., g, count]: log of the exact mass of each kept group."""
    log_mass: torch.Tensor
    """[..., g, 1]"""
    result: torch.Tensor
    """[..., g, head_dim]"""
    exact: torch.Tensor | None = None
    """[..., g, num_groups]: log of the exact mass of every group, where an oracle was asked for it."""


def is_dropped(kept: Kept, num_groups: int) -> torch.Tensor:
    """[num_contexts, heads, num_groups], bool."""
    dropped = kept.is_free.expand(*kept.groups.shape[:2], num_groups).clone()
    return dropped.scatter_(2, kept.groups, dropped.gather(2, kept.groups) & ~kept.is_kept)


def add_tail(
    tail: Tail, q: torch.Tensor, store: LayerStore, heads: slice, kept: Kept, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """([..., g, head_dim] result with the tail, [..., g] log of the mass that the tail has in it).

    q: [num_contexts, heads, g, head_dim], float32, times the scale; factors: [heads, g], logs.
    """
    fine = store.planes[GROUP_TOKENS]
    dropped = is_dropped(kept, fine.mean.shape[2]).unsqueeze(2)
    log_w = kept.exact if tail.mass == "exact" else log_masses(tail, q, fine, heads)
    assert log_w is not None
    log_f = torch.full((1,), math.log(tail.share), device=q.device)
    if tail.is_measured:
        log_f = log_f + factors[None, :, :, None]
    if tail.factor == "kept":
        half = kept.groups.shape[2] // 2
        index = kept.groups[:, :, half:].unsqueeze(2).expand(-1, -1, q.shape[2], -1)
        told = log_w.gather(3, index).logsumexp(3, keepdim=True)
        log_f = log_f + kept.log_group[..., half:].logsumexp(3, keepdim=True) - told
    if tail.mass_unit == 64:
        coarse = log_masses(tail, q, store.planes[64], heads)
        part = dropped.float().unflatten(3, (-1, 4)).mean(4)
        log_w = coarse + part.log()
    else:
        log_w = log_w.masked_fill(~dropped, -torch.inf)
        if tail.value_unit == 64:
            log_w = log_w.unflatten(3, (-1, 4)).logsumexp(4)
    log_w = log_w + log_f
    log_tail = log_w.logsumexp(3, keepdim=True)
    planes = store.planes[tail.value_unit]
    values = (planes.value_coded if tail.is_coded else planes.value)[:, heads]
    log_all = torch.logaddexp(log_tail, kept.log_mass)
    result = (kept.log_mass - log_all).exp() * kept.result + (log_w - log_all).exp() @ values
    return result, log_tail.squeeze(3)
