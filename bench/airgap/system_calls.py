"""Reads what `strace -f -ff -yy` wrote of a server and its children: which calls could lead outward, and which answer.

A call on the network is of one of these kinds:

- `listening`: made before the filter is on, for the socket that clients come to (socket, bind, listen);
- `try at the start`: refused, made by the server itself to see that it is (`server/isolation/tries.py`);
- `answer`: bytes on a connection that was accepted, told by its local port, which is one the process listens on;
- `unix`: between processes of this machine;
- `outward`: everything else. There must be none.

`bench/airgap/silent.py` and tests/server/test_silence.py use it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TRACED = "%network,write,writev,sendfile,splice,io_uring_setup,openat"
COMMAND = ("strace", "-DDD", "-f", "-ff", "-yy", "-s", "0", "-e", f"trace={TRACED}", "-e", "signal=none", "-o")
"""Then a path, which a dot and the number of each thread are put behind, and the command. -DDD: the traced process is
the child of whoever starts this, with its own number, and gets its signals."""
RESOLVER_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf")
_CALL = re.compile(r"^(\w+)\((.*?)\)?\s+= (-?\d+|\?)(.*)$")
_LISTEN = re.compile(r"^listen\(\d+<TCP(?:v6)?:\[.*?:(\d+)\]>.*= 0$")
_SOCKET = re.compile(r"^\d+<(TCP|UDP|NETLINK|PACKET|RAW|UNIX|socket)[\w-]*(?::\[(.*?)\])?>")
_LOCAL_PORT = re.compile(r":(\d+)(?:->|$)")


@dataclass
class Calls:
    """What was found."""

    kinds: Counter[str] = field(default_factory=Counter)
    outward: list[str] = field(default_factory=list)
    """The lines themselves."""
    num_processes: int = 0
    num_lines: int = 0

    @property
    def is_silent(self) -> bool:
        """No call could lead outward, of a server that was seen to answer."""
        return not self.outward and self.kinds["answer"] > 0


def read(folder: Path) -> Calls:
    """Of all traces in the folder; ValueError without one."""
    paths = sorted(path for path in folder.iterdir() if path.suffix[1:].isdecimal())
    if not paths:
        raise ValueError(f"there is no trace in {folder}")
    ports = {match[1] for path in paths for line in _lines(path) if (match := _LISTEN.match(line))}
    calls = Calls(num_processes=len(paths))
    for path in paths:
        classify(_lines(path), ports, calls)
    return calls


def classify(lines: Iterable[str], ports: set[str], calls: Calls) -> None:
    """Count the lines of one trace; `ports` are those that the server listens on."""
    for line in lines:
        match = _CALL.match(line)
        if match is None:
            continue
        calls.num_lines += 1
        kind = kind_of(match[1], match[2], is_refused=match[3] == "-1", ports=ports)
        if kind is None:
            continue
        calls.kinds[kind] += 1
        if kind == "outward":
            calls.outward.append(line)


def kind_of(name: str, arguments: str, *, is_refused: bool, ports: set[str]) -> str | None:  # noqa: PLR0911
    """One of the kinds above; None for a call that has nothing to do with a network."""
    match name:
        case "openat":
            return "outward" if any(f'"{path}"' in arguments for path in RESOLVER_FILES) and not is_refused else None
        case "socket" | "socketpair":
            if arguments.startswith("AF_UNIX"):
                return "unix"
            if is_refused:
                return "try at the start"
            return "listening" if arguments.startswith(("AF_INET, SOCK_STREAM", "AF_INET6, SOCK_STREAM")) else "outward"
        case "io_uring_setup":
            return "try at the start" if is_refused else "outward"
        case "connect":
            if "AF_UNIX" in arguments:
                return "try at the start" if is_refused else "outward"
            return "outward"
        case "bind" | "listen" | "accept" | "accept4" | "setsockopt" | "getsockopt" | "getsockname" | "getpeername":
            return None
        case "shutdown" | "recvfrom" | "recvmsg" | "recvmmsg":
            return None
    found = _SOCKET.match(arguments)
    if found is None:
        return "outward" if name.startswith("send") and name != "sendfile" else None
    if found[1] == "UNIX":
        return "unix"
    if name.startswith("send") and re.search(r"sa_family=AF_(?!UNIX)", arguments):
        return "outward"
    port = _LOCAL_PORT.search(found[2] or "")
    return "answer" if found[1] == "TCP" and port is not None and port[1] in ports else "outward"


def _lines(path: Path) -> Iterator[str]:
    with path.open(errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")
