"""What is measured for docs/paper.md on a model: support, hull, leakage, criterion, step times. `run.py` calls it.

The model reads passages of the bundled sample text (or of a file), and every part takes what it needs on the way. The
result is plain data for `results.py`, rounded to five digits, so that the document can be written again without a
model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from suite_player import Script, SuitePlayer
from tqdm import tqdm

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
)
from vashista.engine.calibrate import CalibrationPlan, SupportTaker
from vashista.engine.config import EngineConfig
from vashista.engine.diagnose import DiagnosisPlan, diagnose_heads
from vashista.engine.engine import Engine
from vashista.engine.messages import DENSE, AttentionMode, SamplingParams, Submit
from vashista.engine.model_config import ModelConfig, load_model_config
from vashista.engine.passage_run import PassageRun
from vashista.engine.sample_text import SampleTokens, read_sample_text, spread_positions
from vashista.engine.support_profile import Rule
from vashista.engine.tokenizer import Tokenizer

TEMPERATURES = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Of softmax attention, as multiples of the one that the model attends with."""
NUM_WARM_STEPS = 8


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    contexts: Sequence[int]
    """Ascending; the hull and the criterion are looked at with the last one, or `hull_context`."""
    hull_context: int
    passages: int = 2
    positions: int = 16
    hull_positions: int = 2
    tokens: int = 256
    """Whose likeliest successor is compared with that of full attention."""
    steps: int = 100
    """Decode steps that are timed for each context and mode."""
    token_budget: int = 1024


def measure(config: EngineConfig, plan: Plan, text: Path | None, parts: Sequence[str]) -> dict[str, Any]:
    """The parts by name (`run.PARTS`). Raises the engine's errors."""
    model_config = load_model_config(config.model_dir)
    tokens = SampleTokens(read_sample_text(text), Tokenizer.load(config.model_dir, model_config.vocab_size))
    longest = plan.contexts[-1] + plan.steps + NUM_WARM_STEPS + 8
    config = msgspec.structs.replace(config, max_context=min(longest, model_config.max_position_embeddings))
    passages = tokens.passages(plan.passages, plan.contexts[-1])
    found: dict[str, Any] = {}
    if "support" in parts:
        found["support"] = _support(config, model_config, plan, passages)
    if "heads" in parts:
        [passage] = tokens.passages(1, plan.hull_context)
        found["heads"] = _heads(config, model_config, plan, passage)
    if "tokens" in parts:
        context, budget = plan.contexts[-1], plan.token_budget
        found["tokens"] = {
            "context": context,
            "token_budget": budget,
            "rows": list(_tokens(config, plan, passages)),
        }
    if "times" in parts:
        found["times"] = {"rows": _times(config, plan, passages[0])}
    rounded: dict[str, Any] = _rounded(found)
    return rounded


def _support(
    config: EngineConfig, model_config: ModelConfig, plan: Plan, passages: Sequence[list[int]]
) -> dict[str, Any]:
    """Tokens of 90 and 99 % of the mass: medians and 90th percentiles of each (layer, KV head, context)."""
    wanted = CalibrationPlan(list(plan.contexts), plan.positions)
    taker = SupportTaker(wanted, model_config)
    run = PassageRun(msgspec.structs.replace(config, attention="dense"), model_config, taker.observe)
    with tqdm(total=sum(map(len, passages)), unit="token", desc="support", disable=None) as bar:
        for passage in passages:
            run.read(passage, taker.positions, bar.update)
    names = ("tokens_90_median", "tokens_90_p90", "tokens_99_median", "tokens_99_p90", "effective_median")
    stats = [
        [[{name: getattr(s, name) for name in names} for s in head] for head in layer] for layer in taker.support()
    ]
    return {"contexts": list(plan.contexts), "queries": plan.positions * plan.passages, "heads": stats}


def _heads(config: EngineConfig, model_config: ModelConfig, plan: Plan, passage: list[int]) -> dict[str, Any]:
    """Of each captured query head: the hull with its relaxation, and softmax attention at several temperatures."""
    rows: list[dict[str, Any]] = []
    scale = model_config.head_dim**-0.5
    wanted = DiagnosisPlan(range(model_config.num_layers), [], token_budget=plan.token_budget)
    positions = spread_positions(len(passage), plan.hull_positions)
    total = len(positions) * model_config.num_layers * model_config.num_heads
    with tqdm(total=total, unit="head", desc="hull", disable=None) as bar:

        def observe(seen: Captured) -> None:
            leaks = list(_leakage(seen, plan.token_budget, scale))
            for head, leak in zip(diagnose_heads(seen, wanted, scale), leaks, strict=True):
                rows.append(_head_row(head) | {"leakage": leak})
                bar.update()

        run = PassageRun(msgspec.structs.replace(config, attention="dense"), model_config, observe)
        run.read(passage, positions)
    return {"context": len(passage), "token_budget": plan.token_budget, "scale": scale, "rows": rows}


def _head_row(head: Any) -> dict[str, Any]:
    hull, theorem = head.hull, head.hull.theorem
    row = {"layer": head.layer, "head": head.head, "kv_head": head.kv_head, "num_keys": head.num_keys,
           "is_inside": hull.is_inside, "is_solved": hull.is_solved, "face": hull.face_size, "gap": hull.support_gap,
           "log_bound_of_model": hull.log_bound_of_model, "dropped": head.softmax.dropped_mass,
           "bound": head.softmax.dropped_mass_bound, "softmax_gap": head.softmax.support_gap}  # fmt: skip
    if theorem is None:
        return row | {"theorem": None}
    points = [{"eps": p.eps, "displacement": p.displacement, "log_leakage": p.log_leakage, "log_bound": p.log_bound,
               "in_regime": p.in_regime} for p in theorem.relaxed]  # fmt: skip
    found = {"points": points, "exponent": theorem.exponent, "slope": theorem.linear_slope,
             "constant": theorem.linear_constant, "predicted": theorem.predicted_constant}  # fmt: skip
    return row | {"theorem": found}


def _leakage(seen: Captured, token_budget: int, scale: float) -> Iterator[list[dict[str, float]]]:
    """Of each query head: what the kept groups leave out at each temperature, exactly, with gap, bound and estimate."""
    q, keys = seen.query.double(), seen.keys.double()
    groups = Groups(keys.shape[1], seen.first)
    scores = group_scores(Rule.MEAN_VARIANCE, q, keys, scale, groups)
    kept = keep(scores, token_budget, groups, NUM_SINKS, NUM_RECENT)
    logits = logits_of(q, keys, scale)
    estimate = scores.masked_fill(kept, -math.inf).logsumexp(1).repeat_interleave(q.shape[0] // keys.shape[0])
    tokens = kept[:, groups.of_tokens(kept.device)].repeat_interleave(q.shape[0] // keys.shape[0], 0)
    log_kept = logits.masked_fill(~tokens, -math.inf).logsumexp(1)
    columns = []
    for temperature in TEMPERATURES:
        tau = dropped_mass(logits / temperature, kept, groups)
        gap, bound = support_gap(logits / temperature, kept, groups)
        columns.append((tau.tolist(), gap.tolist(), bound.tolist()))
    shares = torch.sigmoid(estimate - log_kept).tolist()
    for head in range(q.shape[0]):
        yield [
            {"eps": eps, "dropped": tau[head], "gap": gap[head], "bound": bound[head], "estimate": shares[head]}
            for eps, (tau, gap, bound) in zip(TEMPERATURES, columns, strict=True)
        ]


def _tokens(config: EngineConfig, plan: Plan, passages: Sequence[list[int]]) -> Iterator[dict[str, Any]]:
    """Of each played token: what its step left out, by gap, estimate and audit, and whether its successor changed."""
    num_played = min(plan.tokens // len(passages), plan.contexts[-1] // 2)
    config = msgspec.structs.replace(config, attention="vashista", max_running_requests=len(passages))
    player = SuitePlayer(config, audit_rate=1.0)
    heads = player.runner.attention_shape.num_layers * player.runner.attention_shape.num_kv_heads
    scripts = [Script(p, len(p) - num_played - 1, len(p) - num_played - 1, num_scored=num_played) for p in passages]
    with tqdm(total=sum(script.start for script in scripts), unit="token", desc="criterion", disable=None) as bar:
        player.read(scripts, bar.update)
    dense = player.play(DENSE)
    sparse = player.play(AttentionMode(token_budget=plan.token_budget))
    for full, part in zip(dense, sparse, strict=True):
        for best, other, step in zip(full.best, part.best, part.steps, strict=True):
            if step is None or step.num_dense == heads:
                continue
            num_sparse = heads - step.num_dense
            yield {
                "changed": best != other,
                "gap": step.support_gap / num_sparse,
                "estimate": step.dropped_mass_estimate / heads,
                "bound": step.dropped_mass_bound / heads,
                "dropped": sum(audit.dropped_mass for audit in step.audits) / heads,
            }


def _times(config: EngineConfig, plan: Plan, passage: list[int]) -> list[dict[str, Any]]:
    """Seconds of single decode steps of one request, in the order in which they were taken."""
    engine = Engine(msgspec.structs.replace(config, attention="vashista", max_running_requests=1, dense_below=0))
    assert engine.ready.max_context is not None
    rows = []
    num_tokens = plan.steps + NUM_WARM_STEPS
    for context in tqdm(plan.contexts, desc="step times", disable=None):
        prompt = passage[: min(context, engine.ready.max_context - num_tokens)]
        for mode in (DENSE, AttentionMode(token_budget=plan.token_budget)):
            seconds = _decode(engine, prompt, num_tokens, mode)
            rows.append({"context": context, "token_budget": mode.token_budget, "seconds": seconds[-plan.steps :]})
    return rows


def _decode(engine: Engine, prompt: list[int], num_tokens: int, mode: AttentionMode) -> list[float]:
    """Of the steps behind the prompt."""
    sampling = SamplingParams(seed=0, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    engine.submit(Submit("paper", prompt, sampling, arrival_s=0.0, attention=mode))
    seconds = []
    while engine.has_work:
        started_s = time.perf_counter()
        events = engine.step()
        if any(event.token_ids for event in events):
            seconds.append(time.perf_counter() - started_s)
    return seconds


def _rounded(value: Any) -> Any:
    """Five digits; what is no number becomes null."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
