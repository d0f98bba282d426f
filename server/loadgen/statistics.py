"""The figures of one load point: percentiles, throughput, goodput. Pure Python, no I/O.

`runner.py` hands over the Outcomes of a point, `report.py` prints the Summary. Percentiles interpolate linearly between
order statistics, as numpy's default does. Failed requests count in no latency, but against goodput and in the errors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from vashista.engine.errors import WorkloadError
from vashista.server.loadgen.outcome import Outcome

PERCENTILES = (50.0, 90.0, 95.0, 99.0)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Percentile of a sorted, non-empty sequence, by linear interpolation."""
    assert ordered
    assert 0.0 <= percent <= 100.0
    rank = (len(ordered) - 1) * percent / 100.0
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


class Distribution(msgspec.Struct, frozen=True):
    """A sample's size, mean, spread and percentiles, in the sample's unit (seconds unless said otherwise)."""

    num_values: int
    mean: float
    std: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Distribution | None:
        """Of the values that are there; None when there are none."""
        ordered = sorted(value for value in values if value is not None)
        if not ordered:
            return None
        mean = math.fsum(ordered) / len(ordered)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / len(ordered))
        p50, p90, p95, p99 = (percentile(ordered, percent) for percent in PERCENTILES)
        return cls(len(ordered), mean, std, ordered[0], p50, p90, p95, p99, ordered[-1])


class Limits(msgspec.Struct, frozen=True):
    """Service limits of one request, in seconds; None is no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Limits:
        """Read `ttft=200ms,tpot=30ms,e2e=5s`; units are us, ms, s and min."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in {"ttft", "tpot", "e2e"} or not value:
                raise WorkloadError(f"slo: {part!r} is not one of ttft=TIME, tpot=TIME, e2e=TIME", param="slo")
            if f"{name}_s" in limits:
                raise WorkloadError(f"slo: {name} is given twice in {text!r}", param="slo")
            limits[f"{name}_s"] = _parse_time(value)
        return cls(**limits)

    def are_met_by(self, outcome: Outcome) -> bool:
        """All limits are met. A request of one token has no time per output token and meets any limit on it."""
        if not outcome.is_ok:
            return False
        if self.ttft_s is not None and (outcome.ttft_intended_s is None or outcome.ttft_intended_s > self.ttft_s):
            return False
        if self.tpot_s is not None and outcome.tpot_s is not None and outcome.tpot_s > self.tpot_s:
            return False
        return self.e2e_s is None or outcome.e2e_intended_s <= self.e2e_s


def _parse_time(text: str) -> float:
    for unit, seconds in (("us", 1e-6), ("ms", 1e-3), ("min", 60.0), ("s", 1.0)):
        if text.endswith(unit):
            try:
                value = float(text.removesuffix(unit)) * seconds
            except ValueError:
                break
            if math.isfinite(value) and value > 0:
                return value
            break
    raise WorkloadError(f"slo: {text!r} is not a positive time such as 500us, 200ms, 5s or 1min", param="slo")


class Goodput(msgspec.Struct, frozen=True):
    """Requests that met all limits, latencies taken from the intended time of sending."""

    num_good: int
    share: float
    """Of all requests, failed ones included."""
    requests_per_s: float


class Summary(msgspec.Struct, frozen=True):
    """All figures of one load point. Times in seconds."""

    num_requests: int
    num_failed: int
    errors: dict[str, int]
    """Failed requests by code."""
    duration_s: float
    """From the first request's intended time to the end of the last reply."""
    requests_per_s: float
    input_tokens_per_s: float | None
    """From usage; None when the server gives none."""
    output_tokens_per_s: float
    num_input_tokens: int | None
    num_cached_tokens: int | None
    num_output_tokens: int
    num_counted_by_usage: int
    """Requests whose output tokens the server counted; of the others the chunks were counted."""
    num_exact_prompts: int | None
    """Requests whose prompt had exactly the tokens asked for; None when no lengths were asked or told."""
    tokens_per_chunk: float | None
    ttft: Distribution | None
    ttft_intended: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    e2e_intended: Distribution | None
    send_lag: Distribution | None
    """How much later than intended requests were sent: the client's own delay."""
    output_length: Distribution | None
    """Tokens."""
    prompt_length: Distribution | None
    """Tokens."""
    goodput: Goodput | None


def summarize(outcomes: Sequence[Outcome], limits: Limits | None, *, elapsed_s: float) -> Summary:
    """Reduce the outcomes of one point, whose last reply, good or failed, ended at `elapsed_s` of the point's clock."""
    good = [outcome for outcome in outcomes if outcome.is_ok]
    begin = min((outcome.intended_s for outcome in outcomes), default=0.0)
    duration_s = max(elapsed_s - begin, 1e-9)
    prompts = [outcome.num_prompt_tokens for outcome in good]
    known_prompts = [count for count in prompts if count is not None]
    has_all_prompts = bool(good) and len(known_prompts) == len(good)
    cached = [outcome.num_cached_tokens for outcome in good if outcome.num_cached_tokens is not None]
    num_output = sum(outcome.num_output_tokens for outcome in good)
    num_chunks = sum(len(outcome.token_times_s) for outcome in good)
    asked = [o for o in good if o.num_prompt_tokens_asked is not None and o.num_prompt_tokens is not None]
    return Summary(
        num_requests=len(outcomes),
        num_failed=len(outcomes) - len(good),
        errors=dict(Counter(outcome.error_code for outcome in outcomes if outcome.error_code is not None)),
        duration_s=duration_s,
        requests_per_s=len(good) / duration_s,
        input_tokens_per_s=sum(known_prompts) / duration_s if has_all_prompts else None,
        output_tokens_per_s=num_output / duration_s,
        num_input_tokens=sum(known_prompts) if has_all_prompts else None,
        num_cached_tokens=sum(cached) if cached else None,
        num_output_tokens=num_output,
        num_counted_by_usage=sum(outcome.is_counted_by_usage for outcome in good),
        num_exact_prompts=sum(o.num_prompt_tokens == o.num_prompt_tokens_asked for o in asked) if asked else None,
        tokens_per_chunk=num_output / num_chunks if num_chunks else None,
        ttft=Distribution.of(outcome.ttft_s for outcome in good),
        ttft_intended=Distribution.of(outcome.ttft_intended_s for outcome in good),
        tpot=Distribution.of(outcome.tpot_s for outcome in good),
        itl=Distribution.of(gap for outcome in good for gap in outcome.itl_s),
        e2e=Distribution.of(outcome.e2e_s for outcome in good),
        e2e_intended=Distribution.of(outcome.e2e_intended_s for outcome in good),
        send_lag=Distribution.of(outcome.sent_s - outcome.intended_s for outcome in outcomes),
        output_length=Distribution.of(float(outcome.num_output_tokens) for outcome in good),
        prompt_length=Distribution.of(float(count) for count in known_prompts),
        goodput=_goodput(outcomes, limits, duration_s),
    )


def _goodput(outcomes: Sequence[Outcome], limits: Limits | None, duration_s: float) -> Goodput | None:
    if limits is None or not outcomes:
        return None
    num_good = sum(limits.are_met_by(outcome) for outcome in outcomes)
    return Goodput(num_good, num_good / len(outcomes), num_good / duration_s)
