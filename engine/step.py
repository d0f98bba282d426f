"""One step as tensors: what the runner hands to the model and to the attention backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

EVERYTHING = 2**31 - 1
"""The budget of a head that leaves nothing out."""


@dataclass(slots=True)
class Selection:
    """What one query of a sparse request may attend to in this step."""

    budgets: torch.Tensor
    """[num_layers, num_kv_heads], int32, on the CPU: tokens kept; a head whose budget covers its context keeps all.

    Never written to: other budgets are another tensor, and a captured step sends them to the device only then."""
    audits: list[tuple[int, int]]
    """(layer, KV head) whose dropped mass is to be measured exactly."""

    def audited_heads(self, layer: int) -> list[int]:
        """KV heads of a layer that are to be audited."""
        return [head for audited, head in self.audits if audited == layer]


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


def to_device(values: Sequence[object], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The values on the device; `torch.tensor` with a device would wait for all that it has to do."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def stack_budgets(spans: list[Span], num_layers: int, num_kv_heads: int) -> torch.Tensor:
    """[num_layers, len(spans), num_kv_heads], int32, on the CPU: EVERYTHING for a span without a selection.

    Not to be written to: of one span they are its selection's own.
    """
    if len(spans) == 1 and spans[0].selection is not None:
        return spans[0].selection.budgets.unsqueeze(1)
    budgets = torch.full((num_layers, len(spans), num_kv_heads), EVERYTHING, dtype=torch.int32)
    for index, span in enumerate(spans):
        if span.selection is not None:
            budgets[:, index] = span.selection.budgets
    return budgets
