"""The kernel's filter on system calls (seccomp): no new socket but Unix ones, no connection to anywhere, no way around.

`server/isolation/confinement.py` installs it once at the server's start; every process that the server starts inherits
it, and nobody can take it off again. What it refuses:

- sockets of any family but AF_UNIX (socket, socketpair);
- connect, whatever the socket: the listening socket that systemd passes in belongs to the *machine's* network, and
  after shutdown(2) it could be connected from within an unit that has no network of its own. Unix sockets cannot be
  connected either: behind them answer resolvers, container engines and message buses;
- sending to an address: by UDP, TCP Fast Open, or a datagram to a Unix socket; a log daemon behind one may forward it.
  An address in `sendmsg` lies where no filter can look, so that the call is refused whole, and with `recvmsg` the only
  way to be handed an open socket by somebody who has a network;
- io_uring, which does all that without the calls above; entering the namespaces, the memory or the files of others;
- the kernel's keyrings: for a key that is not there, the kernel starts a program of the *machine's*, and that one may
  resolve a name (keyutils' dns_resolver);
- typing into the terminal (TIOCSTI): the shell that the server was started from would run it, without this filter;
- calls of another architecture than the one it was written for, where the numbers mean something else.

Two forms: one answers with an error number; the other asks a supervisor first (`server/isolation/sentry.py`), which
counts and gives the same answer. Format: struct sock_filter of linux/filter.h, seccomp(2). A filter sees numbers, never
what pointers point to, so that nothing here depends on memory that could change after the look.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import termios
from dataclasses import dataclass

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_SET_MODE_FILTER, _NEW_LISTENER = 1, 1 << 3
_ALLOW, _ERRNO, _USER_NOTIF, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x7FC00000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_X32_BIT = 0x40000000


@dataclass(frozen=True)
class Rule:
    """One refused call. `argument` None refuses it always."""

    name: str
    error: int
    argument: int | None = None
    other_than: int = 0
    """Refused unless the argument is this; all 64 bits count where that is 0, as for an address."""
    equal_to: int = 0
    """Where given, refused only if the argument is this."""


RULES = (
    Rule("socket", errno.EAFNOSUPPORT, argument=0, other_than=socket.AF_UNIX),
    Rule("socketpair", errno.EAFNOSUPPORT, argument=0, other_than=socket.AF_UNIX),
    Rule("connect", errno.ECONNREFUSED),
    Rule("sendto", errno.EPERM, argument=4),
    Rule("sendmsg", errno.EPERM),
    Rule("sendmmsg", errno.EPERM),
    Rule("recvmsg", errno.EPERM),
    Rule("recvmmsg", errno.EPERM),
    Rule("io_uring_setup", errno.ENOSYS),
    Rule("io_uring_enter", errno.ENOSYS),
    Rule("io_uring_register", errno.ENOSYS),
    Rule("setns", errno.EPERM),
    Rule("ptrace", errno.EPERM),
    Rule("process_vm_readv", errno.EPERM),
    Rule("process_vm_writev", errno.EPERM),
    Rule("pidfd_getfd", errno.EPERM),
    Rule("add_key", errno.EPERM),
    Rule("request_key", errno.EPERM),
    Rule("keyctl", errno.EPERM),
    Rule("ioctl", errno.EPERM, argument=1, equal_to=termios.TIOCSTI),
)


@dataclass(frozen=True)
class Architecture:
    """Numbers of one kind of machine: AUDIT_ARCH_* of linux/audit.h and the calls of asm/unistd.h."""

    audit: int
    seccomp: int
    numbers: dict[str, int]
    has_x32: bool = False

    @property
    def names(self) -> dict[int, str]:
        """The names of the numbers."""
        return {number: name for name, number in self.numbers.items()}


ARCHITECTURES = {
    "x86_64": Architecture(
        0xC000003E,
        317,
        {
            **{"socket": 41, "connect": 42, "sendto": 44, "sendmsg": 46, "socketpair": 53, "ptrace": 101},
            **{"sendmmsg": 307, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311},
            **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "pidfd_getfd": 438},
            **{"recvmsg": 47, "recvmmsg": 299, "add_key": 248, "request_key": 249, "keyctl": 250, "ioctl": 16},
        },
        has_x32=True,
    ),
    "aarch64": Architecture(
        0xC00000B7,
        277,
        {
            **{"socket": 198, "socketpair": 199, "connect": 203, "sendto": 206, "sendmsg": 211, "ptrace": 117},
            **{"sendmmsg": 269, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271},
            **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "pidfd_getfd": 438},
            **{"recvmsg": 212, "recvmmsg": 243, "add_key": 217, "request_key": 218, "keyctl": 219, "ioctl": 29},
        },
    ),
}


def architecture(machine: str | None = None) -> Architecture | None:
    """This machine's, None where the filter is not known."""
    return ARCHITECTURES.get(machine or platform.machine())


def program(known: Architecture, *, asks_supervisor: bool) -> bytes:
    """The filter as an array of struct sock_filter: a test for each call, in order; what none refuses is allowed."""
    code = [
        _statement(_LOAD, _ARCHITECTURE_AT),
        _jump(_EQUAL, known.audit, if_true=1),
        _statement(_RETURN, _KILL_PROCESS),
        _statement(_LOAD, _NUMBER_AT),
    ]
    if known.has_x32:
        code += [_jump(_AT_LEAST, _X32_BIT, if_false=1), _statement(_RETURN, _ERRNO | errno.ENOSYS)]
    for rule in RULES:
        answer = _statement(_RETURN, _USER_NOTIF if asks_supervisor else _ERRNO | rule.error)
        allow = _statement(_RETURN, _ALLOW)
        if rule.argument is None:
            test = [answer]
        elif rule.equal_to:
            load = _statement(_LOAD, _argument_at(rule.argument))
            test = [load, _jump(_EQUAL, rule.equal_to, if_false=1), answer, allow]
        elif rule.other_than:
            load = _statement(_LOAD, _argument_at(rule.argument))
            test = [load, _jump(_EQUAL, rule.other_than, if_true=1), answer, allow]
        else:
            low, high = (_statement(_LOAD, _argument_at(rule.argument) + half) for half in (0, 4))
            test = [low, _jump(_EQUAL, 0, if_false=2), high, _jump(_EQUAL, 0, if_true=1), answer, allow]
        code += [_jump(_EQUAL, known.numbers[rule.name], if_false=len(test)), *test]
    return b"".join([*code, _statement(_RETURN, _ALLOW)])


def install(known: Architecture, code: bytes, *, with_listener: bool = False) -> int | None:
    """Put the filter on this process, for ever, and give up set-uid rights with it; OSError when the kernel refuses.

    With a listener, the descriptor on which a supervisor gets what the filter asks. The calling process must not have
    other threads yet: they would stay without.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise _last_error()
    buffer = ctypes.create_string_buffer(code, len(code))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer)))
    if not with_listener:
        if library.prctl(_PR_SET_SECCOMP, _MODE_FILTER, head, 0, 0):
            raise _last_error()
        return None
    library.syscall.restype = ctypes.c_long
    descriptor = library.syscall(known.seccomp, _SET_MODE_FILTER, _NEW_LISTENER, head)
    if descriptor < 0:
        raise _last_error()
    return int(descriptor)


def _argument_at(index: int) -> int:
    """Where the lower half of an argument stands in struct seccomp_data, on little-endian machines."""
    return 16 + 8 * index


def _statement(code: int, value: int) -> bytes:
    return struct.pack("HBBI", code, 0, 0, value)


def _jump(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
