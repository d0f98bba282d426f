"""From the suite's results to its table, its verdicts and its pictures.

A result is one task, or the loss, at one context under one mode: `Result`. Verdicts are three: whether full attention
is good enough for the suite to judge anything, whether the default sparse setting is as good as it has to be, and how
sure that is: of a difference from full attention the standard error over samples is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from suite_chart import Chart
from tabulate import tabulate

LOSS = "loss"
"""In place of a task: values are nats a token, one for each text."""
DENSE = "dense"
NEEDLES = ("single", "multi_key", "multi_value", "multi_query", "passkey")
LEAST_DENSE = 0.97
"""Full attention's mean score on a needle task."""
CHANCE_FACTOR, CHANCE_LEAD = 2.0, 0.1
"""Full attention on another task is clearly above chance: so many times it, and so far above it, two standard errors
taken off."""
MOST_LOST, MOST_LOSS = 0.01, 0.005
DEFAULT = ("vashista", "mass 0.03")


@dataclass(frozen=True)
class Mode:
    """A module and what its requests ask for."""

    module: str
    token_budget: int | None = None
    max_dropped_mass: float | None = None

    @property
    def name(self) -> str:
        """As in tables."""
        if self.token_budget is not None:
            return f"tokens {self.token_budget}"
        return DENSE if self.max_dropped_mass is None else f"mass {self.max_dropped_mass:g}"

    @property
    def is_dense(self) -> bool:
        return self.name == DENSE


@dataclass
class Result:
    """One task at one context under one mode."""

    task: str
    context: int
    module: str
    mode: str
    chance: float
    values: list[float]
    """Scores of the samples, or losses of the texts, in their order."""
    support: list[dict[str, float | None]] = field(default_factory=list)
    """Of each sample: what was dropped, by estimate, bound and audit."""

    @property
    def mean(self) -> float:
        return fmean(self.values)


@dataclass(frozen=True)
class Difference:
    """A mode against full attention on the same samples."""

    mean: float
    """Lost score, or added loss as a share: above 0 is worse."""
    error: float
    """Standard error; of a single sample infinite."""


def differ(result: Result, dense: Result) -> Difference:
    """Pairs samples by their order."""
    if result.task == LOSS:
        losses = [a / fmean(dense.values) - b / fmean(dense.values)
                  for a, b in zip(result.values, dense.values, strict=True)]  # fmt: skip
        return Difference(fmean(losses), standard_error(losses))
    losses = [b - a for a, b in zip(result.values, dense.values, strict=True)]
    # Scores that all agree are no proof that the next one would: half a sample at least.
    return Difference(fmean(losses), max(standard_error(losses), 0.5 / len(losses)))


def standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.inf
    mean = fmean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


@dataclass(frozen=True)
class Verdict:
    """What the results say, line by line."""

    can_judge: bool
    """Whether full attention is good enough on every task at every context."""
    is_met: bool | None
    """On the tasks and contexts where it is; None: they do not decide it."""
    num_judged: int
    num_cells: int
    num_unsure: int
    """Of the judged, within the gate as measured, and outside with two standard errors on top."""
    lines: list[str]


def judge(results: Sequence[Result], default: tuple[str, str] = DEFAULT) -> Verdict:
    """The default sparse setting against full attention, of all tasks and contexts; the loss is one of the tasks."""
    lines: list[str] = []
    found: list[bool | None] = []
    num_unsure = 0
    cells = [result for result in results if (result.module, result.mode) == default]
    for result in cells:
        dense = dense_of(results, result)
        weak = weakness(dense)
        if weak:
            lines.append(weak)
            continue
        lost, most = differ(result, dense), MOST_LOSS if result.task == LOSS else MOST_LOST
        place = f"{'the loss' if result.task == LOSS else result.task} at {result.context}"
        text = f"{place}: worse by {lost.mean:.2%} +- {2 * lost.error:.2%}"
        found.append(True if lost.mean <= most else None if lost.mean - 2 * lost.error <= most else False)
        num_unsure += lost.mean <= most < lost.mean + 2 * lost.error
        if not found[-1]:
            lines.append(f"{'undecided' if found[-1] is None else 'missed'}: {text}")
    if not cells:
        lines.append(f"nothing to judge: there is no result of {' '.join(default)}")
    is_met = False if False in found else None if None in found or not found else True
    return Verdict(len(found) == len(cells) > 0, is_met, len(found), len(cells), num_unsure, lines)


def weakness(dense: Result) -> str:
    """Why full attention's result cannot be a yardstick; "" where it can."""
    place = f"full attention, {dense.task} at {dense.context}: {dense.mean:.3f}"
    if dense.task == LOSS:
        return ""
    if dense.task in NEEDLES:
        return f"cannot judge: {place}, below {LEAST_DENSE}" if dense.mean < LEAST_DENSE else ""
    least = max(CHANCE_FACTOR * dense.chance, dense.chance + CHANCE_LEAD)
    if dense.mean - 2 * standard_error(dense.values) < least:
        return f"cannot judge: {place}, not clearly above chance ({dense.chance:.3f})"
    return ""


def dense_of(results: Sequence[Result], result: Result) -> Result:
    """Full attention on the same samples: with the same module, whose arithmetic it shares, or else any."""
    same = [r for r in results if r.mode == DENSE and (r.task, r.context) == (result.task, result.context)]
    return next((r for r in same if r.module == result.module), same[0])


def table(results: Sequence[Result], context: int) -> str:
    """Tasks across, modes down: mean scores, and the change of the loss."""
    own = [r for r in results if r.context == context]
    tasks = list(dict.fromkeys(r.task for r in own if r.task != LOSS))
    rows = []
    for module, mode in dict.fromkeys((r.module, r.mode) for r in own):
        found = {r.task: r for r in own if (r.module, r.mode) == (module, mode)}
        cells: list[Any] = [f"{found[task].mean:.3f}" if task in found else "" for task in tasks]
        loss = found.get(LOSS)
        change = "" if loss is None or mode == DENSE else f"{differ(loss, dense_of(own, loss)).mean:+.2%}"
        audited = [s["audit"] for r in found.values() for s in r.support if s.get("audit") is not None]
        rows.append([module, mode, *cells, f"{loss.mean:.4f}" if loss else "", change,
                     f"{fmean(audited):.3f}" if audited else ""])  # fmt: skip
    headers = ["module", "mode", *(task.replace("_", " ") for task in tasks), "NLL", "change", "dropped"]
    return f"{context} tokens of context\n" + tabulate(rows, headers, disable_numparse=True)


def charts(results: Sequence[Result]) -> dict[str, str]:
    """SVG by file name: score by task against context for the default module, and each module's mean by budget."""
    found = {}
    tasks = [task for task in dict.fromkeys(r.task for r in results) if task != LOSS]
    for task in tasks:
        chart = Chart(f"{task.replace('_', ' ')}: score", "tokens of context", "score", x_log=True, y_range=(0, 1))
        modes = dict.fromkeys((r.module, r.mode) for r in results if r.task == task and r.module == DEFAULT[0])
        for module, mode in modes:
            own = [r for r in results if (r.task, r.module, r.mode) == (task, module, mode)]
            chart.add(f"{module}, {mode}", sorted((r.context, r.mean) for r in own))
        found[f"suite-{task.replace('_', '-')}.svg"] = chart.svg()
    longest = max((r.context for r in results), default=0)
    chart = Chart(f"mean score of all tasks at {longest} tokens", "tokens kept", "score", x_log=True, y_range=(0, 1))
    for module in dict.fromkeys(r.module for r in results):
        own = [r for r in results if (r.module, r.context) == (module, longest) and r.task != LOSS]
        budgets = sorted({int(r.mode.split()[1]) for r in own if r.mode.startswith("tokens")})
        chart.add(module, [(b, fmean([r.mean for r in own if r.mode == f"tokens {b}"])) for b in budgets])
    dense = [r.mean for r in results if r.context == longest and r.mode == DENSE and r.task != LOSS]
    if dense and chart.series:
        xs = [x for series in chart.series for x, _ in series.points]
        chart.add("full attention", [(min(xs), fmean(dense)), (max(xs), fmean(dense))], style=2, has_marks=False)
    found["suite-modules.svg"] = chart.svg()
    return found


def to_json(results: Sequence[Result], verdict: Verdict, conditions: dict[str, object]) -> dict[str, object]:
    """Everything, for a file."""
    return {"conditions": conditions, "verdict": asdict(verdict), "results": [asdict(r) for r in results]}


def from_json(data: dict[str, Any]) -> list[Result]:
    """The results of `to_json`."""
    return [Result(**row) for row in data["results"]]
