"""Long-context quality under every attention: `python bench/quality/suite.py [--device cuda] [--url http://...]`.

Nine tasks after RULER (`tasks.py`) and the loss of held-out books, at several context lengths, under full attention and
under each attention module at several token budgets and targets for the dropped mass; in this process, or through a
running server. Prints tables, writes every sample's score with --json and pictures with --plots.

Where full attention itself is below 0.97 on a needle task, or not clearly above chance on another one, that task at
that context is not judged, and the suite says so. Exit status 0: the default sparse setting (vashista, a dropped mass
of 0.03) is within 1 point of full attention on every task and within 0.5 % of its loss. 1: it is not, somewhere, by
more than two standard errors. 2: too few samples to say, a task that could not be judged, or no result at all: an
argument that cannot be used (`suite_options.py`), or a server that does not answer.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from suite_options import SuiteError, parse
from suite_player import Performance, Script, SuitePlayer
from suite_report import DEFAULT, LOSS, Mode, Result, Verdict, charts, judge, table, to_json
from suite_samples import Question, Text, make_questions, make_texts
from tasks import score
from tqdm import tqdm

from vashista.engine.attention.registry import ATTENTION
from vashista.engine.config import EngineConfig
from vashista.engine.errors import VashistaError
from vashista.engine.messages import AttentionMode
from vashista.engine.model_config import load_model_config
from vashista.engine.runner import resolve_device
from vashista.engine.tokenizer import Tokenizer

BATCH = {"cpu": 4, "cuda": 96}
NUM_IDENTITY = 4
"""Prompts of each module and context whose sparse result at full budget is compared with dense."""


def main() -> int:
    """The exit status: of the verdict, or 2 where there is none."""
    try:
        return run(parse())
    except SuiteError as error:
        print(f"error: {error}", file=sys.stderr)
    except VashistaError as error:
        print(f"error[{error.code}]: {error.message}\n  remedy: {error.remedy}", file=sys.stderr)
    return 2


def run(options: argparse.Namespace) -> int:
    """The verdict as an exit status."""
    results: list[Result] = []
    default = DEFAULT if options.url is None else ("server", DEFAULT[1])
    for found in over_http(options) if options.url else in_process(options):
        results += found
        write(options, results, judge(results, default))  # a run that is cut off leaves what it has
    for context in options.contexts:
        print("\n" + table(results, context), flush=True)
    verdict = judge(results, default)
    print("\n" + "\n".join(verdict.lines))
    word = {True: "MET", False: "MISSED", None: "NOT DECIDED"}[verdict.is_met]
    print(f"{word}: {' '.join(default)} against dense, judged on {verdict.num_judged} of {verdict.num_cells} tasks "
          "and contexts")  # fmt: skip
    if verdict.num_unsure:
        print(f"as measured: {verdict.num_unsure} of them would not be with two standard errors on top; more --samples "
              "make it surer")  # fmt: skip
    return 1 if verdict.is_met is False else 0 if verdict.is_met and verdict.can_judge else 2


def modes_of(module: str, options: argparse.Namespace) -> list[Mode]:
    """Full attention, and what is asked of the module."""
    budgets = [Mode(module, token_budget=budget) for budget in options.budgets]
    return [Mode(module), *budgets, *(Mode(module, max_dropped_mass=mass) for mass in options.masses)]


def questions_of(options: argparse.Namespace, context: int) -> list[Question]:
    num_samples = options.samples[options.contexts.index(context)]
    made = make_questions(options.model, options.tasks, context, num_samples, options.seed, options.workers)
    try:
        return list(tqdm(made, f"samples of {context}", len(options.tasks) * num_samples, leave=False, disable=None))
    except ValueError as error:
        raise SuiteError(f"a context of {context} tokens is too short: {error}") from error


def over_http(options: argparse.Namespace) -> Iterator[list[Result]]:
    """Results of each context and mode."""
    from suite_http import MODULE, Server

    server = Server(options.url, options.key, options.concurrency)
    server.wait_until_ready(options.ready_s)
    for context in options.contexts:
        questions = questions_of(options, context)
        for mode in modes_of(MODULE, options):
            with tqdm(total=len(questions), desc=f"{context}, {mode.name}", leave=False, disable=None) as bar:
                yield server.ask(questions, mode, bar.update)


def in_process(options: argparse.Namespace) -> Iterator[list[Result]]:
    """Results of each context, module and mode; full attention once, with the first module."""
    device = resolve_device(options.device)
    batch = options.batch or BATCH[device.type]
    modules = [module for module in options.modules if (module, device.type) in ATTENTION]
    for module in set(options.modules) - set(modules):
        print(f"{module} does not run on {device.type}: left out", flush=True)
    asked = {
        context: (questions_of(options, context), make_texts(options.model, context, options.texts, options.scored))
        for context in options.contexts
    }
    tokenizer = Tokenizer.load(options.model, load_model_config(options.model).vocab_size)
    # On a CPU reading takes the time, and one reading serves all; on a GPU a module's store takes the memory.
    together = [modules] if device.type == "cpu" else [[module] for module in modules]
    for group in together:
        players = [SuitePlayer(config_of(module, options, batch), options.audit_rate) for module in group]
        modes = {module: [mode for mode in modes_of(module, options) if not mode.is_dense or module == modules[0]]
                 for module in group}  # fmt: skip
        for context in options.contexts:
            questions, texts = asked[context]
            yield measure(players, modes, questions, texts, options.sparse_from, batch, tokenizer)


def config_of(module: str, options: argparse.Namespace, batch: int) -> EngineConfig:
    return EngineConfig(
        model_dir=options.model, device=options.device, dtype=options.dtype, attention=module,
        max_context=max(options.contexts), max_running_requests=batch, num_threads=options.threads,
    )  # fmt: skip


def measure(
    players: Sequence[SuitePlayer],
    modes: dict[str, list[Mode]],
    questions: Sequence[Question],
    texts: Sequence[Text],
    sparse_from: str,
    batch: int,
    tokenizer: Tokenizer,
) -> list[Result]:
    """Every mode of every player's module on the same prompts, read once a batch."""
    work: list[Question | Text] = [*questions, *texts]
    results: dict[tuple[str, str, str], Result] = {}
    for first in range(0, len(work), batch):
        group = work[first : first + batch]
        scripts = [script_of(each, sparse_from) for each in group]
        name = f"{group[0].context} tokens"
        with tqdm(total=sum(s.start for s in scripts), desc=name, unit="token", leave=False, disable=None) as bar:
            players[0].read(scripts, bar.update)
        for player in players:
            if player is not players[0]:
                player.read_as(players[0])
            if first == 0:
                check_identity(player)
            for mode in modes[player.runner.attention.name]:
                for each, seen in zip(group, player.play(attention_of(mode)), strict=True):
                    book(results, each, mode, seen, tokenizer)
    return list(results.values())


def script_of(each: Question | Text, sparse_from: str) -> Script:
    if isinstance(each, Text):
        start = len(each.token_ids) - each.num_scored - 1
        return Script(each.token_ids, start, start, num_scored=each.num_scored)
    last = len(each.token_ids) - 1
    start = each.question_start if sparse_from == "question" else last
    return Script(each.token_ids, start, start if sparse_from == "question" else last + 1, each.sample.max_tokens)


def attention_of(mode: Mode) -> AttentionMode:
    return AttentionMode(token_budget=mode.token_budget, max_dropped_mass=mode.max_dropped_mass)


def check_identity(player: SuitePlayer) -> None:
    """SystemExit unless the sparse kernels give dense's result, to the bit, where nothing is left out.

    Both are played twice: on a GPU the first play has its steps captured, and a captured step may round otherwise than
    one launched layer by layer.
    """
    for _ in range(2):
        dense, covered = (player.play(AttentionMode(), each, NUM_IDENTITY) for each in (None, player.covering()))
    if any((a.token_ids, a.logprobs) != (b.token_ids, b.logprobs) for a, b in zip(dense, covered, strict=True)):
        raise SystemExit(
            f"{player.runner.attention.name}: a budget that covers the context does not give dense's result"
        )


def book(
    results: dict[tuple[str, str, str], Result],
    each: Question | Text,
    mode: Mode,
    seen: Performance,
    tokenizer: Tokenizer,
) -> None:
    """One prompt's score or loss, and what it left out, into its result."""
    if isinstance(each, Text):
        task, chance, value = LOSS, 0.0, -sum(seen.logprobs) / len(seen.logprobs)
    else:
        task, chance = each.sample.task, each.sample.chance
        value = score(each.sample, tokenizer.decode(seen.token_ids))
    made = Result(task, each.context, mode.module, mode.name, chance, [])
    result = results.setdefault((task, mode.module, mode.name), made)
    result.values.append(value)
    support = seen.support
    if support is not None:
        result.support.append({
            "estimate": support.dropped_mass_estimate,
            "bound": support.dropped_mass_bound,
            "gap": support.support_gap,
            "attended": support.tokens_attended / support.tokens_visible,
            "audit": support.audit.dropped_mass if support.audit else None,
        })  # fmt: skip


def write(options: argparse.Namespace, results: Sequence[Result], verdict: Verdict) -> None:
    """The JSON and the pictures as they are now. Raises SuiteError."""
    try:
        if options.json:
            options.json.write_text(json.dumps(to_json(results, verdict, conditions(options)), indent=1) + "\n")
        if options.plots:
            for name, svg in charts(results).items():
                (options.plots / name).write_text(svg)
    except OSError as error:
        raise SuiteError(f"{error.filename or 'a result'} cannot be written: {error.strerror or error}") from error


def conditions(options: argparse.Namespace) -> dict[str, object]:
    """Without hosts and paths."""
    device = None if options.url else resolve_device(options.device)
    return {
        "command": shlex.join(["python", "bench/quality/suite.py", *options.command]),
        "model": Path(options.model).name,
        "where": "over HTTP" if options.url else "in process",
        "device": "a server" if device is None else torch.cuda.get_device_name(device) if device.type == "cuda"
        else f"CPU ({platform.machine()})",
        "dtype": options.dtype,
        "torch": torch.__version__,
        "samples": options.samples,
        "texts": options.texts,
        "scored_tokens": options.scored,
        "sparse_from": "answer" if options.url else options.sparse_from,
        "seed": options.seed,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
