"""Modelled work: by what shares the requests of a step divide the time that the step took. No torch here.

The engine gives each step's items to `WorkModel.item` and divides the step's busy seconds by the results with
`divide`; the shares of all requests, aborted and failed ones too, so add up to the engine's busy time. The unit is a
multiply-add, and only ratios matter:

    work = tokens * weights + rows * head + pairs * pair
    weights   multiply-adds of one token with all layers' matrices (their number of elements)
    head      of one row of logits: hidden_size * vocab_size
    pair      of one KV head's query group with one key and its value: 2 * head_dim * num_heads / num_kv_heads
    pairs     tokens attended, summed over the item's tokens, layers and KV heads

A dense token at position p attends to p + 1 tokens, or to its window. A sparse one attends to what its selection kept,
as counted when it ran, and each group of GROUP_TOKENS tokens that it could see costs one pair more: the summary that
was scored. A request that is preempted pays for what is computed again: whoever is computed in a step pays for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vashista.engine.model_config import ModelConfig

GROUP_TOKENS = 16
"""Tokens that share a key summary."""


@dataclass(frozen=True)
class WorkModel:
    """The costs of one model, in multiply-adds."""

    weights: float
    head: float
    pair: float
    windows: tuple[tuple[int | None, int], ...]
    """(sliding window or None, layers times KV heads that have it)."""

    @classmethod
    def of(cls, config: ModelConfig) -> WorkModel:
        """The costs that follow from a model's shape."""
        attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
        mlp = 3 * config.hidden_size * config.intermediate_size
        counts = Counter(config.layer_windows)
        return cls(
            weights=float(config.num_layers * (attention + mlp)),
            head=float(config.hidden_size * config.vocab_size),
            pair=2.0 * config.head_dim * config.num_heads / config.num_kv_heads,
            windows=tuple((window, count * config.num_kv_heads) for window, count in counts.items()),
        )

    def dense_pairs(self, start: int, end: int) -> int:
        """Tokens attended by the tokens at positions `start` to `end` - 1, if each attends to all that it sees."""
        num_pairs = 0
        for window, count in self.windows:
            num_pairs += count * _attended(start, end, window)
        return num_pairs

    def sparse_pairs(self, tokens_attended: int, tokens_visible: int) -> float:
        """Of a token that left some out; both numbers are sums over layers and KV heads."""
        return tokens_attended + tokens_visible / GROUP_TOKENS

    def item(self, num_tokens: int, num_rows: int, num_pairs: float) -> float:
        """The work of one request in a step; above 0 for at least one token."""
        return num_tokens * self.weights + num_rows * self.head + num_pairs * self.pair


def divide(seconds: float, works: Sequence[float]) -> list[float]:
    """Shares of the seconds in proportion to the works; they add up to `seconds` but for rounding."""
    total = sum(works)
    return [seconds * work / total for work in works]


def _attended(start: int, end: int, window: int | None) -> int:
    """The sum over positions p from start to end - 1 of min(p + 1, window)."""
    if window is None:
        return (end * (end + 1) - start * (start + 1)) // 2
    full = max(start, min(end, window))  # from here on the window is full
    return _attended(start, full, None) + (end - full) * window
