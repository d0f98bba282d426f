"""Kinds of arguments that scripts of the benchmarks share; of the standard library alone, as the training's are.

A kind is a `type` of argparse, whose parser prints the text and ends with status 2.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

DTYPES = ("auto", "float32", "bfloat16", "float16")
MODULES = ("vashista", "quest", "mean_key", "sinks_recent")
"""Attention that leaves tokens out."""
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
