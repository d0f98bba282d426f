"""A diagnosis as text for a terminal: one line a layer for the hull, one for the softmax, and what they say in words.

`vashista diagnose` prints what `diagnosis_text` returns. Nothing here measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

from vashista.engine.diagnose import Diagnosis, HeadDiagnosis
from vashista.engine.relaxation import TheoremCheck

HULL_ROW = "{:>5} {:>7} {:>7} {:>9} {:>6} {:>9} {:>9} {:>7} {:>12} {:>6}"
HULL_HEAD = (
    ("layer", "queries", "inside", "distance", "face", "gap", "exponent", "slope", "constant", "above"),
    ("", "", "hull", "/ radius", "keys", "Delta", "/ Delta", "of eps", "/ predicted", "bound"),
)
SOFTMAX_ROW = "{:>5} {:>7} {:>10} {:>8} {:>8} {:>10} {:>10} {:>10}"


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """Both tables and their summaries."""
    layers = sorted({head.layer for head in diagnosis.heads})
    by_layer = {layer: [head for head in diagnosis.heads if head.layer == layer] for layer in layers}
    lines = [
        "Hull: each query's projection onto the convex hull of its keys (medians over the layer's queries)",
        *(HULL_ROW.format(*words) for words in HULL_HEAD),
        *(_hull_line(layer, heads) for layer, heads in by_layer.items()),
        *_hull_words(diagnosis.heads),
        "",
        f"Softmax: the rule {diagnosis.rule} keeps {diagnosis.token_budget} tokens of up to {diagnosis.context} "
        "(medians over the layer's queries)",
        SOFTMAX_ROW.format("layer", "queries", "effective", "90 %", "99 %", "gap", "dropped", "proven by"),
        SOFTMAX_ROW.format("", "", "tokens", "tokens", "tokens", "nats", "mass", "the gap"),
        *(_softmax_line(layer, heads) for layer, heads in by_layer.items()),
        *_softmax_words(diagnosis.heads),
    ]
    return "\n".join(lines)


def _hull_line(layer: int, heads: list[HeadDiagnosis]) -> str:
    hulls = [head.hull for head in heads]
    checks = _checks(heads)
    ratios = [check.linear_constant / check.predicted_constant for check in checks if check.predicted_constant > 0]
    return HULL_ROW.format(
        layer,
        len(hulls),
        sum(hull.is_inside for hull in hulls),
        _middle([hull.distance / hull.radius for hull in hulls if hull.radius], ".3f"),
        _middle([hull.face_size for hull in hulls if not hull.is_inside], ".0f"),
        _middle([hull.support_gap for hull in hulls if math.isfinite(hull.support_gap)], ".3g"),
        _middle([check.exponent for check in checks], ".2f"),
        _middle([check.linear_slope for check in checks if not math.isnan(check.linear_slope)], ".2f"),
        _middle(ratios, ".3f"),
        sum(check.num_violations for check in checks),
    )


def _hull_words(heads: list[HeadDiagnosis]) -> list[str]:
    hulls = [head.hull for head in heads]
    checks = _checks(heads)
    inside, unsolved = sum(hull.is_inside for hull in hulls), sum(not hull.is_solved for hull in hulls)
    lines = [
        f"{inside} of {len(hulls)} queries lie inside the hull of their keys, where no key is inactive: no gap exists."
    ]
    if unsolved:
        lines.append(f"{unsolved} projections did not reach the accuracy asked for; their rows are estimates.")
    if checks:
        points = [point for check in checks for point in check.relaxed]
        in_regime, violations = sum(point.in_regime for point in points), sum(check.num_violations for check in checks)
        useful = sum(hull.log_bound_of_model < 0 for hull in hulls)
        lines += [
            f"Leakage against (M - |I|) exp(-Delta / (2 eps)): {violations} of {in_regime} points above it where the "
            f"theorem applies, {sum(not point.holds for point in points if not point.in_regime)} of "
            f"{len(points) - in_regime} where eps is still too large.",
            "exponent: -eps log(leakage / (M - |I|)) / Delta at the smallest eps; 0.5 is promised, 1 is the limit.",
            "slope and constant: of ||y_eps - y*|| against eps; 1 and 1 where the linear term is as the face predicts.",
            f"At the temperature that the model attends with, the theorem's bound is below 1 for {useful} of "
            f"{len(hulls)} queries.",
        ]
    return lines


def _softmax_line(layer: int, heads: list[HeadDiagnosis]) -> str:
    rows = [head.softmax for head in heads]
    return SOFTMAX_ROW.format(
        layer,
        len(rows),
        _middle([row.effective_support for row in rows], ".0f"),
        _middle([row.tokens_90 for row in rows], ".0f"),
        _middle([row.tokens_99 for row in rows], ".0f"),
        _middle([row.support_gap for row in rows if math.isfinite(row.support_gap)], ".2f"),
        _middle([row.dropped_mass for row in rows], ".2g"),
        _middle([row.dropped_mass_bound for row in rows], ".2g"),
    )


def _softmax_words(heads: list[HeadDiagnosis]) -> list[str]:
    rows = [head.softmax for head in heads]
    counts = [(limit, sum(row.dropped_mass <= limit for row in rows)) for limit in (0.05, 0.01)]
    proven = [(limit, sum(row.dropped_mass_bound <= limit for row in rows)) for limit in (0.05, 0.01)]
    return [
        f"Dropped mass <= {limit:g}: {true} of {len(rows)} queries truly, {sure} proven by the support gap."
        for (limit, true), (_, sure) in zip(counts, proven, strict=True)
    ]


def _checks(heads: list[HeadDiagnosis]) -> list[TheoremCheck]:
    return [head.hull.theorem for head in heads if head.hull.theorem is not None]


def _middle(values: Iterable[float], spec: str) -> str:
    """The median, or a dash for no values."""
    found = list(values)
    return format(median(found), spec) if found else "-"
