"""What scripts of the benchmarks check of a model before they load it, and the arguments for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from argument_kinds import DTYPES, new_file, whole
from passages import NAMES, read_books

from vashista.engine.errors import VashistaError
from vashista.engine.model_config import load_model_config

ROOT = Path(__file__).resolve().parents[2]


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that `check_model` checks, and --dtype and --json."""
    parser.add_argument("--model", default=str(ROOT / "deploy/models/reference-26m"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--json", type=new_file)


def add_passages(parser: argparse.ArgumentParser) -> None:
    """What `passages.py` is asked for."""
    num_books = len(read_books())
    parser.add_argument("--passages", type=whole(1, num_books), default=num_books)
    parser.add_argument(
        "--questions", type=whole(1, len(NAMES) // 2), default=8, help="codes asked for in each passage"
    )


def least_context(num_questions: int, num_scored: int) -> int:
    """Tokens in which a passage has room for its codes, twice as many as are asked for, and for what is judged."""
    return max(64 * (num_questions + 4), num_scored + 1)


def check_model(parser: argparse.ArgumentParser, model: str, device: str, contexts: list[int], least: int) -> None:
    """Ends with status 2 unless model and device are there and the model takes the contexts."""
    from vashista.engine.runner import resolve_device  # imports torch: arguments alone need none

    try:
        most = load_model_config(model).max_position_embeddings
        resolve_device(device)
    except VashistaError as error:
        parser.error(f"{error.message} {error.remedy}")
    outside = [context for context in contexts if not least <= context <= most]
    if outside:
        parser.error(f"contexts of {outside} tokens were asked for; {least} to {most} are possible")
