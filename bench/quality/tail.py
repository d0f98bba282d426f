"""Does an estimate of what was dropped help? `python bench/quality/tail.py [--device cuda]`, an experiment.

Plays tasks of the suite under the product's attention and under each variant of `tail_rules.py`, in plain torch, from
the question on; retrieval heads attend to everything, as in the product. Beside scores it gives what each variant does
to a head's result, measured with the queries of full attention: the relative error of the result, and the tail's
mass as a share of what was dropped. Factors by head are measured on the sample text that `vashista calibrate` uses.

Nothing is reported of a batch on which our `vashista` and the product's module do not agree: layer by layer on the same
queries, and in the end result. What was found: docs/sparse-attention.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from argument_kinds import listed, one_of, real, token_budget, whole
from checks import add_model, check_model
from passages import read_books
from suite_options import LEAST_CONTEXT
from suite_player import Performance, Script, SuitePlayer
from suite_samples import Question, Text, make_questions, make_texts
from tail_attention import Audit, TailAttention
from tail_player import compare, play
from tail_rules import DENSE, PLAIN, TAILS, Tail
from tail_store import LayerStore, copy_of, num_bytes
from tasks import TASKS, score

from vashista.engine.config import EngineConfig
from vashista.engine.messages import AttentionMode
from vashista.engine.sample_text import SampleTokens, read_sample_text
from vashista.engine.tokenizer import Tokenizer

LOSS = "loss"
COUNTS = "common_words:48,loss:13,variable_tracking:24,frequent_words:32,copy:24,multi_key:16,multi_query:16"
MOST_APART = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.01}
"""Median relative difference of the results of a head, on the same queries."""
MOST_SCORE, MOST_LOSS = 0.03, 0.02
"""Of the difference on the mean of a task, or three standard errors of it; nats on the mean of texts, likewise."""


def main() -> None:
    """Print a table for each task."""
    options = parse()
    made = make_work(options, options.counts)
    tails = [PLAIN, *(TAILS if not options.only else [TAILS[index] for index in options.only])]
    try:
        run(options, made, Experiment(options, tails))
    finally:
        for future in made.values():
            future.cancel()


def run(options: argparse.Namespace, made: dict[str, Future[list[Any]]], experiment: Experiment) -> None:
    """Every task for which there is time."""
    found: dict[str, dict[str, object]] = {}
    for task, future in made.items():
        if experiment.elapsed_s > options.seconds:
            experiment.say(f"no time for {task}")
            continue
        work = future.result()
        results = Results()
        for first in range(0, len(work), options.batch):
            experiment.measure(work[first : first + options.batch], results)
        found[task] = show(task, results)
        experiment.say(f"{task} is done")
        if options.json:
            factors = {name: each.exp().tolist() for name, each in experiment.factors.items()}
            told = {"conditions": conditions(options, experiment.device), "tasks": found, "factors": factors}
            options.json.write_text(json.dumps(told, indent=1) + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, all of them usable. SystemExit with status 2 for others."""
    parser = argparse.ArgumentParser("tail.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add_model(parser)
    parser.add_argument("--context", type=whole(1), default=32768)
    parser.add_argument("--budget", type=token_budget, default=1024)
    parser.add_argument("--counts", type=counts, default=COUNTS,
                        help=f"samples of each task, in this order; {LOSS} counts texts")  # fmt: skip
    parser.add_argument("--scored", type=whole(1), default=128, help="tokens of each text that are judged")
    parser.add_argument("--audited", type=whole(1), default=8,
                        help="contexts of each task of which heads are looked at")  # fmt: skip
    parser.add_argument("--only", type=listed(whole(0, len(TAILS) - 1), 0), default=[],
                        help="numbers of variants, counted from 0 in tail_rules.py")  # fmt: skip
    parser.add_argument("--batch", type=whole(1), default=48)
    parser.add_argument("--workers", type=whole(0), default=8, help="processes that make samples; 0 for none")
    parser.add_argument("--threads", type=whole(1))
    parser.add_argument("--seconds", type=real(0, math.inf), default=math.inf,
                        help="after these no further variant is begun")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    least = max(LEAST_CONTEXT, 2 * options.scored)
    check_model(parser, options.model, options.device, [options.context], least)
    return options


def counts(text: str) -> dict[str, int]:
    """`TASK:NUMBER` of each task, of the texts at most as many as there are books."""
    wanted: dict[str, int] = {}
    for part in text.split(","):
        task, _, samples = part.partition(":")
        if task in wanted:
            raise argparse.ArgumentTypeError(f"{task} is named twice")
        one_of((*TASKS, LOSS))(task)
        wanted[task] = whole(1, len(read_books()) if task == LOSS else None)(samples)
    return wanted


def config_of(options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        model_dir=options.model, device=options.device, dtype=options.dtype, attention="vashista",
        max_context=options.context, max_running_requests=options.batch, kv_memory_fraction=0.5,
        num_threads=options.threads,
    )  # fmt: skip


def make_work(options: argparse.Namespace, wanted: dict[str, int]) -> dict[str, Future[list[Any]]]:
    """Samples of each task, made one task after the other while the device works."""
    pool = ThreadPoolExecutor(1)

    def questions(task: str) -> list[Question]:
        return list(make_questions(options.model, [task], options.context, wanted[task], options.seed, options.workers))

    def texts() -> list[Text]:
        return make_texts(options.model, options.context, wanted[LOSS], options.scored)

    return {task: pool.submit(texts) if task == LOSS else pool.submit(questions, task) for task in wanted}


def script_of(each: Question | Text) -> Script:
    if isinstance(each, Text):
        start = len(each.token_ids) - each.num_scored - 1
        return Script(each.token_ids, start, start, num_scored=each.num_scored)
    return Script(each.token_ids, each.question_start, each.question_start, each.sample.max_tokens)


@dataclass
class Results:
    """Of one task."""

    values: dict[str, list[float]] = field(default_factory=dict)
    """Of each mode: scores, or losses in nats a token."""
    audit: Audit | None = None
    """Of some contexts of the first batch."""

    def add(self, name: str, values: Sequence[float]) -> None:
        self.values.setdefault(name, []).extend(values)


class Experiment:
    """The product with a model, and what is tried beside it."""

    def __init__(self, options: argparse.Namespace, tails: Sequence[Tail]) -> None:
        self._start = time.perf_counter()
        self.options, self.tails = options, list(tails)
        self.player = SuitePlayer(config_of(options), audit_rate=0.0)
        runner = self.player.runner
        self.model, self.device, self.shape = runner.model, runner.device, runner.attention_shape
        self.tokenizer = Tokenizer.load(options.model, runner.model_config.vocab_size)
        if self.player._policy.profile is None:
            raise SystemExit("the model has no support profile, so its retrieval heads are not known")
        self.whole = torch.from_numpy(self.player._policy.whole)
        strange = [tail.name for tail in tails if tail.layers and len(tail.layers) != self.shape.num_layers]
        if strange:
            raise SystemExit(f"{', '.join(strange)}: made for another number of layers; leave them out with --only")
        print(f"{runner.device_name}, {runner.dtype}, torch {torch.__version__}; {options.context} tokens, "
              f"{options.budget} kept; retrieval heads {self.whole.nonzero().tolist()}", flush=True)  # fmt: skip
        self.factors: dict[str, torch.Tensor] = {}
        self.factors = self._measure_factors()

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    def say(self, what: str) -> None:
        print(f"[{self.elapsed_s:.0f} s] {what}", flush=True)

    def measure(self, batch: Sequence[Question | Text], results: Results) -> None:
        """One batch of one task; of the first batch an audit, too. SystemExit if the product does something else."""
        scripts = [script_of(each) for each in batch]
        self.player.read(scripts, lambda num_tokens: None)
        self.say(f"{len(scripts)} contexts are read")
        dense, product = (self._values(batch, self.player.play(mode)) for mode in self._modes)
        layers = copy_of(self.player)
        attention = self._attend_on(layers)
        apart = compare(self.player, attention, self.options.budget)
        own = self._values(batch, play(self.model, attention, scripts))
        check(batch[0], apart, product, own, self.player.runner.dtype)
        for name, values in (("dense (product)", dense), ("vashista (product)", product), (PLAIN.name, own)):
            results.add(name, values)
        if results.audit is None:
            results.audit = self._look(layers, scripts)
        self.say(f"their copy takes {num_bytes(layers) / 2**30:.1f} GiB; product, comparison and audit are done")
        for tail in self.tails[1:]:
            if self.elapsed_s > self.options.seconds:
                break
            attention.tail = tail
            results.add(tail.name, self._values(batch, play(self.model, attention, scripts)))

    @property
    def _modes(self) -> tuple[AttentionMode, AttentionMode]:
        return AttentionMode(), AttentionMode(token_budget=self.options.budget)

    def _values(self, batch: Sequence[Question | Text], played: Sequence[Performance]) -> list[float]:
        return [value_of(each, one, self.tokenizer) for each, one in zip(batch, played, strict=True)]

    def _attend_on(self, layers: Sequence[LayerStore]) -> TailAttention:
        attention = TailAttention(self.shape, layers, self.whole, self.options.budget)
        attention.factors = self.factors
        return attention

    def _look(self, layers: Sequence[LayerStore], scripts: Sequence[Script]) -> Audit:
        """What every tail gives in each head, with the queries of full attention, on the first contexts."""
        few = slice(0, self.options.audited)
        attention = self._attend_on([LayerStore(x.keys[few].clone(), x.values[few].clone()) for x in layers])
        attention.tail, attention.audit = DENSE, Audit(self.tails, self.shape)
        play(self.model, attention, scripts[few])
        return attention.audit

    def _measure_factors(self) -> dict[str, torch.Tensor]:
        """Of each tail that wants them: [num_layers, num_kv_heads, g], logs, from the product's own sample text."""
        asked = [tail for tail in self.tails if tail.is_measured]
        if not asked:
            return {}
        sample = SampleTokens(read_sample_text(None), self.tokenizer)
        number = max(n for n in (1, 2, 3, 4) if sample.longest(n) >= self.options.context or n == 1)
        passages = sample.passages(number, self.options.context)
        scripts = [Script(ids, len(ids) - 65, len(ids) - 65, num_scored=64) for ids in passages]
        self.player.read(scripts, lambda num_tokens: None)
        attention = self._attend_on(copy_of(self.player))
        attention.tail, attention.audit = DENSE, Audit([PLAIN, *asked], self.shape)
        play(self.model, attention, scripts)
        found = {tail.name: attention.audit.factors(index) for index, tail in enumerate(attention.audit.tails) if index}
        self.say(
            f"factors are measured on {number} passages of text; heads with a tail, KV heads all of whose have one:"
        )
        for name, log_f in found.items():
            has_tail = torch.isfinite(log_f).cpu() & ~self.whole[..., None]
            print(f"    {name:34} {int(has_tail.sum()):3} {int(has_tail.all(2).sum()):3}")
        return found


def value_of(each: Question | Text, played: Performance, tokenizer: Tokenizer) -> float:
    """Score, or loss in nats a token."""
    if isinstance(each, Text):
        return -fmean(played.logprobs)
    return score(each.sample, tokenizer.decode(played.token_ids))


def check(
    first: Question | Text, apart: torch.Tensor, product: list[float], own: list[float], dtype: torch.dtype
) -> None:
    """SystemExit unless the product's module and ours do the same."""
    median, mean = float(apart.median()), float(apart.mean())
    differences = [a - b for a, b in zip(own, product, strict=True)]
    limit = max(MOST_LOSS if isinstance(first, Text) else MOST_SCORE, 3 * error_of(differences))
    print(f"\nours and the product's, on the same queries: results differ by {median:.2g} (median) and {mean:.2g} "
          f"(mean) of their norm; at the end {fmean(own):.4f} and {fmean(product):.4f}", flush=True)  # fmt: skip
    if not median <= MOST_APART[dtype] or not mean <= 3 * MOST_APART[dtype]:
        raise SystemExit(f"on the same queries at most {MOST_APART[dtype]} and three times that are allowed")
    if not abs(fmean(differences)) <= limit:
        raise SystemExit(f"the product's module and ours must agree to {limit:.3g}")


def error_of(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    if len(values) < 2:
        return 0.0
    mean = fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def show(task: str, results: Results) -> dict[str, object]:
    """Print one task's table; what of it is written."""
    line = "{:34} {:>5} {:>8} {:>9} {:>7} {:>9} {:>7} {:>7} {:>6}"
    print(f"\n{task}: " + ("nats a token, change in nats" if task == LOSS else "mean score, difference"))
    print(line.format("", "n", "mean", "to dense", "+-", "to plain", "+-", "error", "told"))
    audit = results.audit
    assert audit is not None
    dense, plain = results.values["dense (product)"], results.values[PLAIN.name]
    sparse = audit.true > 0
    named = {tail.name: index for index, tail in enumerate(audit.tails)}
    written: dict[str, object] = {"dropped": (audit.true / audit.num).tolist()}
    for name, values in results.values.items():
        cells = [f"{fmean(values):.4f}"]
        for base in (dense, plain):  # a run out of time has fewer of the last ones
            differences = [a - b for a, b in zip(values, base, strict=False)]
            cells += [f"{fmean(differences):+.4f}", f"{error_of(differences):.4f}"]
        row: dict[str, object] = {"values": values}
        if name in named:
            error, told = (x[named[name]] for x in (audit.error, audit.told))
            cells.append(f"{float(error[sparse].mean()) / audit.num:.3f}")
            cells.append(f"{float(told[sparse].sum() / audit.true[sparse].sum()):.2f}")
            row |= {"error": (error / audit.num).tolist(), "told": (told / audit.num).tolist()}
        print(line.format(name, len(values), *cells, *[""] * (7 - len(cells))), flush=True)
        written[name] = row
    print(f"dropped, mean of {int(sparse.sum())} heads: {float(audit.true[sparse].mean()) / audit.num:.3f}; error: of "
          "a head's result; told: the tail's mass as a share of the dropped one", flush=True)  # fmt: skip
    return written


def conditions(options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Without hosts and paths."""
    told = {name: value for name, value in vars(options).items() if name not in {"model", "json", "seconds"}}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return told | {"model": Path(options.model).name, "device": name, "torch": torch.__version__}


if __name__ == "__main__":
    main()
