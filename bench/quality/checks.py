"""Kinds of arguments that `run.py`, `rules.py` and `tail.py` share, and what is checked of a model before it is loaded.

A kind is a `type` of argparse, whose parser prints the text and ends with status 2.
"""

from __future__ import annotations

import argparse
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from passages import NAMES, read_books

from vashista.engine.errors import VashistaError
from vashista.engine.model_config import load_model_config

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("auto", "float32", "bfloat16", "float16")
LEAST_BUDGET, LEAST_MASS = 96, 0.001
"""As the server's settings: the groups that are always kept have 80 tokens and more."""
Kind = TypeVar("Kind")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is no whole number") from None
        if number < least or (most is not None and number > most):
            raise ArgumentTypeError(f"{number} was asked for; {least} {'and more' if most is None else f'to {most}'} "
                                    "are possible")  # fmt: skip
        return number

    return read


def listed(kind: Callable[[str], Kind], least: int = 1) -> Callable[[str], list[Kind]]:
    """Some of a kind, separated by commas, each once."""

    def read(text: str) -> list[Kind]:
        values = [kind(part) for part in text.split(",") if part]
        if len(values) < least:
            raise ArgumentTypeError("name one at least")
        if len(set(values)) < len(values):
            raise ArgumentTypeError(f"{text} names one of them twice")
        return values

    return read


def one_of(known: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ArgumentTypeError(f"there is no {text}; there are {', '.join(known)}")
        return text

    return read


def real(least: float, most: float, *, is_open: bool = False) -> Callable[[str], float]:
    """A number from `least` to `most`; below that where it is open."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is no number") from None
        if not least <= value <= most or (is_open and value == most):
            raise ArgumentTypeError(f"{text} was asked for; possible is {least:g} to {'below ' * is_open}{most:g}")
        return value

    return read


token_budget = whole(LEAST_BUDGET)
dropped_mass = real(LEAST_MASS, 1.0, is_open=True)


def new_file(text: str) -> Path:
    """A path that can be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ArgumentTypeError(f"{text} cannot be written: it is a folder, or lies in none that may be written to")
    return path


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


def check_model(parser: argparse.ArgumentParser, options: argparse.Namespace, contexts: list[int], least: int) -> None:
    """Ends with status 2 unless model and device are there and the model takes the contexts."""
    from vashista.engine.runner import resolve_device  # imports torch: arguments alone need none

    try:
        most = load_model_config(options.model).max_position_embeddings
        resolve_device(options.device)
    except VashistaError as error:
        parser.error(f"{error.message} {error.remedy}")
    outside = [context for context in contexts if not least <= context <= most]
    if outside:
        parser.error(f"contexts of {outside} tokens were asked for; {least} to {most} are possible")
