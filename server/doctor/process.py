"""Isolation and rights of one process, as the kernel tells them in /proc: the server's, or the one that asks."""

from __future__ import annotations

import re
from pathlib import Path

from vashista.engine.errors import DoctorOptionError
from vashista.server.doctor.finding import Finding, not_ok, ok
from vashista.server.isolation.network import look

PROC = Path("/proc")


class Process:
    """A process by its number, or this one. DoctorOptionError when there is none or it may not be read."""

    def __init__(self, pid: int | None = None, proc: Path = PROC) -> None:
        self.folder = proc / ("self" if pid is None else str(pid))
        self.whose = "this process" if pid is None else f"process {pid}"
        try:
            self._status = (self.folder / "status").read_text()
        except OSError as error:
            raise DoctorOptionError(f"There is no process {pid} to look at: {error.strerror}.") from error

    def isolation(self, mode: str = "none") -> Finding:
        """Whether it has a way to any network; `mode` is the setting isolation."""
        name = "isolation"
        try:
            network = look(self.folder)
        except OSError as error:
            return not_ok(
                name,
                f"{error.filename} of {self.whose} cannot be read: {error.strerror}.",
                "Run this as root, or as the server's user.",
            )
        if not network.is_reachable:
            return ok(name, f"{self.whose} has no interface but lo and no route")
        if mode == "lan":
            return not_ok(
                name,
                f"MODE LAN: {self.whose} is on a network ({network}), as the setting isolation says.",
                "None where this is wanted. Else set isolation = required, and run the server in a unit with "
                "PrivateNetwork=yes or a container with --network none.",
            )
        return not_ok(
            name,
            f"{self.whose} can reach a network: {network}.",
            "Set isolation = required. Run the server in a unit with PrivateNetwork=yes or a container with "
            "--network none, and look with --pid at the server, or from within the container.",
        )

    def network_filter(self) -> Finding:
        """Whether the kernel filters its system calls, so that it can open no socket but Unix ones."""
        name = "network filter"
        count = self._field("Seccomp_filters")
        if self._field("Seccomp") != "2":
            return not_ok(
                name,
                f"The kernel filters no system calls of {self.whose}.",
                "Set network_filter = on, and look with --pid at the server.",
            )
        return ok(name, f"{self.whose} is under {count} filters of the kernel; the server tries its own at each start")

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
