"""What the client saw of one request: the raw record that every figure of a report is computed from.

`client.py` fills it, `statistics.py` reads it, `report.py` writes it to JSON. Times are seconds since the start of the
load point, taken from `time.perf_counter()` of the client.
"""

from __future__ import annotations

from itertools import pairwise

import msgspec


class Outcome(msgspec.Struct, kw_only=True):
    """One request, sent once. A failed request has an `error_code` and counts in no latency."""

    index: int
    intended_s: float
    """When the load's plan wanted it sent: its arrival time in open loop, equal to `sent_s` in closed loop."""
    sent_s: float = 0.0
    """When it was handed to a connection."""
    first_token_s: float | None = None
    """When the first piece of text arrived; None without streaming."""
    end_s: float | None = None
    """When the reply was complete."""
    token_times_s: list[float] = []
    """Arrival of each chunk that carried text."""
    num_prompt_tokens_asked: int | None = None
    """Length the workload wanted; None when prompts come with their own lengths."""
    num_prompt_tokens: int | None = None
    """From the reply's usage."""
    num_cached_tokens: int | None = None
    """Prompt tokens that the server took from its prefix cache, from usage."""
    max_tokens: int = 0
    num_output_tokens: int = 0
    is_counted_by_usage: bool = False
    """False: the server gave no usage, and `num_output_tokens` counts chunks."""
    finish_reason: str | None = None
    status: int | None = None
    error_code: str | None = None
    error_message: str | None = None

    @property
    def is_ok(self) -> bool:
        """The reply was complete and not an error."""
        return self.error_code is None

    @property
    def e2e_s(self) -> float:
        """From sending to the end of the reply."""
        assert self.end_s is not None
        return self.end_s - self.sent_s

    @property
    def e2e_intended_s(self) -> float:
        """From the intended time of sending: a client that lags behind cannot hide a slow server here."""
        assert self.end_s is not None
        return self.end_s - self.intended_s

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.sent_s

    @property
    def ttft_intended_s(self) -> float | None:
        """From the intended time of sending to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """(E2E - TTFT) / (n - 1); None for fewer than two tokens or without streaming."""
        if self.first_token_s is None or self.end_s is None or self.num_output_tokens < 2:
            return None
        return (self.end_s - self.first_token_s) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Gaps between successive chunks with text."""
        return [after - before for before, after in pairwise(self.token_times_s)]
