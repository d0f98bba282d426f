"""Long-context quality under every attention: `python bench/quality/suite.py [--device cuda] [--url http://...]`.

Nine tasks after RULER (`tasks.py`) and the loss of held-out books, at several context lengths, under full attention and
under each attention module at several token budgets and targets for the dropped mass; in this process, or through a
running server. Prints tables, writes every sample's score with --json and pictures with --plots.

Where full attention itself is below 0.97 on a needle task, or not clearly above chance on another one, that task at
that context is not judged, and the suite says so. Exit status 0: the default sparse setting (vashista, a dropped mass
of 0.03) is within 1 point of full attention on every task and within 0.5 % of its loss. 1: it is not, somewhere, by
more than two standard errors. 2: too few samples to say, or a task that could not be judged.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from suite_player import Performance, Script, SuitePlayer
from suite_report import DEFAULT, LOSS, Mode, Result, Verdict, charts, judge, table, to_json
from suite_samples import Question, Text, make_questions, make_texts
from tasks import TASKS, score
from tqdm import tqdm

from vashista.engine.attention.registry import ATTENTION
from vashista.engine.config import EngineConfig
from vashista.engine.messages import AttentionMode
from vashista.engine.model_config import load_model_config
from vashista.engine.runner import resolve_device
from vashista.engine.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("vashista", "quest", "mean_key", "sinks_recent")
BATCH = {"cpu": 4, "cuda": 96}
NUM_IDENTITY = 4
"""Prompts of each module and context whose sparse result at full budget is compared with dense."""


def main() -> int:
    """The verdict as an exit status."""
    options = parse()
    limit = load_model_config(options.model).max_position_embeddings
    too_long = [context for context in options.contexts if context > limit]
    if too_long:
        raise SystemExit(f"contexts of {too_long} tokens were asked for; the model was made for {limit}")
    results: list[Result] = []
    default = DEFAULT if options.url is None else ("server", DEFAULT[1])
    for found in over_http(options) if options.url else in_process(options):
        results += found
        if options.json:  # a run that is cut off leaves what it has
            write(options, results, judge(results, default))
    for context in options.contexts:
        print("\n" + table(results, context), flush=True)
    verdict = judge(results, default)
    print("\n" + "\n".join(verdict.lines))
    word = {True: "MET", False: "MISSED", None: "NOT DECIDED"}[verdict.is_met]
    print(f"{word}: {' '.join(default)} against dense, judged on {verdict.num_judged} of {verdict.num_cells} tasks "
          "and contexts")  # fmt: skip
    return 1 if verdict.is_met is False else 0 if verdict.is_met and verdict.can_judge else 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "deploy/models/reference-26m"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--contexts", type=numbers, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--tasks", type=words, default=list(TASKS))
    parser.add_argument("--samples", type=numbers, default=[16], help="of each task, at each context or for all")
    parser.add_argument("--texts", type=int, default=13, help="books whose loss is taken; 0 for none")
    parser.add_argument("--scored", type=int, default=256, help="tokens of each book that are judged")
    parser.add_argument("--modules", type=words, default=list(MODULES))
    parser.add_argument("--budgets", type=numbers, default=[256, 512, 1024, 2048])
    parser.add_argument("--masses", type=lambda text: [float(part) for part in words(text)], default=[0.3, 0.03])
    parser.add_argument("--sparse-from", choices=("question", "answer"), default="question",
                        help="where sparse attention begins; a server begins with the answer")  # fmt: skip
    parser.add_argument("--batch", type=int, help="prompts at a time")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that make samples")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--audit-rate", type=float, default=1 / 256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for pictures")
    parser.add_argument("--url", help="ask this server instead of a model in this process")
    parser.add_argument("--key", default="", help="its API key")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    options = parser.parse_args()
    if len(options.samples) == 1:
        options.samples *= len(options.contexts)
    if len(options.samples) != len(options.contexts):
        parser.error("--samples has to be one number, or one for each of --contexts")
    return options


def words(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def numbers(text: str) -> list[int]:
    return [int(part) for part in words(text)]


def modes_of(module: str, options: argparse.Namespace) -> list[Mode]:
    """Full attention, and what is asked of the module."""
    modes = [Mode(module), *(Mode(module, token_budget=budget) for budget in options.budgets)]
    if module != "sinks_recent":  # it has no scores whose masses a target could steer
        modes += [Mode(module, max_dropped_mass=mass) for mass in options.masses]
    return modes


def questions_of(options: argparse.Namespace, context: int) -> list[Question]:
    num_samples = options.samples[options.contexts.index(context)]
    made = make_questions(options.model, options.tasks, context, num_samples, options.seed, options.workers)
    return list(tqdm(made, f"samples of {context}", len(options.tasks) * num_samples, leave=False, disable=None))


def over_http(options: argparse.Namespace) -> Iterator[list[Result]]:
    """Results of each context and mode."""
    from suite_http import MODULE, Server

    server = Server(options.url, options.key, options.concurrency)
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
    """The JSON and the pictures as they are now."""
    options.json.write_text(json.dumps(to_json(results, verdict, conditions(options)), indent=1) + "\n")
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        for name, svg in charts(results).items():
            (options.plots / name).write_text(svg)


def without_folders(word: str) -> str:
    """An argument as it may be published: a server and an absolute path tell of the machine."""
    if "://" in word:
        return "URL"
    return word.rsplit("/", 1)[-1] if word.startswith("/") else word


def conditions(options: argparse.Namespace) -> dict[str, object]:
    """Without hosts and paths."""
    device = None if options.url else resolve_device(options.device)
    return {
        "command": shlex.join(["python", "bench/quality/suite.py", *map(without_folders, sys.argv[1:])]),
        "model": Path(options.model).name,
        "where": "over HTTP" if options.url else "in process",
        "device": "a server" if device is None else torch.cuda.get_device_name(device) if device.type == "cuda"
        else f"CPU ({platform.machine()})",
        "dtype": options.dtype,
        "torch": torch.__version__,
        "samples": options.samples,
        "texts": 0 if options.url else options.texts,
        "scored_tokens": options.scored,
        "sparse_from": "answer" if options.url else options.sparse_from,
        "seed": options.seed,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
