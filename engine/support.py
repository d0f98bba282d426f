"""Sums up, over a request's life, what its attention left out: the `SupportReport` of its last event.

The engine keeps one `SupportTally` beside each sparse request and adds every step's `SpanSupport`. Bound, estimate and
audit are three statements and are never mixed (see `SupportReport`). No torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vashista.engine.messages import SupportAudit, SupportReport

if TYPE_CHECKING:  # the server merges reports before the kernel's filter is on, when numpy may start no threads
    import numpy as np
    from numpy.typing import NDArray

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom (NIST handbook, 1.3.6.7.2), then the normal's
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
NORMAL_QUANTILE = 1.96


@dataclass(slots=True)
class Audit:
    """The exact attention of one query group, beside what was kept of it."""

    layer: int
    kv_head: int
    dropped_mass: float
    """The largest of the group."""
    effective_support: float
    """e to the entropy, the mean of the group; so are the next two."""
    support_90: float
    support_99: float


@dataclass(slots=True)
class SpanSupport:
    """What a sparse request's step left out, summed over its head-steps (layers times KV heads)."""

    num_dense: int
    tokens_attended: int
    tokens_visible: int
    dropped_mass_bound: float
    dropped_mass_estimate: float
    """NaN without summaries, like the gap."""
    support_gap: float
    """Over the head-steps that are not dense."""
    audits: list[Audit]
    estimates: NDArray[np.float64] | None = None
    """[num_layers, num_kv_heads]: of each head-step the estimate that is summed up above; None: nobody asks for it."""


class SupportTally:
    """Sums over head-steps; `num_heads` is layers times KV heads."""

    def __init__(self, num_heads: int) -> None:
        self._num_heads = num_heads
        self.reset()

    def reset(self) -> None:
        """Forget all steps, when they are computed again."""
        self._num_head_steps = self._num_dense = self._tokens_attended = self._tokens_visible = 0
        self._bound = self._estimate = self._gap = 0.0
        self._audits: list[Audit] = []

    def add_dense(self, tokens_visible: int) -> None:
        """A step that attended to everything; tokens_visible: summed over all heads."""
        self._num_head_steps += self._num_heads
        self._num_dense += self._num_heads
        self._tokens_attended += tokens_visible
        self._tokens_visible += tokens_visible

    def add(self, support: SpanSupport) -> None:
        """A step with a selection."""
        self._num_head_steps += self._num_heads
        self._num_dense += support.num_dense
        self._tokens_attended += support.tokens_attended
        self._tokens_visible += support.tokens_visible
        self._bound += support.dropped_mass_bound
        self._estimate += support.dropped_mass_estimate
        self._gap += support.support_gap
        self._audits += support.audits

    def report(self) -> SupportReport | None:
        """None before the first step."""
        num = self._num_head_steps
        if not num:
            return None
        num_sparse = num - self._num_dense
        return SupportReport(
            num_head_steps=num,
            dense_share=self._num_dense / num,
            tokens_attended=self._tokens_attended / num,
            tokens_visible=self._tokens_visible / num,
            dropped_mass_bound=min(1.0, self._bound / num),
            dropped_mass_estimate=_known(self._estimate / num),
            support_gap=_known(self._gap / num_sparse) if num_sparse else None,
            audit=sum_audits(self._audits) if self._audits else None,
        )


def sum_audits(audits: list[Audit]) -> SupportAudit:
    """Means and the confidence interval of at least one audit."""
    num = len(audits)
    masses = [audit.dropped_mass for audit in audits]
    mean = sum(masses) / num
    deviation = math.sqrt(sum((mass - mean) ** 2 for mass in masses) / max(num - 1, 1))
    low, high = confidence_interval(num, mean, deviation)
    return SupportAudit(
        num_audits=num,
        dropped_mass=mean,
        dropped_mass_low=low,
        dropped_mass_high=high,
        dropped_mass_deviation=deviation,
        dropped_mass_max=max(masses),
        effective_support=sum(audit.effective_support for audit in audits) / num,
        support_90=sum(audit.support_90 for audit in audits) / num,
        support_99=sum(audit.support_99 for audit in audits) / num,
    )


def confidence_interval(num: int, mean: float, deviation: float) -> tuple[float, float]:
    """Of the mean of values between 0 and 1, 95 %, by Student's t; (0, 1) for a single value."""
    if num < 2:
        return 0.0, 1.0
    quantile = T_QUANTILES[num - 2] if num - 1 <= len(T_QUANTILES) else NORMAL_QUANTILE
    half = quantile * deviation / math.sqrt(num)
    return max(0.0, mean - half), min(1.0, mean + half)


def merge_reports(reports: list[SupportReport]) -> SupportReport | None:
    """One report over all head-steps of several, as if they were one request's; None for none."""
    if len(reports) < 2:
        return reports[0] if reports else None
    weights = [report.num_head_steps for report in reports]
    sparse = [
        (report.support_gap, weight * (1 - report.dense_share))
        for report, weight in zip(reports, weights, strict=True)
        if report.support_gap is not None
    ]
    num_sparse = sum(weight for _, weight in sparse)
    audits = [report.audit for report in reports if report.audit is not None]
    return SupportReport(
        num_head_steps=sum(weights),
        dense_share=_mean([report.dense_share for report in reports], weights),
        tokens_attended=_mean([report.tokens_attended for report in reports], weights),
        tokens_visible=_mean([report.tokens_visible for report in reports], weights),
        dropped_mass_bound=_mean([report.dropped_mass_bound for report in reports], weights),
        dropped_mass_estimate=_known(_mean([_number(report.dropped_mass_estimate) for report in reports], weights)),
        support_gap=sum(gap * weight for gap, weight in sparse) / num_sparse if num_sparse else None,
        audit=_merge_audits(audits) if audits else None,
    )


def _merge_audits(audits: list[SupportAudit]) -> SupportAudit:
    counts = [audit.num_audits for audit in audits]
    num = sum(counts)
    mean = _mean([audit.dropped_mass for audit in audits], counts)
    squares = sum(
        (count - 1) * audit.dropped_mass_deviation**2 + count * (audit.dropped_mass - mean) ** 2
        for audit, count in zip(audits, counts, strict=True)
    )
    deviation = math.sqrt(squares / max(num - 1, 1))
    low, high = confidence_interval(num, mean, deviation)
    return SupportAudit(
        num_audits=num,
        dropped_mass=mean,
        dropped_mass_low=low,
        dropped_mass_high=high,
        dropped_mass_deviation=deviation,
        dropped_mass_max=max(audit.dropped_mass_max for audit in audits),
        effective_support=_mean([audit.effective_support for audit in audits], counts),
        support_90=_mean([audit.support_90 for audit in audits], counts),
        support_99=_mean([audit.support_99 for audit in audits], counts),
    )


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value
