"""What a run prints and writes: a table for people, JSON with every raw record for programs.

Called by `commands/bench.py` after `runner.py` is through. Times are milliseconds in the table and seconds in the JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from vashista.engine.errors import ReportFileError
from vashista.server.loadgen.runner import PointResult
from vashista.server.loadgen.statistics import Distribution, Summary

FORMAT_VERSION = 1


def table(rows: list[list[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right. The first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_results(results: list[PointResult]) -> str:
    """The whole report: throughput, latencies, goodput, errors and remarks."""
    parts = [_throughput_table(results), _latency_table(results)]
    if any(result.summary.goodput for result in results):
        parts.append(_goodput_table(results))
    parts += [*_errors(results), *_remarks(results)]
    return "\n\n".join(parts)


def _throughput_table(results: list[PointResult]) -> str:
    rows = [["load", "ok", "failed", "seconds", "requests/s", "in tok/s", "out tok/s", "tokens in", "cached", "out"]]
    for result in results:
        summary = result.summary
        rows.append(
            [
                result.point.label,
                str(summary.num_requests - summary.num_failed),
                str(summary.num_failed),
                f"{summary.duration_s:.2f}",
                f"{summary.requests_per_s:.2f}",
                _number(summary.input_tokens_per_s, ".1f"),
                f"{summary.output_tokens_per_s:.1f}",
                _number(summary.num_input_tokens, "d"),
                _number(summary.num_cached_tokens, "d"),
                str(summary.num_output_tokens),
            ]
        )
    return table(rows)


def _latency_table(results: list[PointResult]) -> str:
    rows = [["ms", "measure", "n", "mean", "p50", "p90", "p95", "p99", "max"]]
    for result in results:
        summary = result.summary
        measures: list[tuple[str, Distribution | None]] = [
            ("TTFT", summary.ttft),
            ("TPOT", summary.tpot),
            ("ITL", summary.itl),
            ("E2E", summary.e2e),
        ]
        if result.point.kind == "open":
            measures.insert(1, ("TTFT from arrival", summary.ttft_intended))
            measures.append(("E2E from arrival", summary.e2e_intended))
            measures.append(("sent late by", summary.send_lag))
        label = result.point.label
        for name, values in measures:
            if values is not None:
                figures = (values.mean, values.p50, values.p90, values.p95, values.p99, values.max)
                rows.append([label, name, str(values.num_values), *(f"{figure * 1e3:.2f}" for figure in figures)])
    if len(rows) == 1:
        return "No request succeeded: there are no latencies."
    return table(rows)


def _goodput_table(results: list[PointResult]) -> str:
    rows = [["goodput", "good", "of all", "good requests/s"]]
    for result in results:
        goodput = result.summary.goodput
        if goodput is not None:
            share = f"{goodput.share:.1%}"
            rows.append([result.point.label, str(goodput.num_good), share, f"{goodput.requests_per_s:.2f}"])
    return table(rows)


def _errors(results: list[PointResult]) -> list[str]:
    lines = []
    for result in results:
        for code, count in sorted(result.summary.errors.items(), key=lambda item: -item[1]):
            example = next(outcome.error_message for outcome in result.outcomes if outcome.error_code == code)
            lines.append(f"{result.point.label}: {count} failed with {code}: {example}")
    return ["\n".join(lines)] if lines else []


def _remarks(results: list[PointResult]) -> list[str]:
    remarks: list[str] = []
    for result in results:
        label, summary = result.point.label, result.summary
        remarks += [f"{label}: {remark}" for remark in _remarks_on(summary)]
    return ["\n".join(remarks)] if remarks else []


def _remarks_on(summary: Summary) -> list[str]:
    """What a reader must know to trust the figures."""
    if not summary.num_requests:
        return ["no request arrived within the duration: raise --rate or --duration"]
    remarks = []
    num_ok = summary.num_requests - summary.num_failed
    if summary.num_counted_by_usage < num_ok:
        num_chunked = num_ok - summary.num_counted_by_usage
        remarks.append(f"the server told no usage for {num_chunked} requests: their output tokens are counted chunks")
    if summary.num_exact_prompts is not None and summary.num_exact_prompts < num_ok:
        remarks.append(f"{summary.num_exact_prompts} of {num_ok} prompts had exactly the tokens asked for")
    if summary.tokens_per_chunk is not None and summary.tokens_per_chunk > 1.05:
        remarks.append(f"a chunk carries {summary.tokens_per_chunk:.2f} tokens: ITL is per chunk, not per token")
    if summary.send_lag is not None and summary.send_lag.p99 > 0.02:
        lag_ms = summary.send_lag.p99 * 1e3
        remarks.append(f"1 % of requests were sent {lag_ms:.0f} ms or more after their arrival time")
    return remarks


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def write_json(path: Path, settings: dict[str, Any], results: list[PointResult]) -> None:
    """Write settings, summaries and all raw records. Raises ReportFileError."""
    document = {"format": FORMAT_VERSION, "settings": settings, "results": results}
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1))
    except OSError as error:
        raise ReportFileError(f"the report cannot be written to {path}: {error}", param="json") from error


def check_writable(path: Path) -> None:
    """Find out before a long run that the report could not be written."""
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise ReportFileError(f"the report cannot be written to {path}: {error}", param="json") from error
