"""What a step's time is made of: counts that the scheduler knows before a step, and the engine after it.

`engine/busy_time.py` counts them for every step that ran, `engine/predict/simulate.py` for steps that will run, and
`engine/predict/step_time.py` fits seconds to them. A *pair* is one key and its value attended by one query group of one
KV head, as in `engine/work.py`. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Tokens of a step where the cost of one more token may change: weights are read once for few, computed with for many.
"""
COUNTS = (
    *("num_rows", "num_requests", "num_drawn", "num_shaped", "num_sparse"),
    *("decode_pairs", "prompt_pairs", "scored_pairs", "kept_pairs"),
    *("cold", "split", "idle"),
)
NUM_FEATURES = 1 + len(KNOTS) + len(COUNTS)
FEW_TOKENS = 8
"""Up to so many tokens a step takes as long as its weights take to be read, with more it computes, and leaves the next
ones cold: then what it computed with lies in the processor's caches, not the weights."""
COLD_KEEP = math.exp(-1 / 12)
"""Of the cold, after a step with fewer. Single-token steps of reference-26m in idle chats fell from 5.6 to 5.0 ms in
some eight steps on an AMD EPYC with 32 MiB of third cache (medians of 107 replies), where 0.4 to 0.5 ms of cold are
learnt. The 12 were found on an Intel Xeon whose third cache holds all weights, where the cold is larger.
"""
IDLE_S = 0.15
"""Pause that makes a step after it 63 % idle. A prompt of 128 tokens took 9.4, 10.5 and 13.0 ms after 0, 0.05 and 0.5 s
(8 G parameters, H100; `bench/predict/first_token.py`): a processor with nothing to do lowers its clocks."""


@dataclass(slots=True)
class StepFeatures:
    """Counts of one step."""

    num_tokens: int = 0
    """Computed ones, those of prompts padded: `computed`."""
    num_rows: float = 0
    """Rows of logits."""
    num_requests: float = 0
    num_drawn: float = 0
    """Requests whose next token is drawn, not the most probable one."""
    num_shaped: float = 0
    """Requests whose logits are masked or changed before."""
    num_sparse: float = 0
    """Requests that may leave tokens out."""
    decode_pairs: float = 0.0
    """Of single tokens that attend to all."""
    prompt_pairs: float = 0.0
    """Of several tokens at once."""
    scored_pairs: float = 0.0
    """Key summaries looked at by sparse tokens."""
    kept_pairs: float = 0.0
    """Tokens attended by sparse tokens."""
    cold: float = 0.0
    """Of a step with up to FEW_TOKENS tokens, not padded: 1 after a longer one, COLD_KEEP of it each step since."""
    split: float = 0.0
    """1 of a step that reads the weights twice: for its streams, then for its prompts (`computed`)."""
    idle: float = 0.0
    """Of the first step after a pause: `idle_of`."""

    def vector(self) -> list[float]:
        """[NUM_FEATURES]: one, the tokens between each two knots, and the counts in their order."""
        return [1.0, *spread(self.num_tokens), *(getattr(self, name) for name in COUNTS)]


def rows_of_prompts(num_tokens: int, prompt_rows: Sequence[int]) -> int:
    """The fewest of these rows, fewest first, that hold so many tokens of prompts; 0 where none do, or no token is."""
    return next((rows for rows in prompt_rows if rows >= num_tokens > 0), 0)


def computed(num_single: int, num_prompt_tokens: int, prompt_rows: Sequence[int]) -> tuple[int, bool]:
    """Tokens that a step computes for requests with one token each and for prompts, and whether it is split.

    prompt_rows: of the engine, as in `SchedulerRules`.
    """
    rows = rows_of_prompts(num_prompt_tokens, prompt_rows)
    return num_single + (rows or num_prompt_tokens), num_single > 0 and rows > 0


def idle_of(pause_s: float) -> float:
    """How idle a machine is after a pause: from 0 to 1."""
    return 1.0 - math.exp(-pause_s / IDLE_S)


def spread(num_tokens: float) -> list[float]:
    """How many of the tokens after the first lie between each two knots, and beyond the last."""
    parts = [0.0] * len(KNOTS)
    for index, knot in enumerate(KNOTS):
        if num_tokens <= knot:
            break
        end = KNOTS[index + 1] if index + 1 < len(KNOTS) else num_tokens
        parts[index] = min(num_tokens, end) - knot
    return parts
