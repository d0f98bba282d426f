"""What a step of sparse attention left out, summed over layers and KV heads for each request, in one launch.

Called by the engine's sparse GPU module behind the last layer, on what `sparse_decode` left of all layers. A host that
summed up itself took 0.95 ms for 32 requests of 8 layers with 8 KV heads, in a step of 5.3 (H100).

A head-step is a layer and KV head. A query group counts with its worst head: with K the log of the mass that a head
kept, M the largest and m the least K of the group, E the log of the mass estimated in dropped units for the group's
best head, T the largest score dropped and B the bound (`unit_mass`), in nats,
    estimate = 1 / (1 + exp(M - E))       bound = 1 / (1 + exp(m - B))       gap = m - T + log 16
and all three are 0 where the head-step attended to all that it could see, each also where its E, B or T is -inf, the
log of nothing. A K that is no number comes first: estimate and gap are NaN then, and a bound that is NaN is 1.

Layout: lse [num_layers, num_requests, num_heads] float32; mass [num_layers, num_requests * num_kv_heads, 4] float32 and
num_kept [num_layers, num_requests * num_kv_heads] int32, as `Selection` has them; context_lens [num_requests] int32;
windows [num_layers] int32, 0 for none; report [num_requests, NUM_SUMS + num_layers * num_kv_heads] float64: head-steps
that attended to everything, tokens attended to and visible, and the sums of bound, estimate and gap; then each
head-step's estimate. All contiguous. A request of no tokens has head-steps that attended to everything, of nothing.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import math

import torch

from vashista.kernels.key_summary import GROUP_TOKENS
from vashista.kernels.requirements import check_tensor, check_whole, require
from vashista.kernels.triton_guard import jit, next_power_of_two, require_triton, tl

NUM_SUMS = 6
"""Numbers in front of the estimates."""
HEAD_STEPS = 512
"""Head-steps that a program looks at in one go."""


def sum_support_reference(
    lse: torch.Tensor,
    mass: torch.Tensor,
    num_kept: torch.Tensor,
    context_lens: torch.Tensor,
    windows: torch.Tensor,
    *,
    has_estimate: bool = True,
) -> torch.Tensor:
    """The report, in float64."""
    num_layers, num_requests, num_heads = lse.shape
    num_kv_heads = num_kept.shape[1] // num_requests
    size = (num_layers, num_requests, num_kv_heads)
    kept, (_, dropped, top, bound) = num_kept.view(size), mass.double().view(*size, 4).unbind(-1)
    logs = lse.double().view(*size, num_heads // num_kv_heads)
    visible = torch.where(windows[:, None] > 0, torch.minimum(windows[:, None], context_lens), context_lens)[..., None]
    # the newest group, which is always kept, may be partly filled; the oldest in a window's reach counts whole
    tokens = torch.where(kept == 0, visible, kept * GROUP_TOKENS - (-context_lens % GROUP_TOKENS)[:, None])
    tokens = torch.minimum(tokens, visible)
    is_dense = tokens >= visible
    is_known = ~logs.isnan().any(-1)

    def unless_nothing(values: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
        return values.masked_fill((log == -math.inf) & is_known, 0.0)

    estimate = unless_nothing(1 / (1 + (logs.amax(-1) - dropped).exp()), dropped)
    bounds = unless_nothing(1 / (1 + (logs.amin(-1) - bound).exp()), bound)
    bounds = torch.where(is_known, bounds, 1.0).nan_to_num(1.0)
    gap = unless_nothing(logs.amin(-1) - top + math.log(GROUP_TOKENS), top)
    if not has_estimate:
        estimate = gap = torch.full_like(gap, math.nan)
    parts = [
        is_dense,
        tokens,
        visible.expand(size),
        *(part.masked_fill(is_dense, 0.0) for part in (bounds, estimate, gap)),
    ]
    sums = torch.stack([part.double().sum((0, 2)) for part in parts], dim=1)
    return torch.cat((sums, parts[4].transpose(0, 1).flatten(1)), dim=1)


@jit()
def _weigh(
    lse, mass, is_step, GROUP: tl.constexpr, MEMBERS: tl.constexpr, LOG_UNIT: tl.constexpr, HAS_ESTIMATE: tl.constexpr
):
    """Bound, estimate and gap of head-steps whose numbers begin at lse, mass [n]."""
    member = tl.arange(0, MEMBERS)[None, :]
    is_head = is_step[:, None] & (member < GROUP)
    logs = tl.load(lse[:, None] + member, mask=is_head, other=0.0)
    is_number = (logs <= 0.0) | (logs > 0.0)
    is_known = tl.min(is_number.to(tl.int32), 1) == 1  # maxima may drop what is no number
    most = tl.max(tl.where(is_head & is_number, logs, float("-inf")), 1)
    least = tl.min(tl.where(is_head & is_number, logs, float("inf")), 1)
    certain = _share(least, tl.load(mass + 3, mask=is_step, other=0.0))
    certain = tl.where(is_known & (certain >= 0.0), certain, 1.0)
    unknown = tl.where(is_known & HAS_ESTIMATE, 0.0, float("nan"))
    estimate = _share(most, tl.load(mass + 1, mask=is_step, other=0.0))
    top = tl.load(mass + 2, mask=is_step, other=0.0)
    is_dropped = top != float("-inf")
    gap = tl.where(is_dropped, least - tl.where(is_dropped, top, 0.0) + LOG_UNIT, 0.0)
    return certain, estimate + unknown, gap + unknown


@jit()
def _share(kept, dropped):
    """Of the mass that was dropped, from the logs of both; 0 where that is nothing."""
    is_dropped = dropped != float("-inf")
    nats = kept - tl.where(is_dropped, dropped, 0.0)
    share = 1.0 / (1.0 + tl.exp(tl.where(nats > 80.0, 80.0, nats)))  # no overflow; what is no number stays that
    return tl.where(is_dropped, share, 0.0)


@jit("num_requests")
def _sum_kernel(
    lse,
    mass,
    num_kept,
    context_lens,
    windows,
    report,
    num_requests,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    MEMBERS: tl.constexpr,
    STEPS: tl.constexpr,
    SUMS: tl.constexpr,
    UNIT: tl.constexpr,
    LOG_UNIT: tl.constexpr,
    HAS_ESTIMATE: tl.constexpr,
):
    """Program r: request r."""
    request = tl.program_id(0).to(tl.int64)
    context = tl.load(context_lens + request)
    unfilled = (UNIT - context % UNIT) % UNIT
    place = tl.arange(0, STEPS)
    row = report + request * (SUMS + NUM_LAYERS * NUM_KV_HEADS)
    num_dense = tl.zeros([STEPS], tl.float64)
    num_tokens = tl.zeros([STEPS], tl.float64)
    num_visible = tl.zeros([STEPS], tl.float64)
    bounds = tl.zeros([STEPS], tl.float64)
    estimates = tl.zeros([STEPS], tl.float64)
    gaps = tl.zeros([STEPS], tl.float64)
    for start in range(0, NUM_LAYERS * NUM_KV_HEADS, STEPS):
        index = start + place
        is_step = index < NUM_LAYERS * NUM_KV_HEADS
        layer = index // NUM_KV_HEADS
        at = (layer * num_requests + request) * NUM_KV_HEADS + index % NUM_KV_HEADS
        window = tl.load(windows + layer, mask=is_step, other=0)
        visible = tl.where(window > 0, tl.minimum(window, context), context)
        kept = tl.load(num_kept + at, mask=is_step, other=0)
        tokens = tl.where(kept == 0, visible, tl.minimum(kept * UNIT - unfilled, visible))
        is_dense = tokens >= visible
        certain, estimate, gap = _weigh(
            lse + at * GROUP_HEADS, mass + 4 * at, is_step, GROUP_HEADS, MEMBERS, LOG_UNIT, HAS_ESTIMATE
        )
        estimate = tl.where(is_dense, 0.0, estimate)
        tl.store(row + SUMS + index, estimate.to(tl.float64), mask=is_step)
        num_dense += (is_dense & is_step).to(tl.float64)
        num_tokens += tl.where(is_step, tokens, 0).to(tl.float64)
        num_visible += tl.where(is_step, visible, 0).to(tl.float64)
        is_sparse = is_step & (tokens < visible)
        bounds += tl.where(is_sparse, certain, 0.0).to(tl.float64)
        estimates += tl.where(is_sparse, estimate, 0.0).to(tl.float64)
        gaps += tl.where(is_sparse, gap, 0.0).to(tl.float64)
    tl.store(row, tl.sum(num_dense, 0))
    tl.store(row + 1, tl.sum(num_tokens, 0))
    tl.store(row + 2, tl.sum(num_visible, 0))
    tl.store(row + 3, tl.sum(bounds, 0))
    tl.store(row + 4, tl.sum(estimates, 0))
    tl.store(row + 5, tl.sum(gaps, 0))


def report_size(num_layers: int, num_kv_heads: int) -> int:
    """Columns of a report."""
    return NUM_SUMS + num_layers * num_kv_heads


def sum_support_triton(
    lse: torch.Tensor,
    mass: torch.Tensor,
    num_kept: torch.Tensor,
    context_lens: torch.Tensor,
    windows: torch.Tensor,
    report: torch.Tensor,
    *,
    has_estimate: bool = True,
) -> None:
    """Check and launch."""
    _check(lse, mass, num_kept, context_lens, windows, report)
    num_layers, num_requests, num_heads = lse.shape
    if num_requests == 0:
        return
    num_kv_heads = num_kept.shape[1] // num_requests
    group = num_heads // num_kv_heads
    with torch.cuda.device_of(lse):
        _sum_kernel[(num_requests,)](
            lse, mass, num_kept, context_lens, windows, report, num_requests,
            NUM_LAYERS=num_layers, NUM_KV_HEADS=num_kv_heads, GROUP_HEADS=group, MEMBERS=next_power_of_two(group),
            STEPS=min(HEAD_STEPS, next_power_of_two(num_layers * num_kv_heads)), SUMS=NUM_SUMS,
            UNIT=GROUP_TOKENS, LOG_UNIT=math.log(GROUP_TOKENS), HAS_ESTIMATE=has_estimate, num_warps=8,
        )  # fmt: skip


def sum_support(
    lse: torch.Tensor,
    mass: torch.Tensor,
    num_kept: torch.Tensor,
    context_lens: torch.Tensor,
    windows: torch.Tensor,
    report: torch.Tensor,
    *,
    has_estimate: bool = True,
) -> None:
    """Fill `report`; shapes: the module's header. has_estimate: False for rules whose scores are bounds, or none.

    Estimates and gaps are NaN then where something was dropped. Never waits for the device. Raises
    KernelUnavailableError without Triton or a GPU of compute capability 8.0, KernelInputError for bad tensors.
    """
    require_triton("sum_support", lse)
    sum_support_triton(lse, mass, num_kept, context_lens, windows, report, has_estimate=has_estimate)


def _check(
    lse: torch.Tensor,
    mass: torch.Tensor,
    num_kept: torch.Tensor,
    context_lens: torch.Tensor,
    windows: torch.Tensor,
    report: torch.Tensor,
) -> None:
    check_tensor("lse", lse, (None, None, None), lse.device)
    num_layers, num_requests, num_heads = lse.shape
    num_kv_heads = num_kept.shape[-1] // max(num_requests, 1)
    is_whole = num_requests == 0 or (num_kv_heads > 0 and num_heads % num_kv_heads == 0)
    require(
        is_whole,
        f"num_kept has {num_kept.shape[-1]} pairs: no whole number for {num_requests} requests of {num_heads} heads",
    )
    num_pairs = num_requests * num_kv_heads
    for name, tensor, shape, dtype in (
        ("lse", lse, lse.shape, torch.float32),
        ("mass", mass, (num_layers, num_pairs, 4), torch.float32),
        ("num_kept", num_kept, (num_layers, num_pairs), torch.int32),
        ("context_lens", context_lens, (num_requests,), torch.int32),
        ("windows", windows, (num_layers,), torch.int32),
        ("report", report, (num_requests, report_size(num_layers, num_kv_heads)), torch.float64),
    ):
        check_whole(name, tensor, tuple(shape), lse.device, dtype)
