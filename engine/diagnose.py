"""Takes a running model's queries and keys and puts the theory to the test; the work behind `vashista diagnose`.

For each captured query head two statements, never mixed up (DESIGN: one is no certificate for the other):

- the hull: the query's projection onto the convex hull of the keys that it sees, its active face and support gap, and
  the theorem on the entropic relaxation, measured over a range of eps (`engine/hull.py`, `engine/relaxation.py`);
- the softmax: what the selection rule keeps with a budget, the support gap of that, the dropped mass and its bound
  (`engine/attention/rules.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from vashista.engine.attention.capture import Captured
from vashista.engine.attention.rules import (
    NUM_RECENT,
    NUM_SINKS,
    Groups,
    dropped_mass,
    group_scores,
    keep,
    logits_of,
    support_gap,
    support_of,
)
from vashista.engine.config import EngineConfig
from vashista.engine.hull import project
from vashista.engine.model_config import ModelConfig
from vashista.engine.passage_run import PassageRun
from vashista.engine.relaxation import TheoremCheck, check_theorem
from vashista.engine.runner import Progress
from vashista.engine.support_profile import Rule


class HullCheck(msgspec.Struct, frozen=True, kw_only=True):
    """The paper's object for one query head. Lengths in units of the keys; numbers that do not exist are null."""

    distance: float
    """From the query to the hull."""
    distance_low: float
    """The distance is certainly at least this."""
    accuracy: float
    """The projection is certainly nearer than this to the true one."""
    radius: float
    """From the query to the farthest key."""
    is_inside: bool
    """The query lies in the hull: no key is inactive, there is no support gap."""
    is_solved: bool
    face_size: int
    """Keys on the active face."""
    support_gap: float
    """Delta, the least KKT multiplier off the face."""
    log_bound_of_model: float
    """Log of the theorem's leakage bound at the temperature that the model attends with; above 0 it says nothing."""
    theorem: TheoremCheck | None


class SoftmaxCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Softmax attention of one query head with a token budget."""

    tokens_kept: int
    dropped_mass: float
    """Exact."""
    support_gap: float
    """log Z_S - max over D of s, nats; null where nothing is dropped."""
    dropped_mass_bound: float
    """What the support gap proves."""
    effective_support: float
    tokens_90: float
    tokens_99: float


class HeadDiagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """One query head at one position."""

    layer: int
    head: int
    kv_head: int
    position: int
    num_keys: int
    hull: HullCheck
    softmax: SoftmaxCheck


@dataclass(frozen=True)
class DiagnosisPlan:
    """What to look at."""

    layers: Collection[int]
    positions: Sequence[int]
    rule: Rule = Rule.MEAN_VARIANCE
    token_budget: int = 1024


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """All that `vashista diagnose` writes as JSON."""

    model_dir: str
    device: str
    dtype: str
    context: int
    rule: Rule
    token_budget: int
    heads: list[HeadDiagnosis]


def diagnose(
    config: EngineConfig,
    model_config: ModelConfig,
    plan: DiagnosisPlan,
    token_ids: list[int],
    on_loaded: Progress | None = None,
    on_head: Callable[[], None] = lambda: None,
) -> Diagnosis:
    """Run the model over one passage of config.max_context tokens and take apart every query head of the plan.

    `on_head` is called after each head. Raises the engine's errors of a start.
    """
    heads: list[HeadDiagnosis] = []
    scale = model_config.head_dim**-0.5

    def observe(seen: Captured) -> None:
        if seen.layer in plan.layers:
            for head in diagnose_heads(seen, plan, scale):
                heads.append(head)
                on_head()

    run = PassageRun(config, model_config, observe, on_loaded)
    run.read(token_ids, plan.positions)
    return Diagnosis(
        model_dir=config.model_dir,
        device=run.runner.device_name,
        dtype=str(run.runner.dtype).removeprefix("torch."),
        context=len(token_ids),
        rule=plan.rule,
        token_budget=plan.token_budget,
        heads=heads,
    )


def diagnose_heads(seen: Captured, plan: DiagnosisPlan, scale: float) -> Iterator[HeadDiagnosis]:
    """One query head after the other, as they are done."""
    num_kv_heads, num_keys, _ = seen.keys.shape
    num_heads = seen.query.shape[0]
    for head, softmax in enumerate(_check_softmax(seen, plan, scale)):
        kv_head = head * num_kv_heads // num_heads
        yield HeadDiagnosis(
            layer=seen.layer,
            head=head,
            kv_head=kv_head,
            position=seen.position,
            num_keys=num_keys,
            hull=_check_hull(seen, head, kv_head, scale),
            softmax=softmax,
        )


def _check_hull(seen: Captured, head: int, kv_head: int, scale: float) -> HullCheck:
    q, keys = seen.query[head].double().cpu().numpy(), seen.keys[kv_head].double().cpu().numpy()
    found = project(q, keys)
    num_inactive = len(keys) - len(found.face)
    # Softmax attention is eps = 1 on logits scale * q.k, which is eps = 1 / scale on q.k.
    log_bound = math.log(num_inactive) - found.support_gap * scale / 2 if num_inactive else math.nan
    return HullCheck(
        distance=found.distance,
        distance_low=found.distance_low,
        accuracy=found.accuracy,
        radius=found.radius,
        is_inside=found.is_inside,
        is_solved=found.is_solved,
        face_size=len(found.face),
        support_gap=found.support_gap,
        log_bound_of_model=log_bound,
        theorem=check_theorem(q, keys, found),
    )


def _check_softmax(seen: Captured, plan: DiagnosisPlan, scale: float) -> list[SoftmaxCheck]:
    """Of every query head."""
    q, keys = seen.query.double(), seen.keys.double()
    groups = Groups(keys.shape[1], seen.first)
    logits = logits_of(q, keys, scale)
    kept = keep(group_scores(plan.rule, q, keys, scale, groups), plan.token_budget, groups, NUM_SINKS, NUM_RECENT)
    tau = dropped_mass(logits, kept, groups)
    gap, bound = support_gap(logits, kept, groups)
    support = support_of(logits)
    sizes = (kept * groups.sizes(kept.device)).sum(1).repeat_interleave(q.shape[0] // keys.shape[0])
    rows = zip(sizes.tolist(), tau.tolist(), gap.tolist(), bound.tolist(), strict=True)
    counts = zip(support.effective.tolist(), support.tokens_90.tolist(), support.tokens_99.tolist(), strict=True)
    return [
        SoftmaxCheck(
            tokens_kept=kept_tokens,
            dropped_mass=mass,
            support_gap=nats,
            dropped_mass_bound=limit,
            effective_support=effective,
            tokens_90=tokens_90,
            tokens_99=tokens_99,
        )
        for (kept_tokens, mass, nats, limit), (effective, tokens_90, tokens_99) in zip(rows, counts, strict=True)
    ]
