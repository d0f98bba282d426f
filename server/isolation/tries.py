"""Tries at the start what the filter must refuse, so that a filter that is not what it should be is found by us.

No try can send anything, whether it is refused or not: sockets are opened and closed, and the one connection that is
tried leads to a socket of this process. Names are not resolved and no address of a network is used.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import select
import socket
from collections.abc import Callable, Iterator

from vashista.engine.errors import IsolationMissingError
from vashista.server.isolation.filter import architecture

logger = logging.getLogger(__name__)
REPORT_TIMEOUT_S = 2.0
FAMILIES = (
    ("a TCP socket", "AF_INET", socket.SOCK_STREAM),
    ("a UDP socket", "AF_INET", socket.SOCK_DGRAM),
    ("a TCP socket of IPv6", "AF_INET6", socket.SOCK_STREAM),
    ("a UDP socket of IPv6", "AF_INET6", socket.SOCK_DGRAM),
    ("a raw socket", "AF_INET", socket.SOCK_RAW),
    ("a packet socket", "AF_PACKET", socket.SOCK_RAW),
    ("a netlink socket", "AF_NETLINK", socket.SOCK_RAW),
    ("a socket to the hypervisor", "AF_VSOCK", socket.SOCK_STREAM),
)


def check(sentry: socket.socket | None) -> None:
    """Try everything; IsolationMissingError names what was possible. What the supervisor reports of it is taken out."""
    ways = list(_ways())
    open_ways = [name for name, is_open in ways if is_open()]
    if open_ways:
        raise IsolationMissingError(f"The filter is on, but this was possible: {', '.join(open_ways)}.")
    if sentry is not None:
        _take_reports(sentry)
    logger.info("tried what must fail", extra={"fields": {"ways": len(ways), "possible": 0}})


def _ways() -> Iterator[tuple[str, Callable[[], bool]]]:
    """Names, and what says whether it is possible. The connection is last: `_take_reports` waits for it."""
    for name, family, kind in FAMILIES:
        if hasattr(socket, family):
            yield name, lambda family=family, kind=kind: _opens(getattr(socket, family), kind)  # type: ignore[misc]
    yield "io_uring", _sets_up_io_uring
    yield "a connection", _connects


def _opens(family: int, kind: int) -> bool:
    try:
        socket.socket(family, kind).close()
    except OSError:
        return False
    return True


def _sets_up_io_uring() -> bool:
    known = architecture()
    assert known is not None, "only where the filter is known is it on"
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    descriptor = library.syscall(known.numbers["io_uring_setup"], 1, ctypes.create_string_buffer(256))
    if descriptor < 0:
        return False
    os.close(int(descriptor))
    return True


def _connects() -> bool:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind("")  # the kernel chooses an abstract name
        listener.listen()
        try:
            client.connect(listener.getsockname())
        except OSError:
            return False
    return True


def _take_reports(sentry: socket.socket) -> None:
    while True:
        if not select.select([sentry], [], [], REPORT_TIMEOUT_S)[0]:
            logger.warning("another filter refuses before ours does: what that one refuses is not counted")
            return
        message = sentry.recv(4096)
        if not message:
            raise IsolationMissingError("The supervisor of the filter has ended.")
        if json.loads(message).get("call") == "connect":
            return
