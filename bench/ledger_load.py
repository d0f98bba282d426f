"""What `ledger.py` and `ledger_request.py` share: a sparse request's report, load at a steady rate, printed figures."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping

from vashista.engine.messages import SupportAudit, SupportReport

SUPPORT = SupportReport(
    num_head_steps=4096,
    dense_share=0.125,
    tokens_attended=1024.5,
    tokens_visible=16384.0,
    dropped_mass_bound=1.0,
    dropped_mass_estimate=0.0291,
    support_gap=2.31,
    audit=SupportAudit(12, 0.0312, 0.0211, 0.0413, 0.0151, 0.0891, 251.7, 190.2, 880.4),
)
SHARES = {"p50": 0.5, "p99": 0.99}


async def open_loop(work: Callable[[int], Awaitable[None]], rate: float, seconds: float) -> float:
    """`work(i)` is due at i / rate and begins late when the loop is late; returns the seconds until all have ended."""
    begin_s = time.perf_counter()
    tasks = []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begin_s + number / rate - time.perf_counter()))
        tasks.append(asyncio.ensure_future(work(number)))
    await asyncio.gather(*tasks)
    return time.perf_counter() - begin_s


def percentiles_us(name: str, values_s: list[float]) -> dict[str, float]:
    """`name_p50` and `name_p99` in microseconds."""
    ascending = sorted(values_s)
    at = {label: ascending[min(len(ascending) - 1, int(share * len(ascending)))] for label, share in SHARES.items()}
    return {f"{name}_{label}": value * 1e6 for label, value in at.items()}


def print_figures(figures: Mapping[str, float]) -> None:
    """As JSON, with the machine."""
    machine = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version, "cores": os.cpu_count() or 0}
    print(json.dumps({**machine, **{name: round(value, 3) for name, value in figures.items()}}, indent=2))
