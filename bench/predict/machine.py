"""Who used the processor while a cell ran: server and client, others, or the host (steal). From /proc of Linux.

What others use the engine waits for: a cell with much of it says what a disturbed machine does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Seconds since the system started, of all cores together."""

    all_s: float
    """Used or not."""
    used_s: float
    """By anybody here."""
    stolen_s: float
    """That the host gave to other guests while somebody here wanted them."""
    own_s: float
    """Of the processes that were asked for."""


def usage(root_pids: Iterable[int], proc: Path = Path("/proc")) -> Usage:
    """Until now; own are these processes and all that descend from them. What has ended is not among them."""
    line = (proc / "stat").read_text().split("\n", 1)[0].split()
    assert line[0] == "cpu"
    user, nice, system, idle, waiting, irq, soft_irq, stolen = (int(ticks) / TICKS_PER_S for ticks in line[1:9])
    used_s = user + nice + system + irq + soft_irq
    return Usage(used_s + idle + waiting + stolen, used_s, stolen, _own_s(set(root_pids), proc))


def shares(before: Usage, after: Usage) -> dict[str, float]:
    """Of the cores' time between the two: what own processes used, what others did, what the host kept."""
    all_s = after.all_s - before.all_s
    own_s = after.own_s - before.own_s
    return {
        "own": own_s / all_s,
        "others": max(0.0, after.used_s - before.used_s - own_s) / all_s,
        "stolen": (after.stolen_s - before.stolen_s) / all_s,
    }


def _own_s(root_pids: set[int], proc: Path) -> float:
    parent_of, used_s = {}, {}
    for path in proc.glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        fields = text.rpartition(")")[2].split()  # the name before may hold anything
        pid = int(path.parent.name)
        parent_of[pid], used_s[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return sum(seconds for pid, seconds in used_s.items() if _descends(pid, root_pids, parent_of))


def _descends(pid: int, root_pids: set[int], parent_of: dict[int, int]) -> bool:
    while pid in parent_of:
        if pid in root_pids:
            return True
        pid = parent_of[pid]
    return False
