"""Correctness of every timed case, on the device and at its own size, against float64; called by `run.py`.

Four statements, each of a whole request: the stored summaries are those of the keys, to their rounding; the scores are
those of the stored summaries; the kept set is the one that sorting the kernel's own scores gives; the output is exact
attention over the kept set.
"""

from __future__ import annotations

import math

import torch
from pool import Layer, Pool


class WrongResultError(Exception):
    """A result is not what the reference says."""


def expect(is_right: bool, what: str) -> None:
    if not is_right:
        raise WrongResultError(what)


def judge_summaries(pool: Pool, pages: int = 200) -> None:
    """Codes of some pages against the exact planes: at most half a step off, in units of the step."""
    from vashista.kernels.key_summary import Rule, decode_summaries

    row = torch.randint(0, pool.keys.shape[0], (pages,), device="cuda", dtype=torch.int32)
    for level in pool.levels:
        keys = pool.keys[row.long(), 0].double().reshape(-1, level.unit_tokens, pool.shape.head_dim)
        first, second = decode_summaries(level, row, 0, len(keys))
        step = level.steps[row.long(), 0].flatten(0, 1).double()
        if level.rule == Rule.BOX:
            expect(bool((first >= keys.amax(1) - 1e-6).all()), "a box's upper edge is below a key")
            expect(bool((second <= keys.amin(1) + 1e-6).all()), "a box's lower edge is above a key")
            continue
        expect(
            bool(((first - keys.mean(1)).abs() <= 0.501 * step[:, :1]).all()), "a mean is off by more than half a step"
        )
        if level.rule == Rule.MEAN_VARIANCE:
            deviation, exact = second.sqrt(), keys.var(1, correction=0).sqrt()
            expect(bool(((deviation - exact).abs() <= 0.083 * (127 * step[:, 1:2]).sqrt()).all()), "a variance is off")


def judge_layer(pool: Pool, layer: Layer, plan, levels, budgets: torch.Tensor) -> float:
    """Relative error of the output of a call that was just made; raises for anything else that is off.

    Over the judged pairs together: to round one head's 128 numbers to bfloat16 is 1.66e-3 on average and 2.2e-3 in one
    of 20,000, and a pair may be one head.
    """
    from vashista.kernels.paged_reference import gather_tokens
    from vashista.kernels.sparse_attend import attend_reference
    from vashista.kernels.sparse_decode import keep_reference
    from vashista.kernels.unit_score import score_reference
    from vashista.kernels.unit_select import select_reference

    shape, options = pool.shape, plan.options
    group = shape.num_heads // shape.num_kv_heads
    error, norm = 0.0, 0.0
    for request in {0, len(layer.lens) - 1}:
        length = int(layer.lens[request])
        keys, values = (gather_tokens(cache, layer.table[request], length) for cache in (pool.keys, pool.values))
        for head in {0, shape.num_kv_heads - 1}:
            pair, heads = request * shape.num_kv_heads + head, slice(head * group, (head + 1) * group)
            query = layer.q[request, heads]
            candidates: torch.Tensor | None = None
            if not levels:
                candidates = plan.fine.units[pair, : int(plan.fine.num_kept[pair])].long()
                budget = int(budgets[request, head])
                expected = keep_reference(query, (), layer.table[request], head, length, budget, plan)
                expect(torch.equal(candidates, expected), "the kept set is not that of sinks and the newest groups")
            for level, result in zip(reversed(levels), (plan.coarse, plan.fine)[2 - len(levels) :], strict=True):
                exact = score_reference(query, level, layer.table[request], head, length, options)
                unit = torch.arange(len(exact), device="cuda")
                if candidates is not None:
                    ratio = levels[1].unit_tokens // level.unit_tokens
                    unit = (candidates[:, None] * ratio + torch.arange(ratio, device="cuda")).flatten()
                scores = result.scores[pair, : len(unit)]
                off = (scores.double() - exact[unit]).abs().max().item()
                expect(off < 0.02, f"a score is off by {off:.3f} nats")
                is_forced = (unit * level.unit_tokens < options.num_sinks) | (
                    (unit + 1) * level.unit_tokens > length - options.num_recent
                )
                wanted = plan.num_candidates if level.unit_tokens > 16 else int(budgets[request, head]) // 16
                expected = unit[select_reference(scores, is_forced, wanted)]
                candidates = result.units[pair, : int(result.num_kept[pair])].long()
                expect(torch.equal(candidates, expected), "the kept set is not that of a sort of the scores")
            assert candidates is not None
            kept = (candidates[:, None] * 16 + torch.arange(16, device="cuda")).flatten()
            out, lse = attend_reference(query, keys[head], values[head], kept[kept < length], options)
            off, size = (layer.out[request, heads].double() - out).norm().item(), out.norm().item()
            expect(off < 3e-3 * size, f"the output of a pair is off by {off / size:.1e}")
            error, norm = math.hypot(error, off), math.hypot(norm, size)
            expect(bool((layer.lse[request, heads].double() - lse).abs().max() < 1e-4), "an lse is off")
    expect(bool(torch.isfinite(layer.out).all()), "the output holds NaN or infinity")
    expect(error < 2e-3 * norm, f"the output is off by {error / norm:.1e}")
    return error / norm
