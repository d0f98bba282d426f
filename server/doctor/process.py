"""Isolation and rights of one process, as the kernel tells them in /proc: the server's, or the one that asks.

Nothing is sent to find out. A process without an interface but `lo`, and without a route, cannot reach a network
whatever its program does; that is stronger than a filter, and visible from outside.
"""

from __future__ import annotations

import re
from pathlib import Path

from vashista.engine.errors import DoctorOptionError
from vashista.server.doctor.finding import Finding, not_ok, ok

PROC = Path("/proc")
_IPV6_UNREACHABLE = 0x0200
"""RTF_REJECT of include/uapi/linux/route.h: the kernel's own entry for what cannot be reached."""


class Process:
    """A process by its number, or this one. DoctorOptionError when there is none or it may not be read."""

    def __init__(self, pid: int | None = None, proc: Path = PROC) -> None:
        self.folder = proc / ("self" if pid is None else str(pid))
        self.whose = "this process" if pid is None else f"process {pid}"
        try:
            self._status = (self.folder / "status").read_text()
        except OSError as error:
            raise DoctorOptionError(f"There is no process {pid} to look at: {error.strerror}.") from error

    def isolation(self) -> Finding:
        """Whether it has a way to any network."""
        name = "isolation"
        try:
            found = self._interfaces()
            routes = self._routes()
        except OSError as error:
            return not_ok(
                name,
                f"{error.filename} of {self.whose} cannot be read: {error.strerror}.",
                "Run this as root, or as the server's user.",
            )
        if found or routes:
            what = f"interfaces {', '.join(found) or 'none'}, {routes} routes"
            return not_ok(
                name,
                f"{self.whose} can reach a network: {what}.",
                "Run the server in a unit with PrivateNetwork=yes or a container with --network none, and look with "
                "--pid at the server, or from within the container.",
            )
        return ok(name, f"{self.whose} has no interface but lo and no route")

    def rights(self) -> Finding:
        """Whether it is an ordinary user's, without capabilities, and can gain none."""
        name = "rights"
        user = int(self._field("Uid").split()[0])
        capabilities = int(self._field("CapEff"), 16) | int(self._field("CapPrm"), 16) | int(self._field("CapAmb"), 16)
        wrong = []
        if user == 0:
            wrong.append("runs as root")
        if capabilities:
            wrong.append(f"has the capabilities {capabilities:x}")
        if self._field("NoNewPrivs") != "1":
            wrong.append("may gain rights by set-uid programs")
        if wrong:
            return not_ok(
                name,
                f"{self.whose} {', '.join(wrong)}.",
                "Run the server as a user of its own with NoNewPrivileges=yes and no capabilities, as docker/ does, "
                "and look with --pid at the server.",
            )
        return ok(name, f"{self.whose} runs as user {user}, without capabilities, and can gain none")

    def _field(self, name: str) -> str:
        match = re.search(rf"^{name}:\s*(.*)$", self._status, re.MULTILINE)
        return match[1] if match else "0"

    def _interfaces(self) -> list[str]:
        """All but lo."""
        lines = (self.folder / "net/dev").read_text().splitlines()[2:]
        return [name for line in lines if (name := line.partition(":")[0].strip()) != "lo"]

    def _routes(self) -> int:
        """Routes that lead anywhere but to lo, of both families."""
        count = 0
        for line in (self.folder / "net/route").read_text().splitlines()[1:]:
            count += line.split()[0] != "lo"
        ipv6 = self.folder / "net/ipv6_route"
        if ipv6.exists():
            for line in ipv6.read_text().splitlines():
                *_, flags, interface = line.split()
                count += interface != "lo" and not int(flags, 16) & _IPV6_UNREACHABLE
        return count
