"""The spread between trainings: the section of the card that `card.py --again FOLDER...` writes.

A folder of a repeated training holds the `log_PRESET.jsonl` of each leg (train.py's), `scores.json` (evaluate.py's) and
`run.json`, which says what it ran on and with which `--seed`:

    {"device": "one NVIDIA H200", "seeds": {"short": 11, "long": 12}}
"""

from __future__ import annotations

import json
import math
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import suite_path  # noqa: F401
from legs import Leg
from tasks import TASKS

TEMPLATE = Path(__file__).with_name("spread.md")
FORMS = ("plain", "chat")
APART = 0.1
"""Shares further apart than this between trainings are set in bold."""
ERRORS = 2
"""Standard errors that a figure may be away from the model's and still count as the same."""
LOSSES = {
    "nats_per_token": "loss on held-out books, nats a token",
    "nats_per_token_in_last_1024": "the same, last 1,024 tokens",
}


@dataclass(frozen=True)
class Training:
    """One whole training: its legs in their order, what it ran on, and what evaluate.py found."""

    name: str
    device: str
    legs: list[Leg]
    scores: dict[str, Any]

    @classmethod
    def read(cls, text: str) -> Training:
        """text: a folder as above. ArgumentTypeError says what it lacks."""
        folder = Path(text)
        missing = [name for name in ("run.json", "scores.json") if not (folder / name).is_file()]
        if missing:
            raise ArgumentTypeError(f"{text} is no folder of a training: it has no {', '.join(missing)}")
        run, scores = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("run.json", "scores.json"))
        if not isinstance(run, dict) or not run.get("device") or not run.get("seeds"):
            raise ArgumentTypeError(f'{text}/run.json must say {{"device": WORDS, "seeds": {{PRESET: SEED, ...}}}}')
        legs = [Leg.read(f"{preset}={folder / f'log_{preset}.jsonl'}") for preset in run["seeds"]]
        seeded = [
            replace(leg, preset=replace(leg.preset, seed=seed))
            for leg, seed in zip(legs, run["seeds"].values(), strict=True)
        ]
        return cls(folder.resolve().name, run["device"], seeded, scores)

    @property
    def shares(self) -> dict[tuple[str, int, str], dict[str, Any]]:
        """What was found of each task, context and form."""
        return {
            (entry["task"], entry["context"], form): entry[form] for entry in self.scores["tasks"] for form in FORMS
        }

    @property
    def num_samples(self) -> tuple[int, int]:
        """In plain form, in chat form."""
        first = self.scores["tasks"][0]
        return first["plain"]["num_samples"], first["chat"]["num_samples"]

    def mean(self, task: str, form: str) -> float:
        """Share over all contexts."""
        found = [part["score"] for (name, _, is_form), part in self.shares.items() if (name, is_form) == (task, form)]
        return sum(found) / len(found)


def spread_section(model: Training, again: list[Training]) -> str:
    """The trainings, and from the lowest to the highest of each figure over all of them, the model's own included.

    Raises ValueError where they were not asked the same: other words, tasks, contexts, or books.
    """
    for training in again:
        _check_same_questions(model, training)
    trainings = [model, *again]
    is_even = len({training.num_samples for training in trainings}) == 1
    return (
        TEMPLATE.read_text(encoding="utf-8")
        .rstrip()
        .format(
            samples="" if is_even else "; where numbers differ, the fewer are the first of the more",
            rows="\n".join([_row(model, None), *(_row(training, model) for training in again)]),
            errors=ERRORS,
            name=model.name,
            num_trainings=len(trainings),
            apart=APART,
            table="\n".join(_table(trainings)),
            words=_in_words(trainings),
        )
    )


def _check_same_questions(model: Training, training: Training) -> None:
    for what, of in (
        ("words", lambda one: one.scores["words"]),
        ("tasks and contexts", lambda one: sorted((task, context) for task, context, _ in one.shares)),
        ("books", lambda one: {context: loss.get("num_books") for context, loss in one.scores["books"].items()}),
    ):
        if of(model) != of(training):
            raise ValueError(
                f"{training.name} was evaluated with other {what} than {model.name}: evaluate both with the same "
                "--words, --tasks, --contexts and --books"
            )


def _row(training: Training, model: Training | None) -> str:
    steps = sum(leg.last(stage)["step"] for leg in training.legs for stage in range(len(leg.preset.stages)))
    cells = [
        training.name,
        training.device,
        ", ".join(str(leg.preset.seed) for leg in training.legs),
        f"{steps:,}",
        f"{sum(leg.seconds for leg in training.legs):.0f}",
        " / ".join(map(str, training.num_samples)),
    ]
    if model is None:
        return "| " + " | ".join([*cells, "-", "-", "-"]) + " |"
    figures, means = dict(_deviations(model, training)), dict(_mean_deviations(model, training))
    task, context, form = furthest = max(figures, key=lambda key: figures[key])
    cells += [f"{sum(value <= ERRORS for value in of.values())} of {len(of)}" for of in (figures, means)]
    cells.append(f"{task}, {context:,}, {form}: {figures[furthest]:.1f}")
    return "| " + " | ".join(cells) + " |"


def _variance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of the difference of two shares, at its largest: that of scores which are 0 or 1."""
    n, m = one["num_samples"], other["num_samples"]
    p = (one["score"] * n + other["score"] * m) / (n + m)
    return float(p * (1 - p) * (1 / n + 1 / m))


def _in_errors(difference: float, variance: float) -> float:
    return abs(difference) / math.sqrt(variance) if variance > 0 else 0.0


def _deviations(model: Training, training: Training) -> Iterator[tuple[tuple[str, int, str], float]]:
    """Each figure's difference in standard errors."""
    for key, part in training.shares.items():
        own = model.shares[key]
        yield key, _in_errors(part["score"] - own["score"], _variance(own, part))


def _mean_deviations(model: Training, training: Training) -> Iterator[tuple[tuple[str, str], float]]:
    for task, form in dict.fromkeys((task, form) for task, _, form in training.shares):
        keys = [key for key in training.shares if (key[0], key[2]) == (task, form)]
        variance = sum(_variance(model.shares[key], training.shares[key]) for key in keys) / len(keys) ** 2
        yield (task, form), _in_errors(training.mean(task, form) - model.mean(task, form), variance)


def _table(trainings: list[Training]) -> list[str]:
    shares, books = trainings[0].shares, trainings[0].scores["books"]
    measured = [int(context) for context, loss in books.items() if loss]
    contexts = sorted({context for _, context, _ in shares} | set(measured))
    lines = ["| figure | " + " | ".join(f"{context:,}" for context in contexts) + " | mean |"]
    lines.append("|---" * (len(contexts) + 2) + "|")
    for task in TASKS:
        if not any(name == task for name, _, _ in shares):
            continue
        cells = [
            " / ".join(_range([one.shares[task, context, form]["score"] for one in trainings]) for form in FORMS)
            if (task, context, "plain") in shares
            else "-"
            for context in contexts
        ]
        cells.append(" / ".join(_range([one.mean(task, form) for one in trainings]) for form in FORMS))
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    for key, label in LOSSES.items() if measured else ():
        cells = [
            _range([one.scores["books"][str(context)][key] for one in trainings]) if context in measured else "-"
            for context in contexts
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " | - |")
    return lines


def _range(values: list[float]) -> str:
    lowest, highest = f"{min(values):.3f}", f"{max(values):.3f}"
    if lowest == highest:
        return lowest
    text = f"{lowest} to {highest}"
    return f"**{text}**" if max(values) - min(values) > APART else text


def _in_words(trainings: list[Training]) -> str:
    """Which tasks differ notably, and how far the others go."""
    widths: dict[str, float] = {}
    for key in trainings[0].shares:
        values = [one.shares[key]["score"] for one in trainings]
        widths[key[0]] = max(widths.get(key[0], 0.0), max(values) - min(values))
    wide = [task for task, width in widths.items() if width > APART]
    narrow = [task for task in widths if task not in wide]
    parts = []
    if wide:
        apart = ", ".join(f"{task} (by {widths[task]:.3f} at most)" for task in wide)
        parts.append(f"Trainings differ notably in {apart}.")
    if narrow:
        farthest = max(widths[task] for task in narrow)
        parts.append(f"In {', '.join(narrow)} no figure is more than {farthest:.3f} apart.")
    return " ".join(parts)
