"""Legs of a training: a run of `train.py` each, as its log tells it. `card.py` and `spread.py` read them."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from dataclasses import dataclass
from typing import Any

from arguments import existing_file
from stages import LABELS, PRESETS, Preset


@dataclass(frozen=True)
class Leg:
    """One run of `train.py`, and what it reported."""

    preset: Preset
    reports: list[dict[str, Any]]

    @classmethod
    def read(cls, text: str) -> Leg:
        """text: PRESET=LOG. ArgumentTypeError for another form, an unknown preset, or a log that is not there."""
        name, _, log = text.partition("=")
        if name not in PRESETS or not log:
            raise ArgumentTypeError(f"a leg is PRESET=LOG, PRESET one of {', '.join(PRESETS)}; not {text!r}")
        return cls(
            PRESETS[name], [json.loads(line) for line in existing_file(log).read_text(encoding="utf-8").splitlines()]
        )

    @property
    def seconds(self) -> float:
        """Of training, as the GPU's clock had it."""
        return sum(self.last(index)["elapsed_s"] for index in range(len(self.preset.stages)))

    def last(self, stage: int) -> dict[str, Any]:
        """The last report of a stage."""
        return [report for report in self.reports if report["stage"] == stage][-1]

    def rows(self, number: int) -> list[str]:
        """The leg's rows in the table of stages."""
        rows = []
        for index, stage in enumerate(self.preset.stages):
            last = self.last(index)
            rows.append(
                f"| {number} | {index} | {stage.num_tokens:,} x {stage.batch_size} | {last['step']:,} "
                f"| {last['elapsed_s']:.0f} | {stage.first_rate:g} to {stage.last_rate:g} "
                + "".join(f"| {last[f'{label}_loss']:.3f} " for label in LABELS)
                + "|"
            )
        return rows

    def text_tokens(self) -> float:
        """Tokens of books that were read, about: all of plain texts, six tenths of the lessons with passages."""
        total = 0.0
        for index, stage in enumerate(self.preset.stages):
            share = stage.mixture["plain"] + 0.6 * (stage.mixture["recall"] + stage.mixture["repeat"])
            total += self.last(index)["step"] * stage.batch_size * stage.num_tokens * share
        return total
