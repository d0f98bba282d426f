"""Which rule keeps the right tokens: `python bench/quality/rules.py [--device cuda]`, an experiment.

Plays the sequences of `run.py` through the real model under every rule of `candidates.py` and several token budgets, in
plain torch and exact arithmetic, and prints a row as soon as it is known: codes recalled, change of the loss, dropped
mass of all head-steps, bytes of summary. Before anything is measured, questions are played token by token as well, and
must give what playing them at once gives. What was found: docs/sparse-attention.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass

import torch
from argument_kinds import listed, token_budget, whole
from candidates import CANDIDATES, Candidate
from checks import add_model, add_passages, check_model, least_context
from passages import Sequence, recall_sequences, text_sequences
from run import NUM_SCORED, conditions
from trial import Dropped, TrialAttention, TrialPlayer

from vashista.engine.config import EngineConfig
from vashista.engine.messages import AttentionMode
from vashista.engine.model_config import load_model_config
from vashista.engine.tokenizer import Tokenizer

LINE = "{:36} {:>5} {:>8} {:>8} {:>8} {:>7} {:>8} {:>7} {:>6} {:>6}"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Nats that a token's log probability may differ by between both ways of playing, on the mean."""


@dataclass
class Row:
    """One rule at one budget; None in full attention."""

    rule: str
    token_budget: int | None
    recall: float
    nll: float
    nll_change: float
    """As a share of dense's."""
    nll_change_error: float
    """Standard error of the change, tokens taken as independent."""
    dropped_worst: float
    dropped_mean: float
    summary_bytes: float
    """Of a token and KV head."""
    tokens_read: float
    """Of which key and value are read; a key alone counts half."""
    kernel: str


def main() -> None:
    """Print a row for each rule and budget."""
    options = parse()
    config = load_model_config(options.model)
    tokenizer = Tokenizer.load(options.model, config.vocab_size)
    texts = []
    if options.scored:
        texts = text_sequences(tokenizer, options.passages, options.context, options.scored)
        texts = [aligned(sequence) for sequence in texts]
    codes = recall_sequences(tokenizer, options.passages, options.context, options.questions, 64)
    played = [texts, codes] if texts else [codes]
    players = [make_player(options, sequences) for sequences in played]
    check(players[-1], codes[:4])
    dense = [player.play_at_once(sequences, None) for player, sequences in zip(players, played, strict=True)]
    nll, recall = loss(dense[0]), recalled(dense[-1])
    print(LINE.format("rule", "kept", "recall", "NLL", "change", "+-", "dropped", "mean", "bytes", "read"))
    print(LINE.format("dense", "all", f"{recall:.3f}", f"{nll:.4f}", "", "", "", "", "", ""), flush=True)
    rows = [Row("dense", None, recall, nll, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, "")]
    for index, rule in enumerate(CANDIDATES):
        if options.only and index not in options.only:
            continue
        for budget in options.budgets:
            start = time.perf_counter()
            rows.append(measure(players, played, rule, budget, torch.cat(dense[0])))
            show(rows[-1], time.perf_counter() - start)
            if options.json:
                report = {"conditions": conditions(options), "rows": [asdict(row) for row in rows]}
                options.json.write_text(json.dumps(report, indent=1))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, all of them usable. SystemExit with status 2 for others."""
    parser = argparse.ArgumentParser("rules.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add_model(parser)
    add_passages(parser)
    parser.add_argument("--context", type=whole(1), default=16384)
    parser.add_argument("--budgets", type=listed(token_budget), default=[256, 512, 1024])
    parser.add_argument("--scored", type=whole(0), default=NUM_SCORED,
                        help="tokens of each passage judged by their loss; 0 for none")  # fmt: skip
    parser.add_argument("--only", type=listed(whole(0, len(CANDIDATES) - 1), 0), default=[],
                        help="numbers of rules, counted from 0 in candidates.py")  # fmt: skip
    options = parser.parse_args(arguments)
    least = least_context(options.questions, options.scored)
    check_model(parser, options.model, options.device, [options.context], least)
    return options


def aligned(sequence: Sequence, page_size: int = 64) -> Sequence:
    """The same with a start at a page border."""
    start = sequence.start // page_size * page_size
    return Sequence(sequence.passage, sequence.token_ids, start, sequence.scored)


def make_player(options: argparse.Namespace, sequences: list[Sequence]) -> TrialPlayer:
    """A player that has read the passages."""
    config = EngineConfig(
        model_dir=options.model, device=options.device, dtype=options.dtype, attention="dense",
        max_context=options.context, kv_memory_fraction=0.3,
    )  # fmt: skip
    player = TrialPlayer(config, audit_rate=0.0)
    player.read(sequences, lambda num_tokens: None)
    runner = player.runner
    runner.attention = TrialAttention(runner.attention, runner.attention_shape)
    return player


def check(player: TrialPlayer, sequences: list[Sequence]) -> None:
    """SystemExit unless tokens played one at a time have the probabilities of those played at once."""
    trial(player).candidate = CANDIDATES[0]
    step_by_step, _ = player.play(sequences, AttentionMode(token_budget=256))
    at_once = player.play_at_once(sequences, 256)
    error = float((torch.cat(step_by_step) - torch.cat(at_once))[:, 0].abs().mean())
    print(f"played token by token and at once: log probabilities differ by {error:.2g} nats on the mean", flush=True)
    if not error <= TOLERANCE[player.runner.dtype]:
        raise SystemExit("both ways of playing must give the same")


def measure(
    players: list[TrialPlayer], played: list[list[Sequence]], rule: Candidate, budget: int, dense: torch.Tensor
) -> Row:
    """One row; loss and masses are those of the first set. dense: [num_tokens, 2], its scores in full attention."""
    scores, masses = [], []
    for player, sequences in zip(players, played, strict=True):
        attention = trial(player)
        attention.candidate, attention.dropped = rule, Dropped()
        scores.append(player.play_at_once(sequences, budget))
        masses.append(attention.dropped)
    nll, dense_nll = loss(scores[0]), loss([dense])
    differences = (dense - torch.cat(scores[0]))[:, 0]
    return Row(
        rule=rule.name,
        token_budget=budget,
        recall=recalled(scores[-1]),
        nll=nll,
        nll_change=nll / dense_nll - 1,
        nll_change_error=float(differences.std()) / len(differences) ** 0.5 / dense_nll,
        dropped_worst=float(masses[0].worst) / masses[0].num,
        dropped_mean=float(masses[0].mean) / masses[0].num,
        summary_bytes=rule.summary_bytes(players[0].runner.attention_shape.head_dim),
        tokens_read=rule.tokens_read(budget),
        kernel=rule.kernel,
    )


def trial(player: TrialPlayer) -> TrialAttention:
    attention = player.runner.attention
    assert isinstance(attention, TrialAttention)
    return attention


def loss(scores: list[torch.Tensor]) -> float:
    """Nats a token."""
    return -float(torch.cat(scores)[:, 0].mean())


def recalled(scores: list[torch.Tensor]) -> float:
    """The share of codes of which every digit was likeliest."""
    return float(torch.stack([score[:, 1].prod() for score in scores]).mean())


def show(row: Row, seconds: float) -> None:
    cells = [f"{row.recall:.3f}", f"{row.nll:.4f}", f"{row.nll_change:+.2%}", f"{row.nll_change_error:.2%}"]
    cells += [f"{row.dropped_worst:.3f}", f"{row.dropped_mean:.3f}"]
    cells += [f"{row.summary_bytes:.1f}", f"{row.tokens_read:.0f}"]
    print(LINE.format(row.rule, row.token_budget, *cells), f" {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
