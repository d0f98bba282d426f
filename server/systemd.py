"""What systemd and the server say to each other: the listening socket it passes, readiness, signs of life, the end.

`server/serve.py` makes one `ServiceManager` from the environment at its start. Messages are datagrams to a Unix socket
(sd_notify(3)), so that they need no network; without systemd there is nobody to tell, and nothing is sent. It connects
at once: the kernel's filter, which comes later, lets nobody send to an address.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, MutableMapping

from vashista.engine.errors import SettingsError

logger = logging.getLogger(__name__)
FIRST_FD = 3
"""SD_LISTEN_FDS_START of sd_listen_fds(3)."""
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


class ServiceManager:
    """systemd as its environment variables describe it; they are taken out, so that no child answers to them."""

    def __init__(self, environ: MutableMapping[str, str], pid: int | None = None) -> None:
        values = {name: environ.pop(name) for name in _VARIABLES if name in environ}
        pid = os.getpid() if pid is None else pid
        self._socket = _connected(values.get("NOTIFY_SOCKET", ""))
        is_watched = values.get("WATCHDOG_PID", str(pid)) == str(pid)
        self._watchdog_s = _number(values.get("WATCHDOG_USEC", "0")) / 1e6 if is_watched else 0.0
        is_ours = values.get("LISTEN_PID") == str(pid)
        self.num_sockets = _number(values.get("LISTEN_FDS", "0")) if is_ours else 0
        """Listening sockets that were passed to this process, from FIRST_FD on."""

    def passed_socket(self) -> int | None:
        """The descriptor of the listening socket that was passed, None without one; SettingsError for several."""
        if self.num_sockets > 1:
            raise SettingsError(
                f"{self.num_sockets} listening sockets were passed; the server takes one. A ListenStream with a port "
                "alone, such as 8000, listens on all addresses.",
                param="fd",
            )
        return FIRST_FD if self.num_sockets else None

    def tell(self, *lines: str) -> None:
        """Send assignments such as READY=1. What cannot be sent is logged: systemd then acts on its own timeouts."""
        if self._socket is None:
            return
        try:
            self._socket.send("\n".join(lines).encode())
        except OSError as error:
            logger.warning("systemd cannot be told %s: %s", lines[0], error.strerror)

    def close(self) -> None:
        """Nothing more will be told."""
        if self._socket is not None:
            self._socket.close()

    @contextlib.asynccontextmanager
    async def signs_of_life(self) -> AsyncIterator[None]:
        """Tell systemd twice in each WatchdogSec that the event loop turns; it restarts a server whose loop hangs."""
        task = asyncio.create_task(self._live()) if self._watchdog_s else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()

    async def _live(self) -> None:
        while True:
            self.tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s / 2)


def _connected(address: str) -> socket.socket | None:
    """A socket that leads to systemd; None where there is none, with a word in the log where there should be one."""
    if not address:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
    except OSError as error:
        sock.close()
        logger.warning("systemd cannot be told anything at %s: %s", address, error.strerror)
        return None
    return sock


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
