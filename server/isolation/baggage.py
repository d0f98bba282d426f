"""What a process has from before it is confined: sockets that lead to a network, threads that no filter would be on.

`server/isolation/confinement.py` looks first of all. A library that is imported early, or a .pth file of the
environment, could have connected a socket, which goes on working in any network and behind any filter; a thread that
native code has started keeps its own network and has no filter. Whoever starts the server may pass sockets in, too.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from pathlib import Path

TASKS = Path("/proc/self/task")
DESCRIPTORS = Path("/proc/self/fd")


def sockets(listener: socket.socket | None) -> list[str]:
    """Open ones of any family but AF_UNIX, besides the listener and its duplicates, each in words."""
    own = None if listener is None else os.fstat(listener.fileno()).st_ino
    found = []
    for name in sorted(os.listdir(DESCRIPTORS), key=int):
        with contextlib.suppress(OSError):  # such as the descriptor of the folder that was listed
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode) and status.st_ino != own:
                with socket.socket(fileno=os.dup(int(name))) as sock:
                    if sock.family != socket.AF_UNIX:
                        found.append(f"descriptor {name}, {_describe(sock)}")
    return found


def threads() -> list[str]:
    """Besides the one that asks, each in words."""
    here = threading.get_native_id()
    found = []
    for number in sorted(int(path.name) for path in TASKS.iterdir()):
        with contextlib.suppress(OSError):
            if number != here:
                found.append(f"a thread named {(TASKS / str(number) / 'comm').read_text().strip()}")
    return found


def _describe(sock: socket.socket) -> str:
    kind = f"a socket of {getattr(sock.family, 'name', sock.family)} ({getattr(sock.type, 'name', sock.type)})"
    try:
        return f"{kind} to {sock.getpeername()}"
    except OSError:
        return kind
