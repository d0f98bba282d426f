"""The claims on serving: speed, quality where the diagnostics predict it, and predictable latency.

Speed is quoted from the JSON of `bench/attention/run.py` and `bench/sparse_cpu.py`, quality from that of
`bench/quality/suite.py`; without a file the claim is not measured. Step times come from measured.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median, quantiles
from typing import Any

from claims import Claim, Finding, Table, conditions_text, percent
from suite_report import DENSE, LOSS, Result, dense_of, from_json, standard_error, weakness

LONG, FASTER = 32_768, 2.0
"""From this context on, attention has to be so many times faster."""
LAYER_TITLE = "one attention layer on a GPU, microseconds (`python bench/attention/run.py --json FILE`)"
PAPER_TITLE = "the paper's own shape: batch 16, 32 heads without grouping, microseconds (the same with `--paper`)"
CPU_TITLE = "a whole token on a CPU, milliseconds (`python bench/sparse_cpu.py --json FILE`)"
OWN_RULE = "MEAN_VARIANCE"
SPARSE = ("vashista", "tokens 1024")
"""Module and mode whose loss is looked at: a constant number of tokens is what the paper promises."""
MOST_LOST = 0.01
MOST_SPREAD, MOST_GROWTH = 1.5, 1.5
MOST_DENSE_SPREAD = 2.0
"""Dense steps that spread wider, or are faster at the longest context, were disturbed by something else."""


def speed(attention: Any, sparse_cpu: Any) -> Claim:
    """Tables of other benchmarks; both may be None."""
    attention, where_gpu = unwrapped(attention)
    sparse_cpu, where_cpu = unwrapped(sparse_cpu)
    layers, paper = _layer_rows(attention), _paper_rows(attention)
    long = [row["ratio"] for row in layers if row["context"] >= LONG]
    tables = []
    if layers:
        rows = [[f"{row['batch']} x {row['context']:,}", f"{row['dense']:,.1f}", *row["levels"], f"{row['ratio']:.1f}"]
                for row in layers]  # fmt: skip
        headers = ["batch x context", "dense", "sparse, one level", "two levels", "times faster, as served"]
        tables.append((LAYER_TITLE, Table(headers, rows)))
    if paper:
        rows = [[f"{row['context']:,}", f"{row['dense']:,.1f}", f"{row['sparse']:,.1f}", f"{row['ratio']:.1f}"]
                for row in paper]  # fmt: skip
        tables.append((PAPER_TITLE, Table(["context", "dense", "sparse", "times faster"], rows)))
    if sparse_cpu:
        rows = [[r["module"], f"{r['context']:,}", f"{r['dense ms']:.2f}", f"{r['sparse ms']:.2f}",
                 f"{r['dense / sparse']:.2f}"] for r in sparse_cpu]  # fmt: skip
        tables.append((CPU_TITLE, Table(["module", "context", "dense", "sparse", "times faster"], rows)))
    if not long:
        finding, words = Finding.OPEN, "No result of the attention benchmark was given."
        if any(row["dense / sparse"] >= FASTER for row in sparse_cpu):
            finding = Finding.IN_PART
    else:
        finding = Finding.HOLDS if min(long) >= FASTER else Finding.IN_PART if max(long) >= FASTER else Finding.NOT
        words = (
            f"From {LONG:,} tokens on, one layer of attention is {min(long):.1f} to {max(long):.1f} times faster than "
        )
        words += "the fastest dense kernel beside it."
    if sparse_cpu:
        longest = max(sparse_cpu, key=lambda row: row["context"])
        words += f" A whole token on a CPU at {longest['context']:,} tokens is {longest['dense / sparse']:.1f} times "
        words += "faster: reading the weights remains."
    return Claim(
        title="Sparse decoding is much faster",
        claimed="“strong wall-clock speedups” (abstract); “near-constant decode latency up to 128k context length” "
        "(abstract of the HTML version).",
        rule=f"holds if one layer is {FASTER:g} times faster than dense at every measured case from {LONG:,} tokens "
        "on, in part if at some, or if only a whole token on a CPU was seen to be so.",
        finding=finding,
        plainly=words.strip(),
        measured="by the benchmarks that each table names; figures are read from their files."
        + "".join(f" {what}: {where}." for what, where in (("GPU", where_gpu), ("CPU", where_cpu)) if where),
        tables=tables,
    )


def unwrapped(found: Any) -> tuple[list[dict[str, Any]], str]:
    """A benchmark's rows, and where they were measured if its file is {"conditions": text, "rows": ...}."""
    if isinstance(found, dict):
        return found["rows"], found["conditions"]
    return found or [], ""


def _layer_rows(attention: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases with a batch: dense, and sparse by as many levels as the product takes; of the product's own rule."""
    rows = []
    for row in attention:
        chosen = row.get(f"levels_{row.get('chosen')}")
        if "batch" in row and chosen and row.get("rule", OWN_RULE) == OWN_RULE:
            levels = [f"{row[key]['us']:,.1f}" if key in row else "-" for key in ("levels_1", "levels_2")]
            rows.append({"batch": row["batch"], "context": row["context"], "dense": row["dense"], "levels": levels,
                         "ratio": row["dense"] / chosen["us"]})  # fmt: skip
    return rows


def _paper_rows(attention: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for row in attention:
        if "batch" not in row:
            dense = min(value for key, value in row.items() if key not in {"context", "us"})
            rows.append({"context": row["context"], "dense": dense, "sparse": row["us"], "ratio": dense / row["us"]})
    return rows


def quality(suite: Any) -> Claim:
    """The suite's samples under the default sparse setting, in thirds by what their diagnostics said."""
    claimed = (
        "“minimal quality degradation in the regimes predicted by the support-gap diagnostics” (abstract). Its HTML "
        "version says that the “submission focuses on system latency and scalability measurements”: no quality was "
        "published."
    )
    rule = (
        "samples are sorted by their mean support gap. Holds if the third with the largest gaps loses at most "
        f"{percent(MOST_LOST)} of the score and the third with the smallest loses more, beyond the errors of both; "
        f"does not "
        "hold if the third with the largest gaps loses more than that, its error taken off; in part otherwise."
    )
    title = "Quality is kept where the diagnostics predict it"
    pairs = _pairs(from_json(suite)) if suite else []
    if len(pairs) < 9:
        words = "No result of the suite was given." if not suite else (
            "The suite cannot judge this model: on too few tasks is full attention good enough to lose "
            "anything.")  # fmt: skip
        return Claim(title, claimed, rule, Finding.OPEN, words, "`python bench/quality/suite.py --json FILE`.")
    thirds = [pairs[len(pairs) * i // 3 : len(pairs) * (i + 1) // 3] for i in range(3)]
    lost = [fmean(p["lost"] for p in third) for third in thirds]
    low, middle, high = lost
    errors = [2 * standard_error([p["lost"] for p in third]) for third in thirds]
    finding = Finding.IN_PART
    if high - errors[2] > MOST_LOST:
        finding = Finding.NOT
    elif high <= MOST_LOST and low - errors[0] > high + errors[2]:
        finding = Finding.HOLDS
    rows = [[f"{third[0]['gap']:.2f} to {third[-1]['gap']:.2f}", len(third), f"{fmean(p['dense'] for p in third):.3f}",
             f"{fmean(p['dense'] - p['lost'] for p in third):.3f}", f"{value:+.3f} +- {error:.3f}"]
            for third, value, error in zip(thirds, lost, errors, strict=True)]  # fmt: skip
    conditions = suite["conditions"]
    samples = " / ".join(map(str, conditions["samples"]))
    return Claim(
        title=title,
        claimed=claimed,
        rule=rule,
        finding=finding,
        plainly=f"Lost score by thirds of the gap, the smallest gaps first: {low:+.3f}, {middle:+.3f}, {high:+.3f}. "
        + _tell(finding) + _within_tasks(pairs),
        measured=f"{len(pairs)} samples of tasks on which full attention is good enough to lose something, "
        f"{SPARSE[1]} in the module {SPARSE[0]}, beside full attention on the same samples; {conditions['model']}, "
        f"{conditions['device']}, {samples} samples of each task at each context, sparse attention from the "
        f"{conditions['sparse_from']} on; `{conditions['command']}`.",
        tables=[("samples in thirds by their mean support gap", Table(
                    ["mean gap, nats", "samples", "full attention", "sparse", "lost, +- 2 standard errors"], rows)),
                ("by task and context, score of full attention > sparse", _suite_table(from_json(suite)))],
        pictures=[("quality.svg", "Lost score against mean support gap, in ten groups of samples")],
    )  # fmt: skip


def _tell(finding: Finding) -> str:
    return {
        Finding.HOLDS: "A large gap does mean that nothing is lost, and a small one that something may be.",
        Finding.IN_PART: "Whether the gap tells where something is lost is not sure: differences are within errors.",
        Finding.NOT: "Samples that the diagnostics call safest lose more than they should.",
        Finding.OPEN: "",
    }[finding]


def _within_tasks(pairs: Sequence[dict[str, Any]]) -> str:
    """Whether the gap says more than which task it is: halves by gap inside each task and context."""
    differences = []
    for group in dict.fromkeys(p["group"] for p in pairs):
        own = [p["lost"] for p in pairs if p["group"] == group]  # by rising gap
        if len(own) >= 2:
            half = len(own) // 2
            differences.append(fmean(own[:half]) - fmean(own[-half:]))
    if len(differences) < 3:
        return ""
    error = 2 * standard_error(differences)
    return (
        f" Within one task and context the half with the smaller gaps loses {fmean(differences):+.3f} +- {error:.3f} "
        f"more than the other ({len(differences)} of them)."
    )


def _pairs(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Each sample of the default setting with full attention's score, ordered by its gap."""
    pairs: list[dict[str, Any]] = []
    for result in results:
        if (result.module, result.mode) != SPARSE or result.task == LOSS:
            continue
        dense = dense_of(results, result)
        if weakness(dense):
            continue
        for value, full, support in zip(result.values, dense.values, result.support, strict=True):
            if support.get("gap") is not None:
                group = (result.task, result.context)
                pairs.append({"gap": support["gap"], "lost": full - value, "dense": full, "group": group})
    return sorted(pairs, key=lambda p: p["gap"])


def quality_points(suite: Any) -> list[tuple[float, float]]:
    """(mean gap, lost score) of ten groups of samples."""
    pairs = _pairs(from_json(suite))
    groups = [pairs[len(pairs) * i // 10 : len(pairs) * (i + 1) // 10] for i in range(10)]
    return [(fmean(p["gap"] for p in group), fmean(p["lost"] for p in group)) for group in groups if group]


def _suite_table(results: Sequence[Result]) -> Table:
    contexts = sorted({r.context for r in results})
    rows = []
    for task in dict.fromkeys(r.task for r in results):
        cells = []
        for context in contexts:
            own = [r for r in results if (r.task, r.context) == (task, context)]
            dense = next((r for r in own if r.mode == DENSE), None)
            sparse = next((r for r in own if (r.module, r.mode) == SPARSE), None)
            mark = "*" if dense is not None and weakness(dense) else ""
            cells.append(f"{dense.mean:.3f} > {sparse.mean:.3f}{mark}" if dense and sparse else "-")
        rows.append([("loss, nats" if task == LOSS else task.replace("_", " ")), *cells])
    return Table(["task (* not good enough to judge)", *(f"{c:,}" for c in contexts)], rows)


def predictable(measured: dict[str, Any]) -> Claim:
    """Step times: their spread, and how they grow with the context."""
    rows, found = [], {}
    for row in measured["times"]["rows"]:
        times = sorted(1e3 * s for s in row["seconds"])
        cuts = quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
        mode = "sparse" if row["token_budget"] else "dense"
        found[mode, row["context"]] = (median(times), cuts[8] / cuts[0])
        rows.append([f"{row['context']:,}", mode, f"{median(times):.2f}", f"{cuts[0]:.2f}", f"{cuts[8]:.2f}",
                     f"{times[-1]:.2f}", f"{cuts[8] / cuts[0]:.2f}"])  # fmt: skip
    contexts = sorted({row["context"] for row in measured["times"]["rows"]})
    growth = {mode: found[mode, contexts[-1]][0] / found[mode, contexts[0]][0] for mode in ("dense", "sparse")}
    spread = {mode: max(found[mode, c][1] for c in contexts) for mode in ("dense", "sparse")}
    is_disturbed = growth["dense"] < 1 or spread["dense"] > MOST_DENSE_SPREAD
    is_met = growth["sparse"] <= MOST_GROWTH and spread["sparse"] <= MOST_SPREAD
    is_better = growth["sparse"] < growth["dense"]
    finding = Finding.HOLDS if is_met else Finding.IN_PART if is_better else Finding.NOT
    if is_disturbed:
        finding = Finding.OPEN
    return Claim(
        title="Latency and cost are predictable",
        claimed="“interchangeable attention modules enable predictable latency and cost” (abstract).",
        rule=f"holds if the median time of a sparse step grows at most {MOST_GROWTH} times from the shortest to the "
        f"longest context and its 90th percentile is at most {MOST_SPREAD} times its 10th; in part if it grows less "
        "than dense; not measured if the dense steps show that other work disturbed them.",
        finding=finding,
        plainly=f"From {contexts[0]:,} to {contexts[-1]:,} tokens the median step grows {growth['sparse']:.2f} times "
        f"sparse and {growth['dense']:.2f} times dense; the widest spread (90th over 10th percentile) is "
        f"{spread['sparse']:.2f} sparse and {spread['dense']:.2f} dense."
        + (" Other work on the machine disturbed these times; nothing follows from them." if is_disturbed else ""),
        measured=f"{len(measured['times']['rows'][0]['seconds'])} decode steps of one request in each case, audits "
        f"included. {conditions_text(measured['times'])}",
        tables=[("step time, milliseconds", Table(
            ["context", "attention", "median", "10 %", "90 %", "longest", "90 % / 10 %"], rows))],
        pictures=[("times.svg", "Median step time against context, dense and sparse; thin: 10th and 90th percentile")],
    )  # fmt: skip
