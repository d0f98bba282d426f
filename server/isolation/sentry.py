"""The supervisor of the filter: a process beside the server that refuses, counts and reports what the filter asks it.

`server/isolation/confinement.py` starts this file by its path, with `-I -S`: it imports the standard library alone and
takes some 15 ms. It inherits the descriptor of the filter's questions (seccomp_unotify(2)), whose number is its
argument, and the filter itself; on its standard input, a Unix socket that keeps messages apart, comes a filter that
asks nobody, which goes before the other. It answers each question with the error number of the call, and sends the
server a message of JSON about who asked. It is a process of its own because the thread that asks stands still until the
answer: a supervisor in the same interpreter would wait for a lock that the asker may hold.
When it dies, the kernel refuses by itself (ENOSYS); it ends with the server.
"""

import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys

NOTIFICATION = struct.Struct("<QIIiIQ6Q")
"""struct seccomp_notif: id, pid, flags; then struct seccomp_data: number, architecture, instruction, arguments."""
RESPONSE = struct.Struct("<QqiI")
RECEIVE = 0xC0502100
"""SECCOMP_IOCTL_NOTIF_RECV for a notification of 80 bytes."""
SEND = 0xC0182101
"""SECCOMP_IOCTL_NOTIF_SEND for a response of 24 bytes."""
FAMILIES = {int(value): name for name, value in socket.__dict__.items() if name.startswith("AF_")}
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 1, 15, 38, 22, 2
MAX_MESSAGE = 1 << 16
ADDRESS_BYTES = 128
"""Of the longest address, struct sockaddr_storage."""
DRIVER = "libcuda.so"
UNTOLD_MS = 1000
"""How soon the server is told again of calls that it was too busy to hear of."""


def main() -> int:
    """Serve until the server or all that the filter is on are gone."""
    server = socket.socket(fileno=0)
    questions = int(sys.argv[1])
    setup = json.loads(server.recv(MAX_MESSAGE))
    confine(bytes.fromhex(setup["filter"]))
    calls = {int(number): (name, error) for number, (name, error) in setup["calls"].items()}
    server.send(b"ready")
    server.setblocking(False)
    num_untold = 0
    poll = select.poll()
    poll.register(questions, select.POLLIN)
    poll.register(server, select.POLLRDHUP)
    while True:
        events = poll.poll(UNTOLD_MS if num_untold else None)
        report: dict[str, object] | None = {} if num_untold else None
        for descriptor, event in events:
            if descriptor == server.fileno() or event & (select.POLLHUP | select.POLLERR):
                return 0
            report = answer(questions, calls)
        if report is None:
            continue
        try:
            server.send(json.dumps({**report, "num_untold": num_untold}).encode())
            num_untold = 0
        except BlockingIOError:
            num_untold += bool(report)  # the server is busy: nobody waits for it, the next message says how many
        except OSError:
            return 0


def confine(code: bytes) -> None:
    """End with the server, not with Ctrl-C before it; be refused what it is refused."""
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.SIG_IGN)
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    library.prctl(PR_SET_NAME, b"vashista-sentry", 0, 0, 0)
    library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer)))
    if library.prctl(PR_SET_SECCOMP, MODE_FILTER, head, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def answer(questions: int, calls: dict[int, tuple[str, int]]) -> dict[str, object] | None:
    """Refuse one call; what there is to say about it, None when the asker is gone."""
    buffer = bytearray(NOTIFICATION.size)
    try:
        fcntl.ioctl(questions, RECEIVE, buffer)
        notice, thread, _, number, _, instruction, *arguments = NOTIFICATION.unpack(buffer)
        name, error = calls.get(number, (f"call {number}", errno.EPERM))
        report = {"call": name, "detail": describe(name, arguments, thread), **asker(thread, instruction)}
        fcntl.ioctl(questions, SEND, bytearray(RESPONSE.pack(notice, 0, -error, 0)))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    return report


def describe(name: str, arguments: list[int], thread: int) -> str:
    """What was asked for, where it can be told. Nothing is decided by it: the asker may change its memory meanwhile."""
    if name in ("socket", "socketpair"):
        return family(arguments[0] & 0xFFFFFFFF)
    if name in ("connect", "sendto"):
        start, length = arguments[1:3] if name == "connect" else arguments[4:6]
        try:
            with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
                memory.seek(start)
                return address(memory.read(min(length & 0xFFFFFFFF, ADDRESS_BYTES)))
        except (OSError, OverflowError, ValueError):
            return ""  # it may not be read, or is none
    return ""


def address(data: bytes) -> str:
    """struct sockaddr_un, sockaddr_in or sockaddr_in6 in words; the family alone of others."""
    number = int.from_bytes(data[:2], "little")
    if number == socket.AF_UNIX:
        path = data[2:].split(b"\0")[0] if data[2:3] != b"\0" else b"@" + data[3:]
        return f"{family(number)} {os.fsdecode(path)!r}"
    port = int.from_bytes(data[2:4], "big")
    if number == socket.AF_INET and len(data) >= 8:
        return f"{family(number)} {socket.inet_ntop(number, data[4:8])}:{port}"
    if number == socket.AF_INET6 and len(data) >= 24:
        return f"{family(number)} [{socket.inet_ntop(number, data[8:24])}]:{port}"
    return family(number)


def family(number: int) -> str:
    """AF_ and a word, where Python has one."""
    return FAMILIES.get(number, f"family {number}")


def asker(thread: int, instruction: int) -> dict[str, object]:
    """Who stands still until the answer, as far as it may be read: its program, the file that the call lies in, and
    whether NVIDIA's driver is part of it."""
    found: dict[str, object] = {"pid": thread, "parent": 0, "program": "", "file": "", "has_driver": False}
    try:
        with open(f"/proc/{thread}/status") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        found |= {"pid": int(status["Tgid"]), "parent": int(status["PPid"]), "program": status["Name"]}
        with open(f"/proc/{thread}/maps") as file:
            for line in file:
                start, end = (int(text, 16) for text in line.partition(" ")[0].split("-"))
                name = line.rstrip("\n").split(maxsplit=5)[5].rpartition("/")[2] if "/" in line else ""
                if start <= instruction < end:
                    found["file"] = name
                found["has_driver"] = found["has_driver"] or name.startswith(DRIVER)
    except (OSError, KeyError, ValueError):
        pass
    return found


if __name__ == "__main__":
    sys.exit(main())
