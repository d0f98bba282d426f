"""Plays scripts with a `TailAttention`, all contexts a token at a time, and compares it with the product's module.

`play` gives what `SuitePlayer.play` gives. `compare` runs the product's module on the same queries, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from suite_player import Performance, Script, SuitePlayer
from tail_attention import TailAttention

from vashista.engine.messages import AttentionMode
from vashista.engine.models.decoder import Decoder
from vashista.engine.scheduler import Batch, BatchItem
from vashista.engine.step import Selection, StepInput
from vashista.engine.support import SpanSupport


@torch.inference_mode()
def play(model: Decoder, attention: TailAttention, scripts: Sequence[Script]) -> list[Performance]:
    """Every script from its start to its end, attention as it is set."""
    device = model.embedding.device
    last = torch.tensor([len(script.token_ids) - 1 for script in scripts], device=device)
    most = torch.tensor([script.max_tokens for script in scripts], device=device)
    prompts = torch.zeros(len(scripts), int(last.max()) + 2, dtype=torch.int64)
    for row, script in enumerate(scripts):
        prompts[row, : len(script.token_ids)] = torch.tensor(script.token_ids)
    prompts = prompts.to(device)
    at = torch.tensor([script.start for script in scripts], device=device)
    end = torch.where(most > 0, last + most - 1, last - 1)  # of the last step's token
    token, rows = prompts[torch.arange(len(scripts), device=device), at], torch.arange(len(scripts), device=device)
    best, logprobs, places = [], [], []
    for _ in range(int((end - at).max()) + 1):
        attention.begin(at, *model.rotary(at))
        logits = model.logits(model.through_layers(token, attention))  # type: ignore[arg-type]
        following = prompts[rows, (at + 1).clamp(max=prompts.shape[1] - 1)]
        chosen = logits.argmax(1)
        best.append(chosen)
        logprobs.append(logits.log_softmax(1).gather(1, following[:, None]).squeeze(1))
        places.append(at)
        goes_on = at < end
        token = torch.where(goes_on, torch.where(at < last, following, chosen), token)
        at = at + goes_on
    found = [torch.stack(x).T.tolist() for x in (best, logprobs, places)]
    return [_performance(script, *own) for script, *own in zip(scripts, *found, strict=True)]


def _performance(script: Script, best: list[int], logprobs: list[float], places: list[int]) -> Performance:
    """A context that is at its end stays there while others go on: of each place the first step counts."""
    made = Performance()
    num_tokens = len(script.token_ids)
    for index, place in enumerate(places):
        if index and places[index - 1] == place:
            break
        if script.max_tokens and place >= num_tokens - 1:
            made.token_ids.append(best[index])
        if num_tokens - script.num_scored <= place + 1 < num_tokens:
            made.logprobs.append(logprobs[index])
    return made


class _Compared:
    """The product's attention, with another one beside it that sees the same; satisfies `Attention` for `execute`."""

    def __init__(self, player: SuitePlayer, own: TailAttention) -> None:
        self.inner, self.own = player.runner.attention, own
        self.name = self.inner.name
        self.errors: list[torch.Tensor] = []

    def begin(self, step: StepInput, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self.inner.begin(step, cos, sin)
        self.own.begin(step.positions, cos, sin)

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        own = self.own.forward(layer, qkv.clone()).float()
        out = self.inner.forward(layer, qkv)
        size = (qkv.shape[0], self.own.shape.num_heads, -1)
        difference, norm = ((x.view(size)).norm(dim=2) for x in (out.float() - own, own))
        self.errors.append(difference / norm)
        return out

    def take_support(self) -> list[SpanSupport]:
        return self.inner.take_support()


@torch.inference_mode()
def compare(player: SuitePlayer, own: TailAttention, budget: int, num_steps: int = 3) -> torch.Tensor:
    """[steps and layers, num_contexts, num_heads]: relative differences of the product's results from ours.

    The first tokens of all scripts, attended to with the budget by the product and by `own`, which is set likewise.
    """
    policy = [player._policy.start(AttentionMode(token_budget=budget)) for _ in player._scripts]
    requests = [player._request(index) for index in range(len(player._scripts))]
    beside = _Compared(player, own)

    def select(item: BatchItem) -> Selection | None:
        return policy[int(item.request.id)].select(item.end)

    player.runner.attention = beside  # type: ignore[assignment]
    try:
        for step in range(num_steps):
            items = [BatchItem(request, script.start + step, 1)
                     for request, script in zip(requests, player._scripts, strict=True)]  # fmt: skip
            player.runner.execute(Batch(items), lambda item: True, select)
    finally:
        player.runner.attention = beside.inner
    return torch.stack(beside.errors)
