"""When a GPU's sparse attention ranks in two levels: larger units first, and groups of 16 tokens inside the best ones.

The summaries of all groups of a long context take long to read. So past COARSE_CONTEXT units of 64 tokens are ranked
first, and of the groups only those inside the best units, four times as many as are kept. Both levels lie in the KV
store and are kept up to date by every step, whether it ranks by them or not; a page holds whole units of both, so they
are shared, reused and dropped with it. How a request is ranked follows from its own context and each head's own budget,
never from the requests beside it: in a step that holds shorter contexts beside longer ones, all groups of the shorter
are candidates. Called by `sparse_triton`, whose plans the answers shape: they follow from the greatest context and
budget of a step, rounded up, so that a CUDA graph serves all steps of its key. COARSE_CONTEXT is a power of two, so
that captured steps, which round to those, and others are ranked alike.

Where two levels pay, microseconds a layer with one and with two, H100 (docs/sparse-attention.md, "Speed"): 1 x 32k
17.1 and 21.6, 32 x 32k 154.0 and 140.8, 1 x 128k 23.6 and 23.4, 8 x 128k 94.4 and 67.1, 1 x 512k 61.5 and 33.8. The
number of requests is left out of it: one is to keep the same groups alone and beside others.
"""

from __future__ import annotations

from vashista.kernels.key_summary import GROUP_TOKENS
from vashista.kernels.unit_select import MAX_UNITS, ONE_STEP_UNITS

COARSE_TOKENS = 64
COARSE_CONTEXT = 65536
"""The longest context, tokens, that one level ranks where two are possible."""
CANDIDATES_PER_KEPT = 4
MAX_CANDIDATES = ONE_STEP_UNITS * GROUP_TOKENS
"""Tokens: so many groups a program selects from at once. A head that keeps more attends to everything."""


def coarse_tokens(page_size: int) -> int | None:
    """Tokens of a unit of the coarse level; None where a page holds no units larger than a group."""
    for unit in (COARSE_TOKENS, COARSE_TOKENS // 2):
        if page_size % unit == 0:
            return unit
    return None


def longest_context(page_size: int) -> int:
    """Tokens of the longest context that can be ranked."""
    return MAX_UNITS * (coarse_tokens(page_size) or GROUP_TOKENS)


def candidate_tokens(page_size: int, max_context: int, max_budget: int) -> int | None:
    """Tokens whose groups are ranked in a second level, at least `max_budget`; None where one level ranks all.

    max_budget: at most MAX_CANDIDATES.
    """
    if coarse_tokens(page_size) is None or max_context <= COARSE_CONTEXT:
        return None
    return min(CANDIDATES_PER_KEPT * max_budget, MAX_CANDIDATES)
