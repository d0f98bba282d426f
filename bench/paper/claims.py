"""The claims on a model's own attention: constant support, leakage, the linear term. From measured.json to verdicts.

Each function takes what `measure.py` wrote and gives a `Claim`; `criterion.py` and `serving.py` hold the others,
`document.py` prints them all. Verdicts follow from the figures by the rule that each claim states, never by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any

FLAT = 0.1
"""Growth exponent: tokens grow as context^FLAT, 7 % with each doubling."""
PROPORTIONAL = 0.9
LINEAR = (0.9, 1.1)
"""Slopes of log displacement on log eps that count as linear."""
NEAR = 0.1
"""The linear term is right where it is off by at most so much."""
MOST, SOME = 0.9, 0.1


class Finding(StrEnum):
    """What became of a claim on this model."""

    HOLDS = "holds"
    IN_PART = "holds in part"
    NOT = "does not hold"
    OPEN = "not measured"


@dataclass(frozen=True)
class Table:
    """Rows of text or numbers."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Claim:
    """One row of the document's summary and one section of it."""

    title: str
    claimed: str
    """What the paper says, and where."""
    rule: str
    """When it counts as holding."""
    finding: Finding
    plainly: str
    """The verdict in words, with its figures."""
    measured: str
    tables: list[tuple[str, Table]] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)
    """File name and what is to be seen."""


def grade(share: float) -> Finding:
    """By a share of heads or queries."""
    return Finding.HOLDS if share >= MOST else Finding.IN_PART if share >= SOME else Finding.NOT


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def count(part: int, whole: int) -> str:
    """Such as 3 of 16."""
    return f"{part:,} of {whole:,}"


def conditions_text(part: dict[str, Any]) -> str:
    """How a part was measured."""
    given = part["conditions"]
    text = f"{given['model']}, {given['device']}, {given['dtype']}, torch {given['torch']}, {given['text']}; "
    return f"{text}`{given['command']}`.{' ' + given['note'] if given['note'] else ''}"


def growth(contexts: Sequence[int], tokens: Sequence[float]) -> float:
    """The exponent b of tokens ~ context^b, by least squares in logs."""
    xs, ys = [math.log(c) for c in contexts], [math.log(max(t, 1.0)) for t in tokens]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((a - x) ** 2 for a in xs)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread if spread else math.nan


def support(measured: dict[str, Any]) -> Claim:
    """Tokens that hold the mass, against context."""
    found = measured["support"]
    contexts = found["contexts"]
    rows, exponents = [], {90: [], 99: []}  # type: ignore[var-annotated]
    for layer, in_layer in enumerate(found["heads"]):
        for head, stats in enumerate(in_layer):
            cells = []
            for share in (90, 99):
                tokens = [s[f"tokens_{share}_median"] for s in stats]
                exponents[share].append(growth(contexts, tokens))
                cells += [" / ".join(f"{t:,.0f}" for t in tokens), f"{exponents[share][-1]:.2f}"]
            rows.append([layer, head, *cells])
    flat = {share: [b <= FLAT for b in values] for share, values in exponents.items()}
    num_heads = len(rows)
    share_flat = sum(flat[90]) / num_heads
    steep = sum(b >= PROPORTIONAL for b in exponents[90])
    where = "; ".join(f"layer {row[0]} head {row[1]}" for row, is_flat in zip(rows, flat[90], strict=True) if is_flat)
    spans = " / ".join(f"{c:,}" for c in contexts)
    return Claim(
        title="Effective support is small and constant in the context",
        claimed="“stable constant-size effective support” (abstract); attention “concentrates on a constant-size "
        "active face” (abstract).",
        rule=f"a KV head is flat if the tokens of 90 % of its mass grow as context^b with b <= {FLAT} (7 % with each "
        f"doubling). Holds if {percent(MOST)} of the KV heads are flat, in part from {percent(SOME)} on.",
        finding=grade(share_flat),
        plainly=f"{count(sum(flat[90]), num_heads)} KV heads are flat for 90 % of the mass, {sum(flat[99])} for 99 "
        f"%{f' (90 %: {where})' if where else ''}. {steep} grow in proportion to the context (b >= {PROPORTIONAL}); "
        f"the median exponent is {median(exponents[90]):.2f} for 90 % and {median(exponents[99]):.2f} for 99 %."
        + (
            ""
            if grade(share_flat) is Finding.HOLDS
            else " One budget for all heads and contexts has no ground here; budgets by head and context have."
        ),
        measured=f"dense attention of {found['queries']} queries at each of {spans} tokens, every query head of a KV "
        "head; medians. Tokens are counted from the largest weight down until they hold the share. "
        + conditions_text(found),
        tables=[
            ("tokens at " + spans, Table(["layer", "KV head", "90 % of the mass", "b", "99 % of the mass", "b"], rows))
        ],
        pictures=[
            (f"support-{share}.svg", f"Tokens that hold {share} % of each KV head's mass, by context; bold: the median")
            for share in (90, 99)
        ],
    )


def theorems(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the captured heads that have a gap."""
    return [row for row in measured["heads"]["rows"] if row["theorem"] is not None]


def leakage(measured: dict[str, Any]) -> Claim:
    """Mass off the face against the gap: of the hull projection, and of softmax attention."""
    heads = measured["heads"]
    rows, solved = heads["rows"], theorems(measured)
    points = [p for row in solved for p in row["theorem"]["points"]]
    regime = [p for p in points if p["in_regime"]]
    wrong = sum(p["log_leakage"] > p["log_bound"] + 1e-3 for p in regime)
    useful = sum((row["log_bound_of_model"] or 0.0) < 0 for row in rows)
    inside = sum(row["is_inside"] for row in rows)
    share_useful = useful / len(rows)
    finding = Finding.NOT if wrong else Finding.HOLDS if share_useful >= 0.5 else Finding.IN_PART
    table, num_wrong = _softmax_table(rows)
    exponent = median(row["theorem"]["exponent"] for row in solved) if solved else math.nan
    return Claim(
        title="Mass off the face dies as exp(-Omega(Delta / eps))",
        claimed="“the total mass assigned to inactive tokens decays exponentially as exp(-Ω(Δ/ε))” (abstract). Its "
        "theorem is about the entropic projection onto the convex hull of the keys.",
        rule="does not hold if one point in the theorem's regime lies above its bound; holds if the bound is below 1 "
        "at the temperature the model attends with for half of the queries; in part otherwise.",
        finding=finding,
        plainly=f"Of the hull projection it is true: {count(wrong, len(regime))} measured points lie above (M - |I|) "
        f"exp(-Δ/2ε) where the theorem applies, and the measured exponent is {exponent:.2f} Δ/ε (0.5 is promised, 1 "
        f"is the limit). {count(inside, len(rows))} queries lie inside the hull, where there is no gap. But at the "
        f"temperature that the model attends with the bound is below 1 for {count(useful, len(rows))} queries: there "
        f"it says {'something' if share_useful >= 0.5 else 'nothing'}. For softmax attention itself the gap's own "
        f"bound, |D| exp(-Δ) / (1 + |D| exp(-Δ)), is {'never' if not num_wrong else f'{num_wrong} times'} below the "
        "dropped mass.",
        measured=f"{len(rows)} query heads of all layers at {heads['context']:,} tokens: projection and relaxation in "
        "float64 at ε = Δ to Δ/128; softmax attention with its logits divided by ε = 1/8 to 2, the product's rule "
        f"keeping {heads['token_budget']:,} tokens. " + conditions_text(heads),
        tables=[("softmax attention, medians over the heads; ε = 1 is the model's own temperature", table)],
        pictures=[
            (
                "leakage-hull.svg",
                "Mass off the face, over the number of keys off it, against Δ/2ε; the line is the bound",
            ),
            ("leakage-softmax.svg", "Dropped mass of softmax attention against its gap, by temperature"),
        ],
    )


def _softmax_table(rows: Sequence[dict[str, Any]]) -> tuple[Table, int]:
    """By temperature; and how often a bound is below the truth."""
    cells, num_wrong = [], 0
    for index, at in enumerate(rows[0]["leakage"]):
        own = [row["leakage"][index] for row in rows if row["leakage"][index]["gap"] is not None]
        num_wrong += sum(leak["dropped"] > leak["bound"] * (1 + 1e-4) for leak in own)
        if own:
            cells.append([
                f"{at['eps']:g}", f"{median(leak['gap'] for leak in own):.2f}",
                f"{median(leak['dropped'] for leak in own):.2g}", f"{median(leak['bound'] for leak in own):.2g}",
                percent(sum(leak["dropped"] <= 0.05 for leak in own) / len(own)),
                percent(sum(leak["bound"] <= 0.05 for leak in own) / len(own)),
            ])  # fmt: skip
    headers = ["ε", "gap Δ, nats", "dropped mass", "bound of it", "dropped <= 5 %", "proven <= 5 %"]
    return Table(headers, cells), num_wrong


def linear(measured: dict[str, Any]) -> Claim:
    """Displacement on the face against eps."""
    solved = [row for row in theorems(measured) if row["theorem"]["slope"] is not None]
    slopes = [row["theorem"]["slope"] for row in solved]
    straight = sum(LINEAR[0] <= slope <= LINEAR[1] for slope in slopes)
    eps_of_model = 1 / measured["heads"]["scale"]
    ranges = [reach(row) for row in solved]
    known = [r for r in ranges if r is not None]
    covered = sum(r >= eps_of_model for r in known)
    share = straight / len(slopes) if slopes else 0.0
    is_met = share >= MOST and known and covered / len(known) >= 0.5
    finding = Finding.HOLDS if is_met else Finding.IN_PART if share >= 0.5 else Finding.NOT
    reached = median(known) / eps_of_model if known else math.nan
    return Claim(
        title="The error on the face is linear in eps",
        claimed="“the error on the active face scales linearly in the temperature/regularization parameter ε” "
        "(abstract).",
        rule=f"holds if the slope of log displacement on log ε is {LINEAR[0]} to {LINEAR[1]} for {percent(MOST)} of "
        f"the queries and the linear term is right within {percent(NEAR)} up to the model's own temperature for half "
        "of them; in part if the slope is right for half.",
        finding=finding,
        plainly=f"In the limit it is true: the slope is {LINEAR[0]} to {LINEAR[1]} for {count(straight, len(slopes))} "
        f"queries (median {median(slopes) if slopes else math.nan:.3f}), with the constant that the face predicts. "
        f"Its range is short: within {percent(NEAR)} up to an ε that is, in the median, {reached:.1e} of the "
        f"temperature the model attends with; {count(covered, len(known))} queries reach that.",
        measured="the same query heads; displacement is the distance of the relaxed point from the projection, the "
        "predicted constant follows from the active keys and their weights.",
        tables=[("displacement over the linear term, by ε", _linear_table(solved))],
        pictures=[
            ("linear.svg", "Displacement over predicted constant times ε, against ε/Δ, for each query; 1 is linear")
        ],
    )


def reach(row: dict[str, Any]) -> float | None:
    """The largest measured eps up to which the linear term is right; None where no constant is predicted."""
    theorem = row["theorem"]
    if not theorem["predicted"]:
        return None
    largest = 0.0
    for point in sorted(theorem["points"], key=lambda p: p["eps"]):
        if abs(point["displacement"] / (theorem["predicted"] * point["eps"]) - 1) > NEAR:
            break
        largest = point["eps"]
    return largest


def _linear_table(solved: Sequence[dict[str, Any]]) -> Table:
    rows = []
    known = [row for row in solved if row["theorem"]["predicted"]]
    for index in range(len(known[0]["theorem"]["points"]) if known else 0):
        ratios = [
            row["theorem"]["points"][index]["displacement"]
            / (row["theorem"]["predicted"] * row["theorem"]["points"][index]["eps"])
            for row in known
        ]
        eps_over_gap = known[0]["theorem"]["points"][index]["eps"] / known[0]["gap"]
        near = sum(abs(ratio - 1) <= NEAR for ratio in ratios) / len(ratios)
        rows.append([f"Δ / {1 / eps_over_gap:.0f}", f"{median(ratios):.3f}", percent(near)])
    return Table(["ε", "displacement / (C ε), median", f"within {percent(NEAR)}"], rows)
