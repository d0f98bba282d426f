"""Kernels with a mistake in a bound, for `bound_check.py --mutants`: a check that they pass would be worth nothing."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vashista.kernels.cpu.library import Library

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A piece of a kernel's text and what stands there instead."""

    name: str
    file: str
    text: str
    mistake: str


MUTANTS = (
    Mutant("no radius", "sparse.h", "radius * size[g] + (norm", "0.f * size[g] + (norm"),
    Mutant("radius 0.1 % short", "sparse.h", "radius * size[g] + (norm", "0.999f * radius * size[g] + (norm"),
    Mutant("no rounding of dropped units", "sparse.h", "(norm + radius) * (slack * size[g])", "0.f"),
    Mutant("no rounding of the kept mass", "sparse.h", "0x1p-16f + kept_slack(t, p, g)", "0x1p-16f"),
    Mutant("radius around the mean before it is rounded", "summary.h",
           "const vf x = load(keys, i * dim + d, bf16) - load(mean, d, 0);",
           "vf x = splat(0.f); for (int64_t j = 0; j < count; j++) x += load(keys, j * dim + d, bf16);"
           " x = load(keys, i * dim + d, bf16) - x / (float)count;"),
    Mutant("radius of all keys but the unit's last", "summary.h",
           "far = all > far ? all : far;", "far = all > far && i < UNIT - 1 ? all : far;"),
    Mutant("box rounded to the nearest code", "summary.h",
           "while ((double)code * (double)step < (double)x) code++;",
           "while (((double)code + .5) * (double)step < (double)x) code++;"),
    Mutant("tokens of a unit one short", "tasks.h", "#define LOG_UNIT 2.77258872f", "#define LOG_UNIT 2.70805020f"),
    Mutant("last dropped block left out", "sparse.h", "i < least(start + 64 * LANES, p->width); i += LANES) {",
           "i < least(start + 64 * LANES, p->width - LANES); i += LANES) {"),
)  # fmt: skip


@contextlib.contextmanager
def build(mutant: Mutant) -> Iterator[Library]:
    """The library with this mistake. Raises ValueError if its text is no longer in the kernels."""
    extension = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "cpu"
        shutil.copytree(ROOT / "kernels/cpu", sources, ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__"))
        path = sources / mutant.file
        text = path.read_text()
        if text.count(mutant.text) != 1:
            raise ValueError(f"{mutant.name}: {mutant.file} has {mutant.text!r} {text.count(mutant.text)} times, not 1")
        path.write_text(text.replace(mutant.text, mutant.mistake))
        target = Path(folder) / "mutant.so"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", *extension["extra-compile-args"], str(sources / "native.c"), "-o", str(target)],
            check=True, stderr=sys.stderr,
        )  # fmt: skip
        yield Library(target)
