"""Rules by which groups of 16 tokens, or tokens, could be ranked for a query: what `rules.py` tries.

A `Candidate` says how each query head scores each group from what it keeps of the group's keys (nats, an estimate of
the log of the group's mean mass), how the heads of a query group agree on one ranking, and what it costs. Plain torch,
any device, one request at a time. Shapes, with g query heads a KV head and n queries:

    q       [num_kv_heads, g, n, head_dim], float32, already times the scale
    keys    [num_kv_heads, num_groups, 16, head_dim], float32, the last group filled up with its last key
    scores  [num_kv_heads, g, n, num_groups], or [..., num_groups * 16] where tokens are ranked

How heads agree:  max    the largest score (what the kernels do)
                  sum    log of the sum of exponentials: of the masses, unscaled
                  share  the largest score less the head's own log of all mass: the largest share of its attention
                  shares log of the sum of those shares
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

GROUP_TOKENS = 16
STEP_BYTES = 16
"""Beside a group's codes, as in the kernels: steps and radius."""
VARIANCES = torch.tensor([0, 3, 10, 23, 41, 65, 93, 127.0]) / 127
"""What the kernels' 3-bit codes of a variance mean, as shares of the largest."""
FREEZING = math.sqrt(2 * math.log(GROUP_TOKENS))
"""Deviations past which the largest of 16 Gaussian logits holds all mass, so that the log grows by a straight line."""

Scores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """One rule."""

    name: str
    scores: Scores
    planes: float
    """Bytes of summary a group, as multiples of head_dim; codes of tokens count 16-fold."""
    kernel: str
    """What a kernel would need that is not there."""
    agree: str = "max"
    second: Scores | None = None
    """Ranks what the first ranking leaves of the budget."""
    second_share: float = 0.0
    pool: int = 0
    """Where not 0: so many times the budget's groups are candidates; the best of their tokens are kept, or of them."""
    pool_scores: Scores | None = None
    """What ranks the candidates' tokens; None: their exact logits."""
    pool_unit: int = 1
    """1: tokens of the candidates are kept; 16: whole groups."""
    ranks_tokens: bool = False
    steps: int = STEP_BYTES
    """Bytes beside a group's codes."""

    def summary_bytes(self, head_dim: int) -> float:
        """Bytes a token and KV head."""
        return (self.planes * head_dim + self.steps) / GROUP_TOKENS

    def tokens_read(self, budget: int) -> float:
        """Tokens of which a kernel would read key and value; a key alone counts half."""
        return budget * (1 + self.pool) / 2 if self.pool and self.pool_scores is None else budget


def dot(q: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """planes: [num_kv_heads, num_groups, head_dim] -> scores."""
    return q @ planes.transpose(1, 2).unsqueeze(1)


def moments(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each dimension: [num_kv_heads, num_groups, head_dim] each."""
    mean = keys.mean(2)
    return mean, (keys - mean.unsqueeze(2)).square().mean(2)


def deviations(q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits' mean and variance, the keys' dimensions taken as independent."""
    mean, variance = moments(keys)
    return dot(q, mean), dot(q.square(), variance)


def cumulant(q: torch.Tensor, keys: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """mean + factor * variance / 2."""
    mean, variance = deviations(q, keys)
    return mean + factor / 2 * variance


def mean_deviation(q: torch.Tensor, keys: torch.Tensor, factor: float) -> torch.Tensor:
    """mean + factor * standard deviation."""
    mean, variance = deviations(q, keys)
    return mean + factor * variance.sqrt()


def frozen(q: torch.Tensor, keys: torch.Tensor, border: float = FREEZING) -> torch.Tensor:
    """mean + half variance, going on straight where the deviation is above `border`."""
    mean, variance = deviations(q, keys)
    return mean + grow(variance, border)


def grow(variance: torch.Tensor, border: float) -> torch.Tensor:
    """variance / 2 up to the border, then its tangent in the deviation."""
    deviation = variance.sqrt()
    return torch.where(deviation <= border, variance / 2, deviation * border - border**2 / 2)


def quantised(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """mean + half variance from codes of 8 and of 3 bits, as the GPU's kernels keep them."""
    mean, variance = moments(keys)
    return dot(q, coded(mean)) + dot(q.square(), coded_variance(variance)) / 2


def coded(plane: torch.Tensor) -> torch.Tensor:
    """A plane from 8-bit codes."""
    step = plane.abs().amax(-1, keepdim=True) / 127
    return (plane / step.clamp(min=1e-30)).round() * step


def coded_variance(variance: torch.Tensor) -> torch.Tensor:
    """A plane of variances from 3-bit codes, evenly spaced in the root."""
    most = variance.amax(-1, keepdim=True)
    code = ((variance / most.clamp(min=1e-30)).sqrt() * 7).round().long()
    return VARIANCES.to(variance.device)[code] * most


def box(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Quest's: the largest logit that a key inside the group's box could have."""
    return dot(q.clamp(min=0), keys.amax(2)) + dot(q.clamp(max=0), keys.amin(2))


def box_mean(q: torch.Tensor, keys: torch.Tensor, share: float) -> torch.Tensor:
    """A straight mix of box and mean + half variance."""
    return share * box(q, keys) + (1 - share) * cumulant(q, keys)


def soft_box(q: torch.Tensor, keys: torch.Tensor, factor: float, half: float = 0.0) -> torch.Tensor:
    """mean + factor * sum_d |q_d| deviation_d + half * variance: a box of the kept variances."""
    mean, variance = moments(keys)
    scores = dot(q, mean) + factor * dot(q.abs(), variance.sqrt())
    return scores + half * dot(q.square(), variance) if half else scores


def true_variance(q: torch.Tensor, keys: torch.Tensor, border: float = torch.inf) -> torch.Tensor:
    """mean + half the logits' own variance: the second cumulant without its diagonal shortcut; not a summary."""
    logits = exact(q, keys).unflatten(-1, (-1, GROUP_TOKENS))
    variance = logits.var(-1, correction=0)
    return logits.mean(-1) + (variance / 2 if border == torch.inf else grow(variance, border))


def farthest(q: torch.Tensor, keys: torch.Tensor, with_variance: bool) -> torch.Tensor:
    """The key farthest from the group's mean by itself, and mean (and half variance) of the others."""
    away = (keys - keys.mean(2, keepdim=True)).square().sum(-1)
    index = away.argmax(2)[..., None, None].expand(-1, -1, 1, keys.shape[-1])
    single = keys.gather(2, index).squeeze(2)
    n = GROUP_TOKENS
    mean = (keys.sum(2) - single) / (n - 1)
    rest = dot(q, mean)
    if with_variance:
        squares = (keys - mean.unsqueeze(2)).square()
        variance = (squares.sum(2) - squares.gather(2, index).squeeze(2)) / (n - 1)
        rest = rest + dot(q.square(), variance) / 2
    return torch.logaddexp(dot(q, single), rest + math.log(n - 1)) - math.log(n)


def parts(q: torch.Tensor, keys: torch.Tensor, size: int, factor: float, border: float = torch.inf) -> torch.Tensor:
    """Summaries of `size` tokens, of which a group's log of mass is made."""
    num_kv_heads, num_groups, _, head_dim = keys.shape
    mean, variance = deviations(q, keys.reshape(num_kv_heads, -1, size, head_dim))
    mean += factor * (variance / 2 if border == torch.inf else grow(variance, border))
    return of_groups(mean.unflatten(-1, (num_groups, -1)))


def of_groups(logits: torch.Tensor) -> torch.Tensor:
    """Log of the mean exponential over the last dimension."""
    return logits.logsumexp(-1) - math.log(logits.shape[-1])


def exact(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Every token's logit."""
    return dot(q, keys.flatten(1, 2))


def oracle(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The log of each group's mass, exact."""
    return of_groups(exact(q, keys).unflatten(-1, (-1, GROUP_TOKENS)))


def codes(q: torch.Tensor, keys: torch.Tensor, bits: int, of_tokens: bool = False) -> torch.Tensor:
    """From codes of each key's difference to the group's mean: `bits` a number, one step a token."""
    mean = keys.mean(2, keepdim=True)
    rest = keys - mean
    if bits == 1:
        told = rest.sign() * rest.abs().mean(-1, keepdim=True)
    else:
        # The step that is best for a Gaussian and 2 bits; for more bits, one that loses no outlier.
        half = 2 ** (bits - 1)
        step = rest.square().mean(-1, keepdim=True).sqrt() if bits == 2 else rest.abs().amax(-1, keepdim=True) / half
        told = ((rest / step.clamp(min=1e-30)).floor().clamp(-half, half - 1) + 0.5) * step
    logits = exact(q, mean + told)
    return logits if of_tokens else of_groups(logits.unflatten(-1, (-1, GROUP_TOKENS)))


def position(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The newest first."""
    places = torch.arange(keys.shape[1], device=keys.device, dtype=q.dtype)
    return places.expand(*q.shape[:3], -1)


NONE, SHARE = "nothing", "a second pass over scores kept by head"
BOTH, SINGLE = "three planes", "reads the candidates' keys, selects once more, gathers single tokens"
AGAIN, CODES = "reads the candidates' keys, selects once more", "16 times the products, over more bytes"
TWICE = "a pass over codes of the candidates, a second selection, a gather of single tokens"
_CV, _TOKEN_STEPS = 1.5, STEP_BYTES + 2 * GROUP_TOKENS
_codes4, _codes2, _codes1 = (partial(codes, bits=bits) for bits in (4, 2, 1))
_tokens4, _tokens2 = (partial(codes, bits=bits, of_tokens=True) for bits in (4, 2))
_all_keys = partial(Candidate, planes=32, kernel="all keys read", steps=0)
_refined = partial(Candidate, scores=cumulant, planes=_CV)
CANDIDATES = [
    Candidate("mean + 1/2 variance", cumulant, _CV, NONE),
    Candidate("mean", partial(cumulant, factor=0.0), 1, NONE),
    Candidate("box", box, 2, NONE),
    _all_keys("oracle: groups", oracle),
    Candidate("mean + 1/2 variance; share", cumulant, _CV, SHARE, agree="share"),
    Candidate("mean + 1/2 variance; shares", cumulant, _CV, SHARE, agree="shares"),
    Candidate("mean + 1/2 variance; sum", cumulant, _CV, NONE, agree="sum"),
    _refined("cumulant, tokens of 2x", kernel=SINGLE, pool=2),
    _refined("cumulant, tokens of 4x", kernel=SINGLE, pool=4),
    _refined("cumulant, tokens of 2x; shares", kernel=SINGLE, agree="shares", pool=2),
    _refined("cumulant, tokens of 4x; shares", kernel=SINGLE, agree="shares", pool=4),
    _refined("cumulant, groups of 2x", kernel=AGAIN, pool=2, pool_unit=16),
    _refined("cumulant, groups of 4x", kernel=AGAIN, pool=4, pool_unit=16),
    Candidate("mean + 2 deviations", partial(mean_deviation, factor=2), _CV, "a root"),
    Candidate("mean + 1/4 variance", partial(cumulant, factor=0.5), _CV, NONE),
    Candidate("1/2 variance, straight from 1.5", partial(frozen, border=1.5), _CV, "a root, a minimum"),
    Candidate("1/2 variance, straight from 2.35", frozen, _CV, "a root, a minimum"),
    Candidate("1/2 box, 1/2 cumulant", cumulant, 2.5, BOTH + ", two selections", second=box, second_share=0.5),
    Candidate("1/4 box, 3/4 cumulant", cumulant, 2.5, BOTH + ", two selections", second=box, second_share=0.25),
    Candidate("4-bit key codes, groups", _codes4, 9, CODES, steps=_TOKEN_STEPS),
    Candidate("4-bit key codes, tokens", _tokens4, 9, CODES, ranks_tokens=True, steps=_TOKEN_STEPS),
    _all_keys("oracle: tokens", exact, ranks_tokens=True),
    _all_keys("oracle: groups; shares", oracle, agree="shares"),
    _all_keys("oracle: tokens; shares", exact, agree="shares", ranks_tokens=True),
    Candidate("mean + 1/2 variance, 8 and 3 bits", quantised, _CV, NONE),
    Candidate("farthest key, mean of the others", partial(farthest, with_variance=False), 2, "a second mean plane"),
    Candidate("the same + 1/2 variance", partial(farthest, with_variance=True), 2.5, BOTH),
    Candidate("means of 8 + 1/2 variance", partial(parts, size=8, factor=1.0), 3, "units of 8", steps=32),
    Candidate("means of 8", partial(parts, size=8, factor=0.0), 2, "units of 8", steps=32),
    Candidate("means of 4 + 1/2 variance", partial(parts, size=4, factor=1.0), 6, "units of 4", steps=64),
    Candidate("2-bit key codes, groups", _codes2, 5, CODES, steps=_TOKEN_STEPS),
    Candidate("1-bit key codes, groups", _codes1, 3, CODES, steps=_TOKEN_STEPS),
    _all_keys("true variance of the logits", true_variance),
    Candidate("mean + 1 deviation", partial(mean_deviation, factor=1), _CV, "a root"),
    Candidate("mean + 3 deviations", partial(mean_deviation, factor=3), _CV, "a root"),
    Candidate("mean + variance", partial(cumulant, factor=2.0), _CV, NONE),
    Candidate("1/4 box + 3/4 cumulant, mixed", partial(box_mean, share=0.25), 2.5, BOTH),
    Candidate("mean + 1/4 sum |q| deviation", partial(soft_box, factor=0.25), _CV, "a third product"),
    _refined(
        "cumulant, tokens of 4x by 4 bits", planes=9.5, kernel=TWICE, pool=4, pool_scores=_tokens4, steps=_TOKEN_STEPS
    ),
    Candidate("window", position, 0, NONE, steps=0),
]
