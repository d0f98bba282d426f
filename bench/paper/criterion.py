"""The claim that the gap says when sparse decoding is safe: precision and recall, by head and by generated token.

A prediction "safe" is judged twice: against the mass that was dropped, on captured heads, and against whether the
likeliest next token changed, on played tokens. Precision is the share of "safe" that is, recall the share of what is
safe that was called so. A threshold that is chosen by the data is chosen on every other row and judged on the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from claims import Claim, Finding, Table, conditions_text, count, percent

SAFE_MASS = 0.05
LEAST_PRECISION, LEAST_RECALL = 0.95, 0.5
LEAST_AREA = 0.7
"""Chance that a token which stays has a larger gap than one that changes, for the gap to tell them apart."""


def rates(predicted: Sequence[bool], truth: Sequence[bool]) -> tuple[float | None, float | None]:
    """(precision, recall); None where nothing was called safe, or nothing is."""
    both = sum(p and t for p, t in zip(predicted, truth, strict=True))
    return both / sum(predicted) if any(predicted) else None, both / sum(truth) if any(truth) else None


def area(scores: Sequence[float], truth: Sequence[bool]) -> tuple[float, float] | None:
    """The chance that a safe row has a higher score than an unsafe one, the area under the ROC curve.

    With its standard error, after Hanley and McNeil (Radiology 143, 1982); None where all rows are alike.
    """
    safe = [s for s, t in zip(scores, truth, strict=True) if t]
    unsafe = [s for s, t in zip(scores, truth, strict=True) if not t]
    if not safe or not unsafe:
        return None
    a = sum((x > y) + (x == y) / 2 for x in safe for y in unsafe) / len(safe) / len(unsafe)
    first, second = a / (2 - a) - a * a, 2 * a * a / (1 + a) - a * a
    variance = (a * (1 - a) + (len(safe) - 1) * first + (len(unsafe) - 1) * second) / len(safe) / len(unsafe)
    return a, math.sqrt(max(variance, 0.0))


def threshold(scores: Sequence[float], truth: Sequence[bool]) -> float | None:
    """The lowest score from which on LEAST_PRECISION of the rows are safe; None for none."""
    best = None
    hits = 0
    for seen, index in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), start=1):
        hits += truth[index]
        if hits / seen >= LEAST_PRECISION:
            best = scores[index]
    return best


def head_rows(measured: dict[str, Any]) -> list[dict[str, float]]:
    """Gap, bound, estimate and truth of each captured head that dropped anything, at the model's temperature."""
    rows = []
    for row in measured["heads"]["rows"]:
        leak = next(leak for leak in row["leakage"] if leak["eps"] == 1.0)
        if leak["gap"] is not None:
            rows.append(leak)
    return rows


def criterion(measured: dict[str, Any]) -> Claim:
    """By head and by token."""
    heads, tokens = head_rows(measured), measured["tokens"]["rows"]
    truth = [row["dropped"] <= SAFE_MASS for row in heads]
    proven = rates([row["bound"] <= SAFE_MASS for row in heads], truth)
    chosen, limit = _chosen(heads, truth)
    unchanged = [not row["changed"] for row in tokens]
    by_gap = area([row["gap"] for row in tokens], unchanged)
    finding = Finding.NOT
    if _is_right(proven) or _is_right(chosen):
        tells_mass = max(proven[1] or 0.0, chosen[1] or 0.0) >= LEAST_RECALL
        tells_tokens = by_gap is not None and by_gap[0] >= LEAST_AREA
        finding = Finding.HOLDS if tells_mass and tells_tokens else Finding.IN_PART
    table = [["proven: |D| exp(-Δ) / (1 + |D| exp(-Δ)) <= 5 %", *_cells(proven)],
             [f"gap Δ >= {limit:.1f} nats, chosen on the other half" if limit is not None
              else "no gap gave the precision", *_cells(chosen)],
             ["estimate of the dropped mass <= 5 %",
              *_cells(rates([row["estimate"] <= SAFE_MASS for row in heads], truth))]]  # fmt: skip
    return Claim(
        title="The support gap says when sparse decoding is safe",
        claimed="“a practical criterion for when sparse long-context decoding is safe” (abstract), with “a safe dense "
        "fallback when the gap is small” (abstract of the HTML version).",
        rule=f"of heads, safe is one that drops at most {percent(SAFE_MASS)}: the gap, by its bound or by a threshold "
        f"chosen on other heads, has to have precision {LEAST_PRECISION} and recall {LEAST_RECALL}. Of tokens, safe "
        "is one whose likeliest successor stays: one that stays has to have a larger mean gap than one that changes "
        f"with chance {LEAST_AREA}. Holds if both are met; in part if the gap has the precision on heads.",
        finding=finding,
        plainly=f"{count(sum(truth), len(heads))} heads truly drop at most {percent(SAFE_MASS)}. The gap's bound "
        f"calls {sum(row['bound'] <= SAFE_MASS for row in heads)} of them "
        f"safe{'' if proven[0] is None else f' (precision {proven[0]:.2f}, recall {proven[1] or 0:.2f})'}; a "
        f"threshold on the gap that is chosen by data reaches {_words(chosen)}. For generated tokens: "
        f"{_token_words(tokens, unchanged)}",
        measured=f"{len(heads)} captured heads at {measured['heads']['context']:,} tokens, "
        f"{measured['heads']['token_budget']:,} kept, dropped mass exact; {len(tokens)} tokens of text played densely "
        f"and sparsely at {measured['tokens']['context']:,} tokens in the module vashista, all head-steps audited, and "
        "the likeliest next token compared. Heads: "
        + conditions_text(measured["heads"]) + " Tokens: " + conditions_text(measured["tokens"]),
        tables=[("heads: what is called safe", Table(["called safe if", "precision", "recall"], table)),
                ("tokens: what is called safe", token_rates(tokens)),
                ("tokens, in quarters by their mean gap", token_table(tokens))],
        pictures=[("criterion.svg", "Precision against recall on heads, the threshold running: by gap and by "
        "estimate")],
    )  # fmt: skip


def _chosen(
    heads: Sequence[dict[str, float]], truth: Sequence[bool]
) -> tuple[tuple[float | None, float | None], float | None]:
    """Precision and recall of a gap threshold chosen on even rows, on odd rows; and the threshold."""
    gaps = [row["gap"] for row in heads]
    limit = threshold(gaps[::2], truth[::2])
    return rates([limit is not None and gap >= limit for gap in gaps[1::2]], truth[1::2]), limit


def _is_right(found: tuple[float | None, float | None]) -> bool:
    return found[0] is not None and found[0] >= LEAST_PRECISION


def _cells(found: tuple[float | None, float | None]) -> list[str]:
    return ["-" if value is None else f"{value:.2f}" for value in found]


def _words(found: tuple[float | None, float | None]) -> str:
    if found[0] is None:
        return "nothing: no threshold gave the precision"
    return f"precision {found[0]:.2f} and recall {found[1] or 0:.2f}"


def _token_words(tokens: Sequence[dict[str, Any]], unchanged: Sequence[bool]) -> str:
    if not tokens:
        return "none was sparse."
    by_gap = area([row["gap"] for row in tokens], unchanged)
    by_mass = area([-row["dropped"] for row in tokens], unchanged)
    text = f"{count(len(tokens) - sum(unchanged), len(tokens))} likeliest tokens changed. "
    if by_gap is None or by_mass is None:
        return text + "There is nothing to tell apart."
    return text + (
        f"A token that stays has a larger mean gap than one that changes with chance {by_gap[0]:.2f} +- "
        f"{2 * by_gap[1]:.2f} (0.5 is guessing, +- two standard errors), and a smaller measured dropped mass with "
        f"chance {by_mass[0]:.2f} +- {2 * by_mass[1]:.2f}: "
        + ("the gap tells tokens apart." if by_gap[0] >= LEAST_AREA else
           "the gap does not tell which tokens change, and the exact mass " +
           ("does." if by_mass[0] >= LEAST_AREA else "does not either."))
    )  # fmt: skip


def token_rates(tokens: Sequence[dict[str, Any]]) -> Table:
    """Precision and recall of some ways to call a token safe."""
    unchanged = [not row["changed"] for row in tokens]
    if not tokens:
        return Table(["called safe if", "precision", "recall"], [])
    middle = median(row["gap"] for row in tokens)
    ways = [("always", [True] * len(tokens)),
            (f"mean gap >= {middle:.2f} nats, the median", [row["gap"] >= middle for row in tokens]),
            ("mean bound <= 5 %", [row["bound"] <= SAFE_MASS for row in tokens]),
            ("mean estimate below its median",
             [row["estimate"] <= median(r["estimate"] for r in tokens) for row in tokens])]  # fmt: skip
    rows = [[name, *_cells(rates(predicted, unchanged))] for name, predicted in ways]
    return Table(["called safe if", "precision", "recall"], rows)


def token_table(tokens: Sequence[dict[str, Any]]) -> Table:
    """Quarters by gap, the smallest first."""
    ordered = sorted(tokens, key=lambda row: row["gap"])
    rows = []
    for quarter in range(4):
        part = ordered[len(ordered) * quarter // 4 : len(ordered) * (quarter + 1) // 4]
        if part:
            rows.append([
                f"{part[0]['gap']:.2f} to {part[-1]['gap']:.2f}", f"{fmean(row['estimate'] for row in part):.3f}",
                f"{fmean(row['dropped'] for row in part):.3f}", percent(fmean(row["changed"] for row in part)),
            ])  # fmt: skip
    return Table(["mean gap, nats", "dropped, estimate", "dropped, measured", "tokens changed"], rows)


def curve(scores: Sequence[float], truth: Sequence[bool]) -> list[tuple[float, float]]:
    """(recall, precision) as the threshold falls."""
    points, hits = [], 0
    for seen, index in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), start=1):
        hits += truth[index]
        points.append((hits / max(sum(truth), 1), hits / seen))
    return points
