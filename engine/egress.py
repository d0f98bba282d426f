"""A watch over what Python code of this process tries to reach: which line asked for which address, name or program.

Server and engine install it at their start (sys.addaudithook); what it sees goes to the server's count and log. It is a
diagnosis, not a wall: native code goes past it, and it lets everything through. The wall is the network that is not
there, and the kernel's filter.
"""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import msgspec

from vashista.engine.messages import Attempt

STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep
PROGRAMS = frozenset({"ldconfig", "cc", "gcc", "clang", "ld", "objdump", "ptxas", "ptxas-blackwell", "cuobjdump",
                      "nvdisasm"})  # fmt: skip
"""What triton and ctypes start to compile and find libraries; none of them speaks to a network."""
NATIVE = frozenset({"syscall", "socket", "connect", "sendto", "sendmsg", "sendmmsg", "getaddrinfo", "gethostbyname",
                    "gethostbyname_r", "gethostbyname2", "res_query", "res_search", "io_uring_setup",
                    "io_uring_queue_init", "system", "popen", "execv", "execve", "execvp", "posix_spawn",
                    "posix_spawnp"})  # fmt: skip
"""Functions of C that ctypes is asked for: the filter sees the call that follows, this says which line wanted it."""
_MAX_DETAIL = 200
_WATCHED = {
    "socket.__new__": "socket",
    "socket.connect": "connect",
    "socket.sendto": "send",
    "socket.sendmsg": "send",
    "socket.getaddrinfo": "resolve",
    "socket.gethostbyname": "resolve",
    "socket.gethostbyaddr": "resolve",
    "socket.getnameinfo": "resolve",
    "subprocess.Popen": "program",
    "os.exec": "program",
    "os.posix_spawn": "program",
    "os.system": "program",
    "ctypes.dlsym": "native",
    "ctypes.dlsym/handle": "native",
}


def watch(report: Callable[[Attempt], None], programs: frozenset[str] = PROGRAMS) -> None:
    """Report attempts from now until the process ends; a hook cannot be taken off. `programs` may be started.

    `report` is called in the thread that asked, before the attempt is made, and must not raise.
    """
    state = threading.local()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        what = _WATCHED.get(event)
        if what is None or getattr(state, "is_busy", False):
            return
        state.is_busy = True
        try:
            frame = sys._getframe(1)
            detail = _detail(event, arguments, programs)
            if detail is not None and not (what == "socket" and _wraps_descriptor(frame)):
                report(Attempt(what, detail[:_MAX_DETAIL], _culprit(frame)))
        finally:
            state.is_busy = False

    sys.addaudithook(hook)


class AttemptBox:
    """Attempts that wait to be sent, those of one culprit as one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, str], Attempt] = {}

    def put(self, attempt: Attempt) -> None:
        """From any thread."""
        key = (attempt.what, attempt.culprit)
        with self._lock:
            before = self._waiting.get(key)
            times = attempt.times + (before.times if before else 0)
            self._waiting[key] = msgspec.structs.replace(attempt, times=times)

    def take(self) -> list[Attempt]:
        """All that wait."""
        if not self._waiting:
            return []
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        return list(waiting.values())


def _detail(event: str, arguments: tuple[object, ...], programs: frozenset[str]) -> str | None:
    """What was asked for; None where it leads nowhere."""
    match event:
        case "socket.__new__":
            family = arguments[1]
            # -1 stands for a descriptor that is wrapped.
            return None if family in (socket.AF_UNIX, -1) else _family(family)
        case "socket.connect":
            return repr(arguments[1])
        case "socket.sendto" | "socket.sendmsg":
            address = arguments[1]
            is_unix = isinstance(arguments[0], socket.socket) and arguments[0].family == socket.AF_UNIX
            return None if address is None or is_unix else repr(address)
        case "socket.getaddrinfo" | "socket.gethostbyname" | "socket.gethostbyaddr" | "socket.getnameinfo":
            return repr(arguments[0])
        case "ctypes.dlsym" | "ctypes.dlsym/handle":
            return str(arguments[1]) if arguments[1] in NATIVE else None
        case _:
            return _program(arguments, programs)


def _wraps_descriptor(frame: FrameType) -> bool:
    """Whether `socket.socket` makes an object for a socket that is there, such as an accepted one."""
    return frame.f_code.co_filename == socket.__file__ and frame.f_locals.get("fileno") is not None


def _program(arguments: tuple[object, ...], programs: frozenset[str]) -> str | None:
    path = arguments[0]
    if path is None and len(arguments) > 1 and isinstance(arguments[1], list | tuple) and arguments[1]:
        path = arguments[1][0]
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else repr(path)
    return None if text in programs or Path(text).name in programs else text


def _family(number: object) -> str:
    try:
        return socket.AddressFamily(number).name  # type: ignore[arg-type]
    except ValueError:
        return f"family {number}"


def _culprit(frame: FrameType | None) -> str:
    """`file:line function` of the innermost code that is not the standard library's, or the innermost of all."""
    innermost = frame
    while frame is not None:
        path = frame.f_code.co_filename
        is_library = path.startswith(STANDARD_LIBRARY) and "-packages" not in path
        if path != __file__ and not is_library and not path.startswith("<frozen"):
            innermost = frame
            break
        frame = frame.f_back
    if innermost is None:
        return "unknown"
    parts = Path(innermost.f_code.co_filename).parts[-3:]
    return f"{'/'.join(parts)}:{innermost.f_lineno} {innermost.f_code.co_name}"
