"""uvicorn, as this server uses it: HTTP/1.1 over sockets that are already there, no signals, no websockets.

`server/serve.py` runs it; it calls the application of `server/app.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn

from vashista.server.app import build_app
from vashista.server.http_protocol import HttpProtocol
from vashista.server.listening import BACKLOG
from vashista.server.services import Services
from vashista.server.tls import Tls
from vashista.server.visitors import Visitors

KEEP_ALIVE_S = 75
LAST_WRITES_S = 5
"""How long a client may take to read what is already written when the server ends."""
FIRST_REQUEST_S = 1.0
"""How long a server that leaves its socket to the next one waits for the request of a connection that it has taken."""


class HttpServer(uvicorn.Server):
    """uvicorn without its own idea of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `Server` in `server/serve.py`."""
        yield

    async def hand_over(self) -> None:
        """Take no more connections: they wait in the socket for the next server. Those that are there end in order."""
        while not self.started:
            await asyncio.sleep(0.01)
        for server in self.servers:
            server.close()
        for connection in self._connections():
            connection.retire()
        end_s = asyncio.get_running_loop().time() + FIRST_REQUEST_S
        while any(connection.is_new for connection in self._connections()):
            if asyncio.get_running_loop().time() > end_s:
                return
            await asyncio.sleep(0.01)

    async def wait_answered(self) -> None:
        """Return when no request that has begun lacks its reply."""
        while any(connection.is_answering for connection in self._connections()):
            await asyncio.sleep(0.01)

    def _connections(self) -> list[HttpProtocol]:
        return [connection for connection in self.server_state.connections if isinstance(connection, HttpProtocol)]


class _Config(uvicorn.Config):
    """uvicorn's, with a TLS context that can be renewed."""

    def __init__(self, *args: Any, tls: Tls | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tls = tls

    def load(self) -> None:
        """Load the application; connections are encrypted where there is a certificate."""
        super().load()
        self.ssl = None if self._tls is None else self._tls.context


def uvicorn_config(services: Services, tls: Tls | None = None) -> uvicorn.Config:
    """The application over the services, and how it is served."""
    return _Config(
        build_app(services),
        http=partial(
            HttpProtocol,
            write_timeout_s=services.settings.write_timeout_s,
            visitors=Visitors(services.settings.client_networks, services.metrics.clients_refused.inc),
        ),
        tls=tls,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_WRITES_S,
    )
