"""The network that a process can reach, as the kernel tells it in /proc, and the way to leave it behind.

Nothing is sent to find out. A process without an interface but `lo`, and without a route, cannot reach a network
whatever its program does; that is stronger than a filter, and visible from outside.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from pathlib import Path

SELF = Path("/proc/self")
_IPV6_UNREACHABLE = 0x0200
"""RTF_REJECT of include/uapi/linux/route.h: the kernel's own entry for what cannot be reached."""
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_CAPSET_VERSION = 0x20080522
_CAPSET = {"x86_64": 126, "aarch64": 91}


@dataclass(frozen=True)
class Network:
    """What a process has of a network."""

    interfaces: tuple[str, ...]
    """All but `lo`."""
    num_routes: int
    """Routes that lead anywhere but to `lo`."""

    @property
    def is_reachable(self) -> bool:
        """Whether there is any way out."""
        return bool(self.interfaces or self.num_routes)

    def __str__(self) -> str:
        return f"interfaces {', '.join(self.interfaces) or 'none'}, {self.num_routes} routes"


def look(folder: Path = SELF) -> Network:
    """The network of the process whose /proc folder is given; OSError when that cannot be read."""
    lines = (folder / "net/dev").read_text().splitlines()[2:]
    names = [line.partition(":")[0].strip() for line in lines]
    return Network(tuple(name for name in names if name != "lo"), _count_routes(folder))


def _count_routes(folder: Path) -> int:
    count = 0
    for line in (folder / "net/route").read_text().splitlines()[1:]:
        count += line.split()[0] != "lo"
    ipv6 = folder / "net/ipv6_route"
    if ipv6.exists():
        for line in ipv6.read_text().splitlines():
            *_, flags, interface = line.split()
            count += interface != "lo" and not int(flags, 16) & _IPV6_UNREACHABLE
    return count


def leave() -> None:
    """Move this process to a network of its own that has nothing but `lo`. OSError when the kernel refuses.

    Sockets that are open stay what they are: a listening one goes on taking clients of the old network. An ordinary
    user needs a user namespace for it, and gives up at once what rights that brings. The process must not have other
    threads.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        _check(library.unshare(_CLONE_NEWNET))
        return
    user, group = os.geteuid(), os.getegid()
    _check(library.unshare(_CLONE_NEWUSER | _CLONE_NEWNET))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    library.syscall.restype = ctypes.c_long
    header = struct.pack("Ii", _CAPSET_VERSION, 0)
    _check(library.syscall(_CAPSET[os.uname().machine], header, bytes(24)))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
