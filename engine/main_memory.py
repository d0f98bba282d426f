"""How much more of a machine's memory this process may take, and what says so.

`engine/memory.py` sizes the KV cache of a CPU by it. It imports no torch, so that the engine's process can name a
shortage that comes while torch is imported.

What counts: free memory of the machine; the limits of the process's control group and of all above it (v1 and v2, in a
namespace of their own or not), whose page cache can be given back and is no use of memory; the limits of the process
itself, RLIMIT_AS and RLIMIT_DATA (`ulimit -v` and `-d`), which count addresses rather than memory; and the commit limit
of a system that does not overcommit. Sources: proc(5), setrlimit(2), cgroup-v1/memory.rst and cgroup-v2.rst of Linux.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vashista.engine.errors import NotEnoughMemoryError

_NEVER_OVERCOMMIT = 2
_SHORTAGE = re.compile(
    r"out of memory|not enough memory|can('|no)t allocate memory|can't start new thread"
    r"|failed to map segment from shared object$",
    re.IGNORECASE,
)
"""As CUDA, torch's allocator, the C library, Python and the dynamic loader say it."""


class Room(NamedTuple):
    """Memory that may still be taken."""

    num_bytes: int
    limit: str
    """What allows no more, as an operator knows it."""


def main_memory(root: Path = Path("/")) -> Room:
    """The least that any of the limits leaves. `root` holds `proc` and the control groups; tests have their own."""
    rooms = [_machine(root), *_process(root), *_groups(root)]
    least = min(rooms, key=lambda room: room.num_bytes)
    return least._replace(num_bytes=max(least.num_bytes, 0))


def is_shortage(error: BaseException) -> bool:
    """Whether the system, or a library on its behalf, had no memory to give."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, OSError | RuntimeError | ImportError) and _SHORTAGE.search(str(error)) is not None


def shortage_text(error: BaseException) -> str:
    """What ran out, in the words of who said so, and what the limits leave."""
    room = main_memory()
    cause = " ".join(str(error).split()) or type(error).__name__
    return f"{cause} ({room.num_bytes / 2**30:.2f} GiB of main memory are free by {room.limit})"


@contextlib.contextmanager
def shortage_named() -> Iterator[None]:
    """Raise NotEnoughMemoryError in place of what is raised where memory ends."""
    try:
        yield
    except (OSError, RuntimeError, ImportError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise NotEnoughMemoryError(f"The engine ran out of memory: {shortage_text(error)}.") from error


def _machine(root: Path) -> Room:
    figures = _kilobytes(root / "proc/meminfo")
    if "MemAvailable" not in figures:
        raise NotEnoughMemoryError("/proc/meminfo has no MemAvailable: give kv_cache_bytes.")
    room = Room(figures["MemAvailable"], "MemAvailable")
    if _number(root / "proc/sys/vm/overcommit_memory") == _NEVER_OVERCOMMIT:
        promised = Room(figures["CommitLimit"] - figures["Committed_AS"], "CommitLimit (vm.overcommit_memory is 2)")
        return min(room, promised)
    return room


def _process(root: Path) -> Iterator[Room]:
    """What the process's own limits leave; read rather than asked for, as a unit may forbid the call."""
    used, limits = _kilobytes(root / "proc/self/status"), "\n".join(_lines(root / "proc/self/limits"))
    for title, name, figure in (
        ("Max address space", "RLIMIT_AS (`ulimit -v`)", "VmSize"),
        ("Max data size", "RLIMIT_DATA (`ulimit -d`)", "VmData"),
    ):
        soft = re.search(rf"^{title} +(\d+) ", limits, re.MULTILINE)  # else it is unlimited
        if soft is not None and figure in used:
            yield Room(int(soft[1]) - used[figure], name)


def _groups(root: Path) -> Iterator[Room]:
    """What each control group of this process, and each above it, leaves."""
    for mount, folder in _group_folders(root):
        while True:
            room = _group(folder, folder.relative_to(root))
            if room is not None:
                yield room
            if folder == mount:
                break
            folder = folder.parent


def _group_folders(root: Path) -> Iterator[tuple[Path, Path]]:
    """Where hierarchies that limit memory are mounted, and this process's folder in each."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = PurePosixPath(path)
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top, point = mount.split(" ")[3:5]
        place = root / point.lstrip("/")
        inside = paths[kind].relative_to(top) if paths[kind].is_relative_to(top) else PurePosixPath()
        folder = place / inside
        yield place, folder if ".." not in inside.parts and folder.is_dir() else place


def _group(folder: Path, name: Path) -> Room | None:
    """What one control group leaves; None if it sets no limit."""
    limits = [_number(folder / file) for file in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    limit = min((limit for limit in limits if limit is not None), default=None)
    used = _number(folder / "memory.current")
    if used is None:
        used = _number(folder / "memory.usage_in_bytes")
    if limit is None or used is None:
        return None
    figures = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
    prefix = "total_" if "total_inactive_file" in figures else ""  # v1 has the group's own and those below it
    cached = sum(int(figures.get(prefix + kind, 0)) for kind in ("inactive_file", "active_file"))
    return Room(limit - used + cached, f"control group /{name}")


def _kilobytes(path: Path) -> dict[str, int]:
    """Lines such as `VmSize:  3060 kB`, in bytes."""
    found = (re.match(r"(\w+):\s+(\d+) kB$", line) for line in _lines(path))
    return {match[1]: int(match[2]) * 1024 for match in found if match is not None}


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
