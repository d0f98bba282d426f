"""What shapes a GPU's sparse step: its plan lives for all steps of one key, and so does the graph of a captured one.

Called by `sparse_triton` for every step, on the CPU: nothing here may look at all pages or wait for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vashista.engine.attention import coarse
from vashista.engine.step import Span
from vashista.kernels.cuda.cluster import find_blocks
from vashista.kernels.key_summary import GROUP_TOKENS


class PlanKey(NamedTuple):
    """Numbers in powers of two; steps in which all are dense have num_rows alone."""

    num_rows: int
    max_context: int
    """Tokens, rounded up."""
    max_budget: int
    """Tokens that a head keeps without keeping all, to a power of two."""
    is_mixed: bool
    """Whether of the sparse requests some are ranked in one level and some in two."""
    has_dense: bool
    """Whether a head may attend to the whole context. True also where the kernels gain nothing by knowing that none
    does (`skips_dense`), so that such steps share plans and graphs."""


def most_kept(spans: list[Span]) -> tuple[int, bool]:
    """Tokens that a head keeps at most where it does not keep all, to a power of two; whether any head keeps all.

    A head keeps all where its budget covers the context or is too large to be ranked, and without a selection.
    """
    most, has_dense = GROUP_TOKENS, False
    for span in spans:
        if span.selection is None:
            has_dense = True
            continue
        budgets = span.selection.budgets.numpy()  # a few numbers each: numpy takes a fifth of torch's time
        limited = budgets[budgets <= min(span.context_len - 1, coarse.MAX_CANDIDATES)]
        most = max(most, int(limited.max(initial=0)))
        has_dense = has_dense or limited.size < budgets.size
    return 1 << (most - 1).bit_length(), has_dense


def skips_dense(num_pairs: int, device: torch.device) -> bool:
    """Whether a step of so many pairs of row and KV head saves a launch where no head keeps all: if clusters attend."""
    return find_blocks(num_pairs, device) > 0
