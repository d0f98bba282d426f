"""Which clients may connect, by their network address: the setting client_networks.

`server/http_protocol.py` asks for each connection, before a byte of it is read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

logger = logging.getLogger(__name__)
LOG_PAUSE_S = 1.0


class Visitors:
    """The networks that are let in; everybody without networks. `count` is called for each client that is not."""

    def __init__(self, networks: Sequence[IPv4Network | IPv6Network] | None, count: Callable[[], None]) -> None:
        self._networks = None if networks is None else tuple(networks)
        self._count = count
        self._logged_s = -LOG_PAUSE_S

    def may_come(self, peer: object) -> bool:
        """Whether a client at this address of a socket is answered. Those of a Unix socket are: files guard it."""
        if self._networks is None or not isinstance(peer, tuple | list):
            return True
        address = ip_address(str(peer[0]).partition("%")[0])
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped  # a socket of both families shows IPv4 clients so
        if any(address in network for network in self._networks):
            return True
        self._count()
        now_s = time.monotonic()
        if now_s - self._logged_s >= LOG_PAUSE_S:
            self._logged_s = now_s
            logger.warning(
                "a client was refused: its network is not in client_networks", extra={"fields": {"client": address}}
            )
        return False
