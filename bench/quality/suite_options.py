"""What `suite.py` is asked for: its arguments, each checked before a model is loaded or a server is asked.

Nothing is left out or corrected: an argument that cannot be used ends the run with exit status 2 and says what can.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from argument_kinds import LEAST_BUDGET, LEAST_MASS, MODULES, new_file
from checks import ROOT
from haystack import read_books
from tasks import TASKS

from vashista.engine.model_config import load_model_config
from vashista.engine.runner import resolve_device

BUDGETS, MASSES = (256, 512, 1024, 2048), (0.3, 0.03)
LEAST_CONTEXT = 200
"""Room for an answer and the shortest task."""
NUM_SCORED = 256
COUNTS = ("batch", "threads", "concurrency")
IN_PROCESS = ("modules", "device", "dtype", "batch", "threads", "audit_rate", "sparse_from", "texts", "scored")
OVER_HTTP = ("key", "concurrency", "ready_s")


class SuiteError(Exception):
    """The suite cannot do what it was asked for; the text says why."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, all of them usable. SystemExit with status 2 for others; raises VashistaError for a model folder
    or a device that is not there."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.command = published(sys.argv[1:] if arguments is None else arguments)
    unused, place = (IN_PROCESS, "in this process") if options.url else (OVER_HTTP, "asked with --url")
    for name in unused:
        if getattr(options, name) not in (None, 0):
            parser.error(f"--{name.replace('_', '-')} is for a model {place}")
    _fill(options)
    if len(options.samples) == 1:
        options.samples *= len(options.contexts)
    problem = _problem(options) or _problem_of_files(options)
    if problem:
        parser.error(problem)
    if not options.url:
        resolve_device(options.device)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("suite.py", description="Long-context quality under every attention.",
                                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("--model", default=str(ROOT / "deploy/models/reference-26m"))
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--contexts", type=numbers, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--tasks", type=words, default=list(TASKS))
    parser.add_argument("--samples", type=numbers, default=[16], help="of each task, at each context or for all")
    parser.add_argument("--texts", type=int, help="books whose loss is taken; 0 for none, all 13 unless given")
    parser.add_argument("--scored", type=int, help=f"tokens of each book that are judged; {NUM_SCORED} unless given")
    parser.add_argument("--modules", type=words, help=f"of {', '.join(MODULES)}; all unless given")
    parser.add_argument("--budgets", type=numbers, default=list(BUDGETS))
    parser.add_argument("--masses", type=shares, default=list(MASSES))
    parser.add_argument("--sparse-from", choices=("question", "answer"),
                        help="where sparse attention begins; a server begins with the answer")  # fmt: skip
    parser.add_argument("--batch", type=int, help="prompts at a time")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that make samples")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--audit-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=new_file)
    parser.add_argument("--plots", type=Path, help="folder for pictures")
    parser.add_argument("--url", help="ask this server instead of a model in this process")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--concurrency", type=int, help="requests at a time; 8 unless given")
    parser.add_argument("--ready-s", type=float, help="wait so long for a server that answers 503; 120 unless given")
    return parser


def _fill(options: argparse.Namespace) -> None:
    """What was not given."""
    defaults: dict[str, Any] = {
        "device": "auto", "dtype": "auto", "modules": list(MODULES), "sparse_from": "question", "audit_rate": 1 / 256,
        "texts": 0 if options.url else len(read_books()), "scored": NUM_SCORED,
        "key": "", "concurrency": 8, "ready_s": 120.0,
    }  # fmt: skip
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _problem(options: argparse.Namespace) -> str:
    """What cannot be used; "" for nothing."""
    checks = itertools.chain(_names(options), _contexts(options), _counts(options))
    return next((problem for is_right, problem in checks if not is_right), "")


def _names(options: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Whether it is right, and what to say if not."""
    for name, known in (("tasks", tuple(TASKS)), ("modules", MODULES)):
        unknown = [each for each in getattr(options, name) if each not in known]
        yield not unknown, f"--{name}: there is no {', '.join(unknown)}; there are {', '.join(known)}"
    for name in ("contexts", "tasks", "modules", "budgets", "masses"):
        values = getattr(options, name)
        yield len(set(values)) == len(values), f"--{name} names one of its values twice"
    yield bool(options.contexts and options.modules), "--contexts and --modules have to name one at least"
    has_work = bool(options.tasks or options.texts)
    yield has_work, "there is nothing to play: name one of --tasks, or in this process --texts"


def _contexts(options: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    most = load_model_config(options.model).max_position_embeddings
    outside = [context for context in options.contexts if not LEAST_CONTEXT <= context <= most]
    yield not outside, f"--contexts of {outside} tokens were asked for; {LEAST_CONTEXT} to {most} are possible"
    is_each = len(options.samples) == len(options.contexts)
    yield is_each, "--samples has to be one number, or one for each of --contexts"
    num_books, half = len(read_books()), min(options.contexts) // 2
    yield 0 <= options.texts <= num_books, f"--texts is {options.texts}; there are {num_books} held-out books"
    can_score = not options.texts or 1 <= options.scored <= half
    yield can_score, f"--scored is {options.scored}; 1 to {half} tokens can be, half of the shortest context"


def _counts(options: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    counts = {"samples": min(options.samples)} | {name: getattr(options, name) for name in COUNTS}
    for name, count in counts.items():
        yield count is None or count >= 1, f"--{name} is {count}; it has to be 1 or more"
    yield options.workers >= 0, f"--workers is {options.workers}; it has to be 0 (no process of its own) or more"
    least = min(options.budgets, default=LEAST_BUDGET)
    yield least >= LEAST_BUDGET, f"--budgets of {least} tokens were asked for; {LEAST_BUDGET} and more are possible"
    are_shares = all(LEAST_MASS <= mass < 1 for mass in options.masses)
    yield are_shares, f"--masses are shares of the attention, from {LEAST_MASS} to below 1"
    yield 0 <= options.audit_rate <= 1, f"--audit-rate is {options.audit_rate:g}; it is a share from 0 to 1"
    is_time = 0 <= options.ready_s < math.inf
    yield is_time, f"--ready-s is {options.ready_s:g}; it has to be a number of seconds, 0 or more"


def _problem_of_files(options: argparse.Namespace) -> str:
    """Makes the folder for pictures."""
    if options.plots is not None:
        try:
            options.plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"--plots: {options.plots} cannot be made: {error.strerror or error}"
        if not os.access(options.plots, os.W_OK | os.X_OK):
            return f"--plots: {options.plots} may not be written to"
    return ""


def words(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def numbers(text: str) -> list[int]:
    return [int(part) for part in words(text)]


def shares(text: str) -> list[float]:
    return [float(part) for part in words(text)]


def published(arguments: Sequence[str]) -> list[str]:
    """The arguments as they may be published: a server, a key and an absolute path tell of the machine."""
    found: list[str] = []
    is_key = False
    for word in arguments:
        name, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        is_secret = is_key or name == "--key"
        found.append(name + sign + ("KEY" if is_secret and value else without_folders(value)))
        is_key = word == "--key"
    return found


def without_folders(word: str) -> str:
    if "://" in word:
        return "URL"
    return word.rsplit("/", 1)[-1] if word.startswith("/") else word
