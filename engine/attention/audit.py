"""The exact attention of one query group beside what was kept of it: what an audit measures.

Called by the sparse attention modules for the head-steps that the policy picks (`engine/attention/policy.py`); the
results travel in `SpanSupport`. Costs about as much as dense scores of that head.
"""

from __future__ import annotations

import torch

from vashista.engine.support import Audit


def audit_head(
    layer: int, kv_head: int, logits: torch.Tensor, first: int, kept_groups: torch.Tensor, group_tokens: int
) -> Audit:
    """Measure one query group.

    logits: [group, num_tokens], float32, of the visible tokens from position `first` on; kept_groups: int64, numbers of
    the kept groups of `group_tokens` positions.
    """
    num_tokens = logits.shape[1]
    kept = torch.zeros((first + num_tokens) // group_tokens + 1, dtype=torch.bool, device=logits.device)
    kept[kept_groups] = True
    groups = torch.arange(first, first + num_tokens, device=logits.device) // group_tokens
    p = torch.softmax(logits, dim=1)
    dropped = torch.where(kept[groups], 0.0, p).sum(1, dtype=torch.float64)
    effective = torch.special.entr(p).sum(1, dtype=torch.float64).exp()
    counts = torch.tensor([count_support(row, (0.9, 0.99)) for row in p], dtype=torch.float64)
    return Audit(
        layer=layer,
        kv_head=kv_head,
        dropped_mass=min(1.0, float(dropped.max())),
        effective_support=float(effective.mean()),
        support_90=float(counts[:, 0].mean()),
        support_99=float(counts[:, 1].mean()),
    )


def count_support(p: torch.Tensor, shares: tuple[float, ...]) -> list[int]:
    """The fewest tokens that hold each share of the mass; p: [num_tokens], float32, a distribution.

    Tokens below (1 - share) / num_tokens hold less than 1 - share together, so only the others are sorted.
    """
    large = p[p >= (1 - max(shares)) / p.shape[0]]
    covered = large.sort(descending=True).values.cumsum(0, dtype=torch.float64)
    wanted = torch.tensor(shares, dtype=torch.float64, device=p.device)
    found = torch.searchsorted(covered, wanted - 1e-6)
    return [min(count + 1, p.shape[0]) for count in found.tolist()]
