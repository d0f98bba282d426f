"""Kinds of arguments that the training's scripts share: what cannot be used is refused before minutes are spent on it.

Each is a `type` of argparse, whose parser prints the text and ends with status 2.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from pathlib import Path

import torch

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def count(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def device(text: str) -> torch.device:
    """A device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise ArgumentTypeError(f"{text!r} is no device; say cpu, cuda or cuda:0") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ArgumentTypeError(f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices, not {text}")
    return found


def existing_file(text: str) -> Path:
    if not Path(text).is_file():
        raise ArgumentTypeError(f"{text} is not a file")
    return Path(text)


def output_folder(text: str) -> Path:
    """A folder, made if it is not there."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentTypeError(f"the folder {text} cannot be made: {error.strerror or error}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ArgumentTypeError(f"the folder {text} may not be written to")
    return path


def book_folder(text: str) -> Path:
    """Books as `train-*.jsonl.xz`."""
    return _folder(text, ("train-*.jsonl.xz",), "of books")


def prepared_folder(text: str) -> Path:
    """What corpus.py writes."""
    return _folder(text, ("books.json", "tokenizer.json", "tokens-*.xz"), "that corpus.py wrote")


def model_folder(text: str) -> Path:
    """What export.py writes."""
    return _folder(text, MODEL_FILES, "that export.py wrote")


def _folder(text: str, patterns: tuple[str, ...], kind: str) -> Path:
    missing = [pattern for pattern in patterns if not any(Path(text).glob(pattern))]
    if missing:
        raise ArgumentTypeError(f"{text} is no folder {kind}: it has no {', '.join(missing)}")
    return Path(text)
