"""What a cell says: errors of the medians, coverage and width of the intervals; and under what conditions it ran."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

QUANTITIES = ("ttft_s", "time_per_token_s", "total_s", "busy_s")
TITLES = {"ttft_s": "TTFT", "time_per_token_s": "time per token", "total_s": "total given N", "busy_s": "busy time"}


def pairs(usages: Iterable[dict[str, Any]], quantity: str) -> list[tuple[dict[str, float], float]]:
    """(interval, outcome) of each request that has the quantity."""
    found = []
    for usage in usages:
        said, outcome = usage["vashista"]["prediction"], usage["vashista"]["outcome"]
        interval = said[quantity] if quantity == "ttft_s" else outcome["predicted"][quantity]
        if interval is not None and outcome[quantity] is not None:
            found.append((interval, outcome[quantity]))
    return found


def figures(usages: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each quantity: median absolute relative error, its 90th percentile, coverage, mean and median width, number.

    Widths are relative to the outcome.
    """
    found = {}
    for quantity in QUANTITIES:
        data = pairs(usages, quantity)
        if not data:
            continue
        widths = [(interval["upper"] - interval["lower"]) / outcome for interval, outcome in data]
        errors = sorted(abs(interval["median"] / outcome - 1.0) for interval, outcome in data)
        found[quantity] = {
            "num": len(data),
            "median_error": statistics.median(errors),
            "p90_error": errors[min(len(errors) - 1, int(0.9 * len(errors)))],
            "bias": statistics.median(interval["median"] / outcome - 1.0 for interval, outcome in data),
            "coverage": sum(interval["lower"] <= outcome <= interval["upper"] for interval, outcome in data)
            / len(data),
            "width": statistics.mean(widths),
            "median_width": statistics.median(widths),
        }
    return found


def table(rows: Iterable[tuple[str, dict[str, dict[str, float]]]]) -> str:
    """Markdown: a row for each cell and quantity."""
    lines = [
        "| cell | quantity | outcomes | median error | 90th percentile | bias | coverage | mean width | median width |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, cell in rows:
        for quantity, values in cell.items():
            lines.append(
                f"| {name} | {TITLES[quantity]} | {values['num']:.0f} | {values['median_error']:.1%} | "
                f"{values['p90_error']:.1%} | {values['bias']:+.1%} | {values['coverage']:.1%} | "
                f"{values['width']:.2f} | {values['median_width']:.2f} |"
            )
    return "\n".join(lines)


def conditions(results: Iterable[dict[str, Any]]) -> str:
    """Markdown: under what conditions each cell ran. CPU: shares of all cores; the alarm: as it stood at the end."""
    lines = [
        "| cell | capacity, requests/s | CPU of server and client | of others | kept by the host | drift alarm |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        cpu, capacity = result["cpu"], result["capacity"]
        rate = "-" if capacity is None else f"{capacity:.2f}"
        alarm = "raised" if result["drifting"] else "-"
        lines.append(
            f"| {result['cell']} | {rate} | {cpu['own']:.0%} | {cpu['others']:.1%} | {cpu['stolen']:.1%} | {alarm} |"
        )
    return "\n".join(lines)
