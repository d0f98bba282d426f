"""Keys and queries for `bound_check.py`: ordinary ones, and families made to bring a bound down to the truth.

A draw is one layer's requests with one new token each, all of one context length. A family spoils it in place: first
its keys, before they are written to the store, then, for each draw of queries, the queries and the new keys;
`spoil_queries` is shown the summaries that the kernel made of the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vashista.kernels.cpu import sparse as kernel

UNIT = kernel.UNIT_TOKENS
NUM_KV_HEADS = 4
MAX_REQUESTS = 32
MAX_TOKENS = 8192
"""Of all requests of a draw, where it has more than one."""
DIMS = (64, 64, 64, 80, 96, 128, 256)
GROUPS = (1, 2, 4, 4, 8)
PAGES = (16, 64)


class Draw:
    """Keys for the store, and the next tokens' queries and keys."""

    def __init__(self, dice: torch.Generator, rule: kernel.Rule) -> None:
        self.dice = dice
        self.rule = rule
        self.dim = DIMS[self.below(len(DIMS))]
        self.group = GROUPS[self.below(len(GROUPS))]
        self.page = PAGES[self.below(len(PAGES))]
        self.dtype = (torch.float32, torch.bfloat16)[self.below(2)]
        self.context = self._draw_context()
        self.num_requests = max(1, min(MAX_REQUESTS, MAX_TOKENS // self.context))
        num_pages = -(-self.context // self.page)
        self.pages = torch.randperm(self.num_requests * num_pages, generator=dice).view(self.num_requests, num_pages)
        self.slots = (self.pages.unsqueeze(-1) * self.page + torch.arange(self.page)).flatten(1)[:, : self.context]
        self.keys = self.normal(NUM_KV_HEADS, self.pages.numel() * self.page, self.dim)
        self.angles = self.normal(self.num_requests, self.dim // 2)
        self.draw_queries()

    def _draw_context(self) -> int:
        """Four of five draws are short; 3 of 20 have up to 4,096 tokens, 1 of 20 up to 16,384."""
        kind = self.below(20)
        if kind < 16:
            return 65 + self.below(192)
        return 257 + self.below(3840) if kind < 19 else 4097 + self.below(12_288)

    def below(self, limit: int) -> int:
        """A whole number from 0 to limit - 1."""
        return int(torch.randint(limit, (), generator=self.dice))

    def normal(self, *size: int) -> torch.Tensor:
        """Normally distributed numbers."""
        return torch.randn(*size, generator=self.dice)

    def draw_queries(self) -> None:
        """Queries and new keys as most families leave them."""
        self.queries = self.normal(self.num_requests, NUM_KV_HEADS * self.group, self.dim)
        self.queries *= (1.0, 1.0, 8.0)[self.below(3)]
        self.new_keys = self.normal(self.num_requests, NUM_KV_HEADS, self.dim)
        self.num_sinks, self.num_recent = self.below(20), 1 + self.below(40)
        self.most_kept = 200 if self.below(2) else max(2, self.context)
        """Budgets are drawn up to it, tokens."""

    def per_query_head(self, x: torch.Tensor) -> torch.Tensor:
        """[num_requests, KV heads, dim] -> [num_requests, query heads, dim]"""
        return x.repeat_interleave(self.group, 1)


def keep(draw: Draw) -> None:
    """Leaves the keys normal."""


def keep_queries(draw: Draw, summaries: kernel.Summaries) -> None:
    """Leaves the queries normal."""


def scale_keys(factor: float) -> Callable[[Draw], None]:
    """Makes the keys larger or smaller."""

    def spoil(draw: Draw) -> None:
        draw.keys *= factor

    return spoil


def scale_queries(factor: float) -> Callable[[Draw, kernel.Summaries], None]:
    """Makes the queries larger or smaller."""

    def spoil(draw: Draw, summaries: kernel.Summaries) -> None:
        draw.queries *= factor

    return spoil


def enlarge_keys(draw: Draw) -> None:
    """Makes the keys 10^3 to 10^16 times larger, beyond which squares leave float32."""
    draw.keys *= 10.0 ** (3 + draw.below(14))


def equal_keys(draw: Draw) -> None:
    """All keys of a head are equal, new ones aside."""
    draw.angles.zero_()
    draw.keys[:] = draw.keys[:, :1].clone()


def dominant_keys(draw: Draw) -> None:
    """Every 17th key is 100 times larger."""
    draw.keys[:, ::17] *= 100


def outlier_dimension(draw: Draw) -> None:
    """One dimension is far larger than the others, as in real models."""
    draw.keys[..., 3] += 1000


def keys_on_a_line(draw: Draw) -> None:
    """The keys of a head differ by a factor alone."""
    draw.keys[:] = 3 * draw.normal(NUM_KV_HEADS, draw.keys.shape[1], 1) * draw.normal(1, 1, draw.dim)


def narrow_keys(draw: Draw) -> None:
    """The keys of a head point the same way."""
    draw.angles.zero_()
    draw.keys *= 0.05
    draw.keys += draw.normal(NUM_KV_HEADS, 1, draw.dim)


def aligned_queries(draw: Draw, summaries: kernel.Summaries) -> None:
    """The queries point where the keys do."""
    middle = draw.keys.mean(1).repeat_interleave(draw.group, 0)
    draw.queries = 3 * middle + 0.01 * draw.normal(*draw.queries.shape)


def opposite_halves(draw: Draw) -> None:
    """Each unit is half v and half -v: its mean says nothing, its variance all."""
    draw.angles.zero_()
    signs = torch.tensor([1.0, -1.0]).repeat(draw.keys.shape[1] // 2)
    draw.keys[:] = draw.keys[:, :1].clone() * signs[None, :, None]


def at_a_key(draw: Draw, summaries: kernel.Summaries) -> None:
    """The queries point at one key of the store each, 1 to 16 times as long."""
    which = torch.randint(draw.context - 1, (draw.num_requests,), generator=draw.dice)
    keys = draw.keys[:, draw.slots[torch.arange(draw.num_requests), which]].transpose(0, 1)
    draw.queries = draw.per_query_head(keys).clone() * 2.0 ** draw.below(5)


def lone_keys(draw: Draw) -> None:
    """In each unit fifteen keys are equal and one is apart."""
    draw.angles.zero_()
    units = draw.keys.view(NUM_KV_HEADS, -1, UNIT, draw.dim)
    units[:, :, 1:] = units[:, :, 1:2].clone()


def at_a_residual(draw: Draw, summaries: kernel.Summaries) -> None:
    """The queries point from the decoded mean of a unit to one of its keys: there x + |q| radius is reached."""
    units = torch.randint(max(1, (draw.context - 1) // UNIT), (draw.num_requests,), generator=draw.dice)
    slots = draw.slots[torch.arange(draw.num_requests), units * UNIT + draw.below(UNIT)]
    rows = slots // UNIT
    codes = summaries.codes[:, rows, : draw.dim].float() * summaries.steps[:, rows, :1]
    residual = (draw.keys[:, slots].to(draw.dtype).float() - codes).transpose(0, 1)
    size = residual.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    draw.queries = draw.per_query_head(residual / size) * 2.0 ** draw.below(12)


def exact_keys(draw: Draw) -> None:
    """Equal keys that the codes hold without loss: the radius is 0, and rounding alone parts bound and truth."""
    draw.angles.zero_()
    key = torch.randint(-127, 128, (NUM_KV_HEADS, 1, draw.dim), generator=draw.dice).float()
    key[..., 0] = 127
    draw.keys[:] = key * 2.0 ** (draw.below(16) - 12)


def halfway_keys(draw: Draw) -> None:
    """Equal keys as far from what the codes can hold as keys may be: each dimension halfway between two codes."""
    exact_keys(draw)
    step = draw.keys[:, :1, :1] / 127
    draw.keys[..., 1:] += step * 0.4999


def small_newest(draw: Draw) -> None:
    """Makes the keys of each request's last unit tiny, so that rounding of the kept mass hides no other."""
    for slots in draw.slots:
        draw.keys[:, slots[(draw.context - 1) // UNIT * UNIT :]] *= 1e-6


def exact_but_small_newest(draw: Draw) -> None:
    """Equal keys that the codes hold without loss, but for the last unit."""
    exact_keys(draw)
    small_newest(draw)


def lost_keys(draw: Draw) -> None:
    """Equal keys of which the codes hold one dimension and nothing of the others."""
    draw.angles.zero_()
    key = (0.4999 * draw.normal(NUM_KV_HEADS, 1, draw.dim).sign()) * 2.0 ** (draw.below(8) - 7)
    key[..., 0] = key[..., 1].abs() * 127 / 0.4999
    draw.keys[:] = key
    small_newest(draw)


def newest_kept(spoil: Callable[[Draw, kernel.Summaries], None]) -> Callable[[Draw, kernel.Summaries], None]:
    """Keeps the newest unit alone."""

    def spoil_more(draw: Draw, summaries: kernel.Summaries) -> None:
        spoil(draw, summaries)
        draw.new_keys = draw.new_keys * 1e-6
        draw.num_sinks, draw.num_recent, draw.most_kept = 0, 1, 16

    return spoil_more


def exact_new_keys(draw: Draw, summaries: kernel.Summaries) -> None:
    """The new key equals the others."""
    draw.new_keys = draw.keys[:, draw.slots[0, :1]].transpose(0, 1).expand(draw.num_requests, -1, -1).clone()


def cancelling_queries(draw: Draw, summaries: kernel.Summaries) -> None:
    """Equal keys, at right angles to large queries but for rounding: each logit is what the sum's order makes of it."""
    exact_new_keys(draw, summaries)
    k = draw.per_query_head(draw.new_keys).to(draw.dtype).double()
    q = draw.queries.double() * 2.0 ** draw.below(14)
    q -= k * (q * k).sum(-1, keepdim=True) / (k * k).sum(-1, keepdim=True).clamp_min(1e-300)
    draw.queries = q.float()


def huge_new_keys(draw: Draw, summaries: kernel.Summaries) -> None:
    """The new key, which is always kept, is huge and at right angles to every query: its logit is all rounding."""
    draw.angles.zero_()
    order = torch.randperm(draw.dim, generator=draw.dice)
    signs = torch.tensor([1.0, -1.0]).repeat(draw.dim // 2)
    draw.queries[..., order] = draw.queries[..., ::2].repeat_interleave(2, -1)
    draw.new_keys[..., order] = draw.new_keys[..., ::2].repeat_interleave(2, -1) * signs * 10.0 ** (3 + draw.below(5))


@dataclass(frozen=True, slots=True)
class Family:
    """How draws are spoiled."""

    spoil_keys: Callable[[Draw], None] = keep
    spoil_queries: Callable[[Draw, kernel.Summaries], None] = keep_queries


FAMILIES = {
    "normal": Family(),
    "tiny keys": Family(scale_keys(1e-3)),
    "large keys": Family(scale_keys(30.0)),
    "huge keys": Family(enlarge_keys),
    "denormal keys": Family(scale_keys(1e-39)),
    "small keys, large queries": Family(scale_keys(1e-24), scale_queries(1e24)),
    "equal keys": Family(equal_keys),
    "equal keys, the new one too": Family(equal_keys, exact_new_keys),
    "dominant keys": Family(dominant_keys),
    "outlier dimension": Family(outlier_dimension),
    "keys on a line": Family(keys_on_a_line),
    "aligned queries": Family(narrow_keys, aligned_queries),
    "opposite halves": Family(opposite_halves, at_a_key),
    "one key apart": Family(lone_keys, at_a_residual),
    "towards a key": Family(narrow_keys, at_a_residual),
    "towards the residual": Family(equal_keys, at_a_residual),
    "halfway codes": Family(halfway_keys, at_a_residual),
    "exact codes": Family(exact_keys, exact_new_keys),
    "exact codes, cancelling": Family(exact_keys, cancelling_queries),
    "exact codes, small ones kept": Family(exact_but_small_newest, newest_kept(cancelling_queries)),
    "lost in codes, small ones kept": Family(lost_keys, newest_kept(at_a_residual)),
    "right angles": Family(scale_keys(1e-3), huge_new_keys),
}
