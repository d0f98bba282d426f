"""What is said of a request before it runs: the body of /v1/predict, of `usage.vashista.prediction` and of receipts.

`server/forecaster.py` makes predictions; admission compares them with deadlines and budgets. An interval is two-sided
and conformal: `coverage` of the outcomes of its kind fell inside (`engine/predict/conformal.py`).
"""

from __future__ import annotations

from typing import Any

import msgspec


class Interval(msgspec.Struct, frozen=True):
    """A median between two bounds."""

    median: float
    lower: float
    upper: float

    def scaled(self, factor: float) -> Interval:
        """All three, times a factor above 0."""
        return Interval(self.median * factor, self.lower * factor, self.upper * factor)

    def plus(self, constant: float) -> Interval:
        """All three, and a constant more."""
        return Interval(self.median + constant, self.lower + constant, self.upper + constant)


class ExpectedSupport(msgspec.Struct, frozen=True, kw_only=True):
    """What the tokens that a request generates will attend to, on average over them, the layers and the KV heads."""

    tokens_visible: float
    tokens_attended: float
    dense_share: float
    """Share of the head-steps that leave nothing out."""
    dropped_mass: float | None
    """Share of the attention mass that is left out; None where no support profile tells."""


class QueueAhead(msgspec.Struct, frozen=True, kw_only=True):
    """Whom the request would meet."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    """Prompt tokens of those that wait."""
    arrivals_per_s: float
    """Recent requests a second; as many are expected to follow."""


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """Of one HTTP request: its first token is that of the first choice, its end that of the last."""

    coverage: float
    """Share of outcomes that the intervals are made to hold."""
    num_outcomes: int
    """Outcomes that came of requests in the same regime; below 20 the intervals are guesses without that coverage."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens expected to come from the prefix cache."""
    num_tokens: int
    """Output tokens of each choice that the total is for: max_tokens, unless the model ends earlier."""
    ttft_s: Interval
    """Arrival until the first token."""
    time_per_token_s: Interval | None
    """Mean time of the tokens after the first; None where there is none."""
    total_s: Interval
    """Arrival until the end, given `num_tokens`."""
    kv_pages: int
    """Pages held at the end, at most; cached ones included."""
    busy_s: Interval
    """Its share of the engine's busy time: GPU-seconds, where the engine runs on a GPU."""
    energy_j: Interval
    money: Interval | None
    """None where the operator sets no prices."""
    currency: str | None
    support: ExpectedSupport
    queue: QueueAhead

    def record(self) -> dict[str, Any]:
        """As plain values, to six digits: what a receipt keeps."""
        found: dict[str, Any] = _rounded(msgspec.to_builtins(self))
        return found


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """What was predicted for the number of tokens that came, from the same state as the prediction itself."""

    time_per_token_s: Interval | None
    total_s: Interval
    busy_s: Interval


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a request took, as its prediction counts it."""

    queue_s: float | None
    """Arrival until it first ran."""
    ttft_s: float
    time_per_token_s: float | None
    """Mean over its choices; None where none had a second token."""
    total_s: float
    busy_s: float
    num_tokens: int
    """Of the choice with the most."""
    predicted: Given | None = None
    """What the prediction said of so many tokens; the time to the first does not depend on their number."""


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return value
