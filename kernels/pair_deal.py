"""How work over (request, KV head) pairs is dealt out to programs, from lengths on the device.

A pair is request * num_kv_heads + KV head. Each pair's tiles are cut into runs, one program each, so that one CUDA
graph serves any lengths and a long request among short ones is spread over the device. `deal_pairs` is `deal_runs` of
`paged_decode` for tiles that differ between KV heads; where they do not, it cuts the same runs. Called by
`sparse_attend`, and `has_pdl` by `unit_score` and `key_summary` too.

A pair without tiles still gets one run, so that somebody writes its outputs.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch

from vashista.kernels.triton_guard import INTERPRETED, jit, tl

USE_PDL = True
"""Programmatic dependent launch where the device has it (9.0): a kernel's start overlaps the end of the one before."""


def has_pdl(device: torch.device) -> bool:
    """True where kernels are launched with programmatic dependence."""
    return USE_PDL and not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@jit()
def load_pairs(
    context_lens, budgets, num_requests, num_kv_heads, window, HAS_WINDOW: tl.constexpr, PAIRS: tl.constexpr
):
    """(low, high, is_sparse) of all pairs, [PAIRS]: the visible positions, and whether the budget leaves some out."""
    pair = tl.arange(0, PAIRS)
    is_pair = pair < num_requests * num_kv_heads
    high = tl.load(context_lens + pair // num_kv_heads, mask=is_pair, other=0)
    budget = tl.load(budgets + pair, mask=is_pair, other=0)
    low = tl.maximum(high - window, 0) if HAS_WINDOW else high * 0
    return low, high, budget < high - low


@jit()
def deal_pairs(
    tiles, is_short, num_pairs, num_programs, one_wave,
    MIN: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr, SHORT_LONG: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Runs of each pair [PAIRS], int32. Runs have MIN to LONG tiles, or SHORT to SHORT_LONG where `is_short`, while
    they can.

    All pairs together need at most `num_programs` runs: sum max(ceil(t_i / most), 1) <= sum t_i / most + pairs, and
    `most` is at least sum t_i / (num_programs - num_pairs).
    """
    all_tiles = tl.sum(tiles, 0)
    fair = tl.cdiv(all_tiles, num_programs - num_pairs)
    usual = tl.cdiv(all_tiles, one_wave)
    short = tl.maximum(tl.maximum(fair, tl.minimum(usual, SHORT_LONG)), SHORT)
    most = tl.where(is_short, short, tl.maximum(tl.maximum(fair, tl.minimum(usual, LONG)), MIN))
    runs = tl.maximum(tl.cdiv(tiles, most), 1)
    return tl.where(tl.arange(0, PAIRS) < num_pairs, runs, 0)


@jit()
def add_least_most(count, most, least, other_count, other_most, other_least):
    """Combines (sum, maximum, minimum): three reductions for the time of one."""
    return count + other_count, tl.maximum(most, other_most), tl.minimum(least, other_least)


@jit()
def find_run(runs, program, PAIRS: tl.constexpr):
    """(pair, run, runs of that pair) of a program; the pair is PAIRS where the program has no work."""
    through = tl.cumsum(runs, 0)
    is_before = through <= program
    pair, before, after = tl.reduce(
        (is_before.to(tl.int32), tl.where(is_before, through, 0), tl.where(is_before, 0x7FFFFFFF, through)),
        0,
        add_least_most,
    )
    return pair, program - before, after - before
