"""Joins what the runs of one attention left: running softmaxes over parts of the keys.

Runs leave acc [num_runs, group, dim], peak and total [num_runs, group], float32, as `paged_tile` has them; called by
the merge kernel of `paged_decode` and by the last program of a pair in `sparse_attend`. Loads go past the first cache,
which other programs' writes do not reach.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from vashista.kernels.triton_guard import jit, round_to, tl


@jit()
def merge_head(
    out, lse, run_acc, run_peak, run_total, first, num_runs, head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, RUNS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Join the runs of one query head: sum 2^(peak_r - peak) acc_r over the same of total_r.

    out, lse: pointers to the head's own.
    """
    dim = tl.arange(0, DIM)
    acc = tl.zeros([DIM], dtype=tl.float32)
    peak = tl.full([], float("-inf"), dtype=tl.float32)
    total = tl.zeros([], dtype=tl.float32)
    for begin in range(0, num_runs, RUNS):
        run = begin + tl.arange(0, RUNS)
        is_there = run < num_runs
        slot = (first + run).to(tl.int64) * GROUP + head
        peaks = tl.load(run_peak + slot, mask=is_there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(run_total + slot, mask=is_there, other=0.0, cache_modifier=".cg")
        at = run_acc + slot[:, None] * DIM + dim[None, :]
        accs = tl.load(at, mask=is_there[:, None], other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        fade = tl.exp2(peak - new_peak)
        weight = tl.exp2(peaks - new_peak)
        acc = acc * fade + tl.sum(accs * weight[:, None], 0)
        total = total * fade + tl.sum(totals * weight, 0)
        peak = new_peak
    is_empty = num_runs == 0
    result = acc / tl.where(is_empty, 1.0, total)
    tl.store(out + dim, round_to(result, out.dtype.element_ty), mask=dim < HEAD_DIM)
    if HAS_LSE:
        tl.store(lse, peak * 0.6931471805599453 + tl.log(tl.where(is_empty, 1.0, total)))


@jit()
def merge_group(
    out, lse, out_stride_head, run_acc, run_peak, run_total, first, num_runs,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, RUNS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Join the runs of all heads of a sparse pair at once: many loads in flight; `merge_head` waits for each."""
    member = tl.arange(0, MEMBERS)
    is_member = member < GROUP
    dim = tl.arange(0, DIM)
    acc = tl.zeros([MEMBERS, DIM], dtype=tl.float32)
    peak = tl.full([MEMBERS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([MEMBERS], dtype=tl.float32)
    for begin in range(0, num_runs, RUNS):
        run = begin + tl.arange(0, RUNS)
        slot = (first + run).to(tl.int64)[:, None] * GROUP + member[None, :]
        is_there = (run < num_runs)[:, None] & is_member[None, :]
        # in this order: the compiler waits for what is loaded first before it loads the rest
        at = run_acc + slot[:, :, None] * DIM + dim[None, None, :]
        accs = tl.load(at, mask=is_there[:, :, None], other=0.0, cache_modifier=".cg")
        totals = tl.load(run_total + slot, mask=is_there, other=0.0, cache_modifier=".cg")
        peaks = tl.load(run_peak + slot, mask=is_there, other=float("-inf"), cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        shift = tl.where(is_member, new_peak, 0.0)
        fade = tl.exp2(peak - shift)
        weight = tl.exp2(peaks - shift[None, :])
        acc = acc * fade[:, None] + tl.sum(accs * weight[:, :, None], 0)
        total = total * fade + tl.sum(totals * weight, 0)
        peak = new_peak
    result = acc / tl.where(is_member, total, 1.0)[:, None]
    to = out + member.to(tl.int64)[:, None] * out_stride_head + dim[None, :]
    tl.store(to, round_to(result, out.dtype.element_ty), mask=is_member[:, None] & (dim < HEAD_DIM)[None, :])
    if HAS_LSE:
        log_total = peak * 0.6931471805599453 + tl.log(tl.where(is_member, total, 1.0))
        tl.store(lse + member, log_total, mask=is_member)
