"""Ways to reach out of a process; each raises OSError where it is refused.

test_isolation.py tries them in a process that it confines, test_plants.py in a server and its engine while they serve:
code that nobody wanted there, as a dependency may bring it along.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

NUMBERS = {
    "x86_64": {"socket": 41, "connect": 42, "process_vm_readv": 310, "process_vm_writev": 311, "io_uring_setup": 425,
               "pidfd_getfd": 438, "request_key": 249, "setns": 308, "ptrace": 101, "sendmmsg": 307},
    "aarch64": {"socket": 198, "connect": 203, "process_vm_readv": 270, "process_vm_writev": 271, "io_uring_setup": 425,
                "pidfd_getfd": 438, "request_key": 218, "setns": 268, "ptrace": 117, "sendmmsg": 269},
}  # fmt: skip
MSG_FASTOPEN = 0x20000000
OPEN_INET = "import socket; socket.socket(socket.AF_INET)"
LOOPBACK = ("127.0.0.1", 9)
PTRACE_SEIZE = 0x4206


def raw(name: str, *arguments: object) -> int:
    """A system call by its number."""
    library = ctypes.CDLL(None, use_errno=True)
    result: int = library.syscall(NUMBERS[os.uname().machine][name], *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def must_succeed(status: int) -> None:
    if status:
        raise OSError(0, "refused")


def tcp() -> None:
    socket.socket().close()


def udp() -> None:
    socket.socket(type=socket.SOCK_DGRAM).close()


def ipv6() -> None:
    socket.socket(socket.AF_INET6).close()


def netlink() -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()


def hypervisor() -> None:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()


def raw_socket() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()


def packet_socket() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


def raw_call() -> None:
    os.close(raw("socket", socket.AF_INET, socket.SOCK_STREAM, 0))


def raw_connect() -> None:
    """The number of connect itself, on a socket that may be had."""
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("")
        server.listen()
        name = server.getsockname()
        raw("connect", client.fileno(), struct.pack("=H", socket.AF_UNIX) + name, 2 + len(name))


def libc() -> None:
    library = ctypes.CDLL(None, use_errno=True)
    descriptor = library.socket(socket.AF_INET, socket.SOCK_DGRAM, 0)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "socket")
    os.close(descriptor)


def high_bits() -> None:
    """A family whose upper half is not zero: the kernel takes an int, a filter of 64 bits would be fooled."""
    os.close(
        raw("socket", ctypes.c_uint64(0xDEADBEEF00000000 | socket.AF_INET), ctypes.c_uint64(1), ctypes.c_uint64(0))
    )


def pair() -> None:
    """The kernel itself has no such pairs, so that only another error than its own says that it was the filter."""
    try:
        socket.socketpair(socket.AF_INET)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise


def unix() -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("")
        server.listen()
        client.connect(server.getsockname())


def unix_datagram() -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own,
    ):
        log.bind("")
        own.sendto(b"x", log.getsockname())


def handed_in() -> None:
    giver, taker = socket.socketpair()
    with giver, taker, open("/dev/null") as file:
        giver.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", file.fileno()))])
        os.close(socket.recv_fds(taker, 1, 1)[1][0])


def many_messages() -> None:
    giver, taker = socket.socketpair()
    with giver, taker:
        raw("sendmmsg", giver.fileno(), ctypes.create_string_buffer(64), 1, 0)


def program() -> None:
    must_succeed(subprocess.run([sys.executable, "-c", OPEN_INET], stderr=subprocess.DEVNULL, check=False).returncode)


def shell() -> None:
    command = ["bash", "-c", "exec 3<>/dev/udp/127.0.0.1/9"]
    must_succeed(subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode)


def forked() -> None:
    child = os.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, "-c", OPEN_INET])
    must_succeed(os.waitpid(child, 0)[1])


def spawned() -> None:
    must_succeed(os.waitpid(os.posix_spawn(sys.executable, [sys.executable, "-c", OPEN_INET], {}), 0)[1])


def orphan() -> None:
    """A grandchild in a session of its own, whose parent is gone."""
    code = f"import os, subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {OPEN_INET!r}]).returncode)"
    command = [sys.executable, "-c", code]
    must_succeed(subprocess.run(command, start_new_session=True, stderr=subprocess.DEVNULL, check=False).returncode)


def another_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(tcp).result()


def event_loop() -> None:
    async def open_and_close() -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, remote_addr=LOOPBACK)
        transport.close()

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(open_and_close())


def proxy() -> None:
    """By a proxy of one's own; that nobody listens there says that it was asked for."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": "http://127.0.0.1:9"}))
    try:
        opener.open("http://192.0.2.1/", timeout=1)
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ConnectionRefusedError):
            raise


def name() -> None:
    socket.getaddrinfo("name.invalid", 1)


def memory(call: str) -> None:
    here = ctypes.create_string_buffer(8)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(here), 8)
    raw(call, os.getpid(), ctypes.byref(vector), 1, ctypes.byref(vector), 1, 0)


def read_memory() -> None:
    memory("process_vm_readv")


def write_memory() -> None:
    memory("process_vm_writev")


def foreign_descriptor() -> None:
    process = os.pidfd_open(os.getpid())
    try:
        os.close(raw("pidfd_getfd", process, 0, 0))
    finally:
        os.close(process)


def trace() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            raw("ptrace", PTRACE_SEIZE, child.pid, 0, 0)
        finally:
            child.kill()


def other_network() -> None:
    with open("/proc/self/ns/net") as file:
        raw("setns", file.fileno(), 0)


def io_uring() -> None:
    os.close(raw("io_uring_setup", 1, ctypes.create_string_buffer(256)))


def key() -> None:
    """The kernel starts the machine's own /sbin/request-key for a key that is not there; ENOKEY says that it tried."""
    try:
        raw("request_key", b"user", b"vashista-test", b"", 0)
    except OSError as error:
        if error.errno not in (errno.ENOKEY, errno.ENOENT):
            raise


def terminal() -> None:
    """Type into a terminal, for the shell behind it to run; kernels from 6.2 on may refuse with EIO by themselves."""
    parent, child = pty.openpty()
    try:
        fcntl.ioctl(child, termios.TIOCSTI, b"x")
    finally:
        os.close(parent)
        os.close(child)


ANYWHERE: tuple[Callable[[], None], ...] = (
    *(
        tcp,
        udp,
        ipv6,
        netlink,
        hypervisor,
        raw_socket,
        packet_socket,
        raw_call,
        raw_connect,
        libc,
        high_bits,
        pair,
        unix,
    ),
    *(
        unix_datagram,
        handed_in,
        many_messages,
        program,
        shell,
        forked,
        spawned,
        orphan,
        another_thread,
        event_loop,
        proxy,
    ),
    *(name, read_memory, write_memory, foreign_descriptor, trace, other_network, io_uring, key, terminal),
)
"""Ways that need nothing from before the filter."""
NEEDS_THE_MACHINE = {
    "hypervisor",
    "raw_socket",
    "packet_socket",
    "io_uring",
    "key",
    "terminal",
    "other_network",
    "shell",
}
"""Of them, those that a machine may shut by itself: a kernel or a user without them, no bash."""


class Before:
    """What is opened before the filter is on, and ways that need it."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.udp = socket.socket(type=socket.SOCK_DGRAM)
        self.unused = socket.socket()
        giver, self.taker = socket.socketpair()
        socket.send_fds(giver, [b"x"], [self.udp.fileno()])  # somebody with a network hands a socket in

    def reuse(self) -> None:
        """The way out of a unit without a network: a socket of the machine's, taken back to its beginning."""
        with socket.create_server(("127.0.0.1", 0)) as target:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.connect(target.getsockname())

    def fast_open(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as target:
            self.unused.sendto(b"x", MSG_FASTOPEN, target.getsockname())

    def inherited(self) -> None:
        self.udp.sendto(b"x", self.address)

    def address_in_sendmsg(self) -> None:
        self.udp.sendmsg([b"x"], [], 0, self.address)

    def connect(self) -> None:
        self.udp.connect(self.address)

    def handed_in_before(self) -> None:
        os.close(socket.recv_fds(self.taker, 1, 1)[1][0])

    @property
    def ways(self) -> tuple[Callable[[], None], ...]:
        return (
            self.fast_open,
            self.inherited,
            self.address_in_sendmsg,
            self.connect,
            self.handed_in_before,
            self.reuse,
        )


def try_all(ways: tuple[Callable[[], None], ...]) -> dict[str, str]:
    """By the name of each way: `open`, or why it was refused."""
    results = {}
    for way in ways:
        try:
            way()
            results[way.__name__] = "open"
        except (OSError, urllib.error.URLError) as error:
            results[way.__name__] = f"refused: {error}"
    return results
