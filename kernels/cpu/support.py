"""What a step of sparse attention left out, summed over layers and KV heads: the door of support.h.

Called once a step by the engine's sparse CPU module, after all layers have run. One call of some microseconds, where
sums in numpy take 200: between two runs of the kernels, which sweep the caches, every call from Python is slow.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vashista.kernels.cpu.library import Library
from vashista.kernels.cpu.sparse import Rule, SparsePlan


@dataclass(frozen=True, slots=True)
class SupportSums:
    """Of one request, over the head-steps (a layer and KV head each) of its step; a query group counts with its worst.

    The last three are over the head-steps that dropped something.
    """

    num_dense: int
    """Head-steps that attended to all they could see."""
    num_kept: int
    """Tokens."""
    num_visible: int
    """Tokens."""
    bound: float
    """Of the share of the mass that was dropped, each at most 1."""
    estimate: float
    """Of the same; NaN where the rule's scores are bounds or there are none."""
    gap: float
    """Log of the kept mass less the largest logit estimated among dropped tokens, nats; NaN likewise."""
    estimates: torch.Tensor
    """[num_layers, num_kv_heads], float64: of each head-step what `estimate` sums up, 0 where nothing was dropped."""


def sum_support(
    library: Library, plan: SparsePlan, windows: Sequence[int | None], requests: list[int]
) -> list[SupportSums]:
    """The sums of some of a plan's requests, by their indices in it; windows: of each layer, as `decode` got them.

    Raises ValueError for requests or layers that the plan does not have.
    """
    num_layers, num_requests = plan.diagnostics.shape[:2]
    estimates = torch.empty(len(requests), num_layers, plan.shape.num_kv_heads, dtype=torch.float64)
    if len(windows) != num_layers or not all(0 <= index < num_requests for index in requests):
        raise ValueError(
            f"{len(windows)} layers, requests {requests}: the plan has {num_layers} layers, {num_requests} requests."
        )
    numbers, memory = (ctypes.c_double * (6 * len(requests)))(), plan.record.memory
    library.sum_support(
        ctypes.addressof(plan.record), memory.table("windows", [window or 0 for window in windows]), num_layers,
        memory.table("wanted", requests), len(requests), plan.shape.rule is not Rule.BOX, numbers,
        estimates.data_ptr(),
    )  # fmt: skip
    rows = [numbers[start : start + 6] for start in range(0, len(numbers), 6)]
    return [
        SupportSums(int(row[0]), int(row[1]), int(row[2]), row[3], row[4], row[5], found)
        for row, found in zip(rows, estimates, strict=True)
    ]
