"""Muon for the layers' matrices, AdamW for everything else, behind one `step`.

Muon (Jordan 2024) steps along the orthogonal factor of the momentum, by five Newton-Schulz iterations in bf16; it is
scaled as in Moonlight (arXiv 2502.16982), so that one rate serves both. Matrices of one shape are handled as one stack.
"""

from __future__ import annotations

from typing import Any

import torch
from model import MATRICES, Model
from torch import nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
RMS = 0.2
"""Root mean square of an update at rate 1, AdamW's own."""


class Optimizer:
    """Both optimizers of one model."""

    def __init__(self, model: Model, name: str, weight_decay: float) -> None:
        """name: muon, or adamw for all weights."""
        matrices = [
            weight
            for layer in model.layers
            for key in MATRICES
            if isinstance(weight := getattr(layer, key), nn.Parameter)
        ]
        self._weight_decay = weight_decay
        chosen = matrices if name == "muon" else []
        taken = {id(weight) for weight in chosen}
        decayed = [weight for weight in matrices if id(weight) not in taken]
        rest = [weight for weight in model.parameters() if id(weight) not in {id(other) for other in matrices}]
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=1.0,
            betas=(0.9, 0.95),
            eps=1e-8,
            fused=model.embedding.is_cuda,
        )
        self._groups: list[list[nn.Parameter]] = []
        for size in sorted({tuple(sorted(weight.shape)) for weight in chosen}):
            self._groups.append([weight for weight in chosen if tuple(sorted(weight.shape)) == size])
        self._momentum = [torch.zeros_like(_stack(group)) for group in self._groups]

    def step(self, rate: float) -> None:
        """One step by the gradients, which are then dropped."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        for weights, momentum in zip(self._groups, self._momentum, strict=True):
            self._muon_step(weights, momentum, rate)

    @torch.no_grad()
    def _muon_step(self, weights: list[nn.Parameter], momentum: torch.Tensor, rate: float) -> None:
        gradients = _stack([weight.grad for weight in weights if weight.grad is not None])
        momentum.lerp_(gradients, 1 - MOMENTUM)
        update = orthogonal(gradients.lerp(momentum, MOMENTUM)).float()
        update *= RMS * max(update.shape[-2:]) ** 0.5
        for weight, part in zip(weights, update, strict=True):
            weight.mul_(1 - rate * self._weight_decay)
            weight.sub_(part.t() if weight.shape != part.shape else part, alpha=rate)
            weight.grad = None

    def state(self) -> dict[str, Any]:
        return {"adamw": self._adamw.state_dict(), "momentum": self._momentum}

    def load(self, state: dict[str, Any]) -> None:
        self._adamw.load_state_dict(state["adamw"])
        for mine, saved in zip(self._momentum, state["momentum"], strict=True):
            mine.copy_(saved)


def _stack(weights: list[Any]) -> torch.Tensor:
    """[n, rows, columns], rows <= columns."""
    return torch.stack(
        [weight.detach().t() if weight.shape[0] > weight.shape[1] else weight.detach() for weight in weights]
    )


def orthogonal(stack: torch.Tensor) -> torch.Tensor:
    """Nearly the orthogonal factor of each matrix of [n, rows, columns], rows <= columns, as bf16."""
    a, b, c = COEFFICIENTS
    stack = stack.bfloat16()
    x: torch.Tensor = stack / (stack.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
