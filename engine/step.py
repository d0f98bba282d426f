"""One step as tensors: what the runner hands to the model and to the attention backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Selection:
    """What one query of a sparse request may attend to in this step."""

    budgets: torch.Tensor
    """[num_layers, num_kv_heads], int32, on the CPU: tokens kept; a head whose budget covers its context keeps all."""
    least: list[int]
    """The smallest budget of each layer."""
    audits: list[tuple[int, int]]
    """(layer, KV head) whose dropped mass is to be measured exactly."""


@dataclass(slots=True)
class Span:
    """One request's part of a step."""

    query_start: int
    """Row of its first token among the step's tokens."""
    num_queries: int
    context_len: int
    """Tokens in its cache after the step; its queries are the last `num_queries` of them."""
    pages: list[int]
    """Its pages in order; at least enough for `context_len`."""
    selection: Selection | None = None
    """For a single query that may leave tokens out; None is dense."""

    @property
    def start(self) -> int:
        """Position of its first token in this step."""
        return self.context_len - self.num_queries


@dataclass(slots=True)
class StepInput:
    """The tokens of one step, all requests behind each other."""

    token_ids: torch.Tensor
    """[num_tokens], int64, on the device."""
    positions: torch.Tensor
    """[num_tokens], int64, on the device."""
    spans: list[Span]
    logit_rows: torch.Tensor
    """[num_logit_rows], int64, on the device: rows of the step's tokens whose logits are needed."""
