"""The document's pictures, in black and grey, from the same data as its claims."""

from __future__ import annotations

import math
from statistics import median, quantiles
from typing import Any

from claims import percent, theorems
from criterion import SAFE_MASS, curve, head_rows
from serving import quality_points
from suite_chart import Chart

THIN = 4
"""The style of many lines of one kind: light grey."""


def pictures(data: dict[str, Any]) -> dict[str, str]:
    """SVG by file name."""
    measured = data["measured"]
    charts = {
        "support-90.svg": support(measured, 90),
        "support-99.svg": support(measured, 99),
        "leakage-hull.svg": leakage_hull(measured),
        "leakage-softmax.svg": leakage_softmax(measured),
        "linear.svg": linear(measured),
        "criterion.svg": criterion(measured),
        "times.svg": times(measured),
    }
    if data["suite"]:
        charts["quality.svg"] = quality(data["suite"])
    return {name: chart.svg() for name, chart in charts.items()}


def support(measured: dict[str, Any], share: int) -> Chart:
    found = measured["support"]
    contexts = found["contexts"]
    chart = Chart(f"Tokens that hold {share} % of the mass", "tokens of context", "tokens", x_log=True, y_log=True)
    lines = [[s[f"tokens_{share}_median"] for s in head] for layer in found["heads"] for head in layer]
    for index, line in enumerate(lines):
        name = "a KV head" if index == 0 else ""
        chart.add(name, list(zip(contexts, line, strict=True)), style=THIN, has_marks=False, width=1.2)
    middle = [median(line[i] for line in lines) for i in range(len(contexts))]
    chart.add("their median", list(zip(contexts, middle, strict=True)), style=0, width=3)
    chart.add("all tokens", [(c, c) for c in contexts], style=3, has_marks=False)
    return chart


def leakage_hull(measured: dict[str, Any]) -> Chart:
    chart = Chart("Hull projection: leakage a key off the face", "gap: Δ / 2ε", "leakage / (M - |I|), log10")
    inside, outside, longest = [], [], 0.0
    for row in theorems(measured):
        for point in row["theorem"]["points"]:
            x = row["gap"] / (2 * point["eps"])
            num_off = point["log_bound"] + x  # log of M - |I|
            longest = max(longest, x)
            place = (x, (point["log_leakage"] - num_off) / math.log(10))
            (inside if point["in_regime"] else outside).append(place)
    chart.add("theorem applies", inside, style=0, has_line=False)
    chart.add("ε too large for it", outside, style=THIN, has_line=False)
    chart.add("bound: exp(-Δ/2ε)", [(0, 0), (longest, -longest / math.log(10))], style=2, has_marks=False)
    chart.add("limit: exp(-Δ/ε)", [(0, 0), (longest, -2 * longest / math.log(10))], style=3, has_marks=False)
    return chart


def leakage_softmax(measured: dict[str, Any]) -> Chart:
    chart = Chart("Softmax attention: dropped mass", "support gap Δ, nats", "dropped mass", y_log=True)
    rows = measured["heads"]["rows"]
    for index, at in enumerate(rows[0]["leakage"]):
        found = [row["leakage"][index] for row in rows if row["leakage"][index]["gap"] is not None]
        points = [(leak["gap"], leak["dropped"]) for leak in found if leak["dropped"] > 1e-30]
        chart.add(f"ε = {at['eps']:g}", points, has_line=False)
    num_dropped = max(row["num_keys"] for row in rows) - measured["heads"]["token_budget"]
    if num_dropped > 0:
        gaps = [x for series in chart.series for x, _ in series.points]
        grid = [min(gaps) + i / 100 * (max(gaps) - min(gaps)) for i in range(101)] if gaps else []
        bound = [(g, 1 / (1 + math.exp(g) / num_dropped)) for g in grid]
        chart.add("bound", bound, style=2, has_marks=False)
    return chart


def linear(measured: dict[str, Any]) -> Chart:
    chart = Chart("Displacement over the linear term", "ε / Δ", "displacement / (C ε)", x_log=True, y_log=True)
    named = False
    for row in theorems(measured):
        theorem = row["theorem"]
        if theorem["predicted"]:
            points = [(p["eps"] / row["gap"], p["displacement"] / (theorem["predicted"] * p["eps"]))
                      for p in theorem["points"]]  # fmt: skip
            chart.add("" if named else "a query", points, style=THIN, has_marks=False, width=1.0)
            named = True
    xs = [x for series in chart.series for x, _ in series.points]
    if xs:
        chart.add("linear", [(min(xs), 1.0), (max(xs), 1.0)], style=0, has_marks=False, width=2)
    return chart


def criterion(measured: dict[str, Any]) -> Chart:
    chart = Chart(f"Heads that drop at most {percent(SAFE_MASS)}", "recall", "precision", y_range=(0, 1))
    rows = head_rows(measured)
    truth = [row["dropped"] <= SAFE_MASS for row in rows]
    chart.add("by gap", curve([row["gap"] for row in rows], truth), has_marks=False)
    chart.add("by estimate", curve([-row["estimate"] for row in rows], truth), style=2, has_marks=False)
    base = sum(truth) / max(len(truth), 1)
    chart.add("all called safe", [(0.0, base), (1.0, base)], style=3, has_marks=False)
    return chart


def quality(suite: Any) -> Chart:
    chart = Chart("Lost score by support gap", "mean support gap, nats", "lost score")
    chart.add("a tenth of the samples", quality_points(suite))
    return chart


def times(measured: dict[str, Any]) -> Chart:
    most = max(1e3 * s for row in measured["times"]["rows"] for s in row["seconds"])
    chart = Chart("Step time", "tokens of context", "milliseconds", x_log=True, y_range=(0, most))
    for mode, style in (("dense", 0), ("sparse", 2)):
        rows = [row for row in measured["times"]["rows"] if (row["token_budget"] is None) == (mode == "dense")]
        cuts = [(row["context"], [1e3 * s for s in row["seconds"]]) for row in rows]
        chart.add(mode, [(context, median(ms)) for context, ms in cuts], style=style, width=2.4)
        for at in (0, 8):
            ends = [(context, quantiles(ms, n=10)[at]) for context, ms in cuts if len(ms) > 1]
            chart.add("", ends, style=style, has_marks=False, width=0.8)
    return chart
