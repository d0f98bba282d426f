"""Chooses the next token of each request from its logits.

Order of operations, the same for every request whatever runs beside it: logit_bias, forbidden tokens (min_tokens and
grammar), repetition, presence and frequency penalties, then temperature, min_p, top_k, top_p, then one draw. The draw
depends on the probabilities, the seed and the index of the output token alone, so that a request with a seed gives the
same tokens alone, in a batch and after a preemption, as far as its logits are the same: a difference in their last bits
changes a draw only where two tokens race to within those bits, about as rarely as it changes a greedy choice.
Reported log probabilities are those of the model's raw logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b

import torch

from vashista.engine.messages import SamplingParams, TokenLogprobs
from vashista.engine.step import to_device


@dataclass(slots=True)
class SamplingRow:
    """What the sampler must know of one request in one step."""

    sampling: SamplingParams
    token_ids: list[int]
    """Prompt and output; the request's own list, copied only where a penalty needs a part of it."""
    num_prompt_tokens: int
    forbidden_token_ids: list[int]
    """Ids masked because fewer than min_tokens are there."""
    allowed: torch.Tensor | None = None
    """[vocab_size] bool on the device, the grammar's mask; None allows everything."""

    @property
    def num_output_tokens(self) -> int:
        """Index of the token to draw among the output's."""
        return len(self.token_ids) - self.num_prompt_tokens


def sample(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    """One token a row, or -1 where no token is possible (all masked, or the model gave NaN). Waits for the device.

    logits: [len(rows), vocab_size], float32; overwritten.
    """
    chosen: list[int] = choose(logits, rows).tolist()
    return chosen


@torch.inference_mode()
def choose(logits: torch.Tensor, rows: list[SamplingRow]) -> torch.Tensor:
    """The same as [len(rows)], int64, on the device of the logits, without waiting for it, unless penalties do."""
    for place, row in enumerate(rows):
        if _is_shaped(row):
            _shape(logits[place], row)
    drawn = [place for place, row in enumerate(rows) if row.sampling.temperature > 0]
    if logits.device.type == "cpu" and not drawn:
        return _best_on_cpu(logits)
    best, tokens = logits.max(-1)
    if drawn:
        index = to_device(drawn, logits.device)
        tokens[index] = _draw(logits[index], [rows[i] for i in drawn])
    return torch.where(best.isfinite(), tokens, -1)


def _best_on_cpu(logits: torch.Tensor) -> torch.Tensor:
    """The most probable token of each row, the first of several, or -1. numpy takes a third of torch.max's time."""
    chosen = []
    for row in logits.numpy():
        token = int(row.argmax())  # a NaN counts as the largest, as for torch
        chosen.append(token if math.isfinite(row[token]) else -1)
    return torch.tensor(chosen)


@torch.inference_mode()
def log_probabilities(logits: torch.Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    """Raw log probability, rank and `num_top` best alternatives at each row.

    logits: [len(token_ids), vocab_size], float32, as the model gave them.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, to_device(token_ids, logits.device).unsqueeze(1))
    ranks = (logprobs > chosen).sum(-1) + 1
    values, indices = (x.tolist() for x in logprobs.topk(min(max(num_top), logprobs.shape[-1]), dim=-1))
    columns = zip(token_ids, chosen[:, 0].tolist(), ranks.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, rank, list(zip(indices[i][: num_top[i]], values[i][: num_top[i]], strict=True)))
        for i, (token, logprob, rank) in enumerate(columns)
    ]


def exponentials(rows: list[SamplingRow], vocab_size: int, device: torch.device) -> torch.Tensor:
    """[len(rows), vocab_size], float64: exponentially distributed numbers, from seed, index and token id alone.

    The same on every device: 32-bit integer mixing (lowbias32 of C. Wellons' hash-prospector) of the token id with 64
    bits that BLAKE2 makes of the seed and the index of the output token.
    """
    words = [_seed_words(row.sampling.seed, row.num_output_tokens) for row in rows]
    keys = to_device(words, device)
    mixed = _mix(torch.arange(vocab_size, device=device) ^ keys[:, :1])
    mixed = _mix(mixed ^ keys[:, 1:])
    return mixed.double().add_(0.5).mul_(2.0**-32).log_().neg_()


def _seed_words(seed: int, index: int) -> tuple[int, int]:
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers that changes half of the bits for any change of one, in place.

    x: int64, 0 to 2^32 - 1.
    """
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(0xFFFFFFFF)
    x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(0xFFFFFFFF)
    return x.bitwise_xor_(x >> 16)


def _is_shaped(row: SamplingRow) -> bool:
    s = row.sampling
    return bool(
        s.logit_bias
        or row.forbidden_token_ids
        or row.allowed is not None
        or s.repetition_penalty != 1.0
        or s.presence_penalty
        or s.frequency_penalty
    )


def _shape(logits: torch.Tensor, row: SamplingRow) -> None:
    """Apply bias, masks and penalties to one row in place. logits: [vocab_size]."""
    s, device = row.sampling, logits.device
    if s.logit_bias:
        ids = to_device(list(s.logit_bias), device)
        logits[ids] += to_device(list(s.logit_bias.values()), device, logits.dtype)
    if row.forbidden_token_ids:
        logits[to_device(row.forbidden_token_ids, device)] = -torch.inf
    if row.allowed is not None:
        logits.masked_fill_(~row.allowed, -torch.inf)
    if s.repetition_penalty != 1.0:
        seen = to_device(row.token_ids, device).unique()
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and row.num_output_tokens:
        output = to_device(row.token_ids[row.num_prompt_tokens :], device)
        ids, counts = output.unique(return_counts=True)
        logits[ids] -= s.presence_penalty + s.frequency_penalty * counts.to(logits.dtype)


def _draw(logits: torch.Tensor, rows: list[SamplingRow]) -> torch.Tensor:
    """Draw one token a row. logits: [len(rows), vocab_size]; -> [len(rows)], int64."""

    def column(values: list[float]) -> torch.Tensor:
        return to_device(values, logits.device, logits.dtype).unsqueeze(1)

    # The maximum is subtracted first, and the factor kept finite, so that no temperature gives infinity times zero.
    factors = [min(1.0 / row.sampling.temperature, 1e30) for row in rows]
    scaled = (logits - logits.amax(-1, keepdim=True)) * column(factors)
    probabilities = torch.softmax(scaled, dim=-1).nan_to_num_(0.0)
    if any(row.sampling.min_p for row in rows):
        floor = probabilities.amax(-1, keepdim=True) * column([row.sampling.min_p for row in rows])
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    cut = [i for i, row in enumerate(rows) if row.sampling.top_k or row.sampling.top_p < 1.0]
    if cut:
        index = to_device(cut, logits.device)
        probabilities[index] = _cut_tail(probabilities[index], [rows[i] for i in cut])
    # An exponential race: the winner is distributed as the probabilities, and rounding in one token's probability
    # only matters where that token is about to win, unlike in the inverse of the cumulative distribution.
    return (probabilities.double() / exponentials(rows, logits.shape[-1], logits.device)).argmax(-1)


def _cut_tail(probabilities: torch.Tensor, rows: list[SamplingRow]) -> torch.Tensor:
    """Keep the top_k most probable tokens, then the fewest of them that hold top_p of what is left. At least one."""
    vocab_size = probabilities.shape[-1]
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(vocab_size, device=probabilities.device)
    top_k = to_device([row.sampling.top_k or vocab_size for row in rows], probabilities.device)
    ordered = ordered.masked_fill(places >= top_k.unsqueeze(1), 0.0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered
    top_p = to_device([row.sampling.top_p for row in rows], ordered.device, ordered.dtype)
    cut = (before >= top_p.unsqueeze(1)) & (top_p < 1.0).unsqueeze(1)
    cut[:, 0] = False
    return torch.zeros_like(probabilities).scatter_(1, order, ordered.masked_fill(cut, 0.0))
