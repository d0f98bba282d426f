"""Proves that a server says nothing: the HTTP suite under strace, in a network of its own whose cable is watched.

    python bench/airgap/silent.py [--tests FILE ...] [--keep FOLDER]

Needs root, strace, iproute2 and /dev/net/tun. In a new network namespace it makes a tap device with addresses, default
routes and a name server, so that whatever wanted to leave could, and reads what comes out at the tap's other end. Then
the tests of tests/server that start a server run there, each server with its engine under `strace -f`. Last it makes
sure that it would have seen something: a name that is resolved, and datagrams of IPv4 and IPv6, must show on the tap.

Prints a table. Exit status: 0 silent, 1 not, or a test failed, 2 it cannot run here.
"""

from __future__ import annotations

import argparse
import fcntl
import ipaddress
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import system_calls

ROOT = Path(__file__).parents[2]
INSIDE = "SILENT_PY_INSIDE"
"""Not with the server's own prefix: what has that is a setting, and an unknown setting is an error."""
SUITE = (
    *("auth", "body", "chat", "completions", "errors_over_http", "http_protocol", "isolation", "listening", "messages"),
    *("metrics", "openapi", "quotas_over_http", "real_engine", "receipts", "serving_life", "terms", "tls"),
)
PACED = "test_terms.py::test_under_load_retry_after_is_the_time_after_which_the_deadline_holds"
"""Left out: it holds the server to a time, and a traced one takes several times as long."""
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
SETTLE_S = 4.0
"""In which the kernel itself announces the groups of a new interface's IPv6 addresses."""
NETWORK = "203.0.113"
"""TEST-NET-3: the tests use TEST-NET-1 for addresses that this machine must not have."""
NAME_SERVER = f"{NETWORK}.53"
CONTROL = f"""
import socket
for address in (("{NETWORK}.9", 9), ("2001:db8::9", 9)):
    with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", address)
try: socket.getaddrinfo("name.example", 80)
except OSError: pass
"""


class Tap:
    """A network interface whose other end is read here."""

    def __init__(self, name: str = "tap0") -> None:
        self.packets: Counter[str] = Counter()
        self._file = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self._file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
        threading.Thread(target=self._read, daemon=True).start()
        for command in (
            "ip link set lo up",
            f"ip link set {name} addrgenmode none",
            f"ip link set {name} up",
            f"ip address add {NETWORK}.1/24 dev {name}",
            f"ip route add default via {NETWORK}.254 dev {name}",
            f"ip -6 address add 2001:db8::1/64 dev {name} nodad",
            f"ip -6 route add default via 2001:db8::fe dev {name}",
        ):
            subprocess.run(command.split(), check=True)
        time.sleep(SETTLE_S)

    def total(self) -> int:
        """Packets but for the kernel's own announcements of multicast groups."""
        return sum(self.packets.values()) - self.packets["the kernel's multicast reports"]

    def _read(self) -> None:
        while True:
            self.packets[kind_of(os.read(self._file, 1 << 16))] += 1


def kind_of(frame: bytes) -> str:
    """What an Ethernet frame holds, and for whom."""
    ether_type = int.from_bytes(frame[12:14], "big")
    if ether_type == 0x86DD and frame[20] == 0 and frame[62:63] == b"\x8f":
        return "the kernel's multicast reports"
    match ether_type:
        case 0x0800:
            return f"IPv4 to {ipaddress.IPv4Address(frame[30:34])}"
        case 0x86DD:
            return f"IPv6 to {ipaddress.IPv6Address(frame[38:54])}"
        case 0x0806:
            return f"ARP for {ipaddress.IPv4Address(frame[38:42])}"
    return f"type {ether_type:#06x}"


def main() -> int:
    """Start over within the namespaces, or do the work there."""
    parser = argparse.ArgumentParser(description="Proves that a server says nothing.")
    parser.add_argument("--tests", nargs="+", help="files of tests/server, such as test_chat.py; else all of SUITE")
    parser.add_argument("--keep", type=Path, help="empty folder for the traces")
    options = parser.parse_args()
    missing = [name for name in ("strace", "ip", "unshare") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing or not Path("/dev/net/tun").exists():
        print(f"needs root, /dev/net/tun, and {', '.join(missing) or 'what is there'}", file=sys.stderr)
        return 2
    if INSIDE not in os.environ:
        command = ["unshare", "--net", "--mount", sys.executable, *sys.argv]
        return subprocess.run(command, env={**os.environ, INSIDE: "1"}, check=False).returncode
    with tempfile.TemporaryDirectory() as scratch:
        resolver = Path(scratch) / "resolv.conf"
        resolver.write_text(f"nameserver {NAME_SERVER}\noptions timeout:1 attempts:1\n")
        subprocess.run(["mount", "--bind", str(resolver), "/etc/resolv.conf"], check=True)
        folder = options.keep or Path(scratch) / "traces"
        folder.mkdir(exist_ok=True)
        files = options.tests or [f"test_{name}.py" for name in SUITE]
        return prove(Tap(), folder, [ROOT / "tests/server" / file for file in files])


def prove(tap: Tap, folder: Path, files: list[Path]) -> int:
    tap.packets.clear()
    start_s = time.monotonic()
    wrapper = " ".join([*system_calls.COMMAND, str(folder / "trace")])
    environ = {**os.environ, "SERVER_WRAPPER": wrapper, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    command += ["--deselect", f"tests/server/{PACED}"]
    suite = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, check=False)
    wall_s = time.monotonic() - start_s
    time.sleep(1)  # tracers write to the end by themselves
    sent, packets = tap.total(), dict(tap.packets)
    calls = system_calls.read(folder)
    tap.packets.clear()
    subprocess.run([sys.executable, "-c", CONTROL], check=False)
    time.sleep(1)
    control, control_packets = tap.total(), dict(tap.packets)
    ending = re.sub(r"\x1b\[\d*m", "", suite.stdout.strip().splitlines()[-1])
    rows = [
        ("HTTP suite", f"{ending}; {len(files)} files, {wall_s:.0f} s", suite.returncode == 0),
        ("threads traced, calls read", f"{calls.num_processes}, {calls.num_lines}", calls.num_processes > 0),
        ("answers on accepted connections", str(calls.kinds["answer"]), calls.kinds["answer"] > 0),
        ("calls on Unix sockets", str(calls.kinds["unix"]), True),
        ("calls for listening sockets", str(calls.kinds["listening"]), True),
        ("refused tries of the self-test", str(calls.kinds["try at the start"]), True),
        ("calls that lead outward, and DNS", str(calls.kinds["outward"]), not calls.outward),
        ("packets on the tap meanwhile", f"{sent} {packets or ''}".strip(), sent == 0),
        ("packets of the control behind it", f"{control} {control_packets}", control > 0),
    ]
    for name, value, is_good in rows:
        print(f"{'ok' if is_good else 'NOT OK':<7} {name:<34} {value}")
    for line in calls.outward[:20]:
        print("        " + line)
    if suite.returncode:
        print(suite.stdout[-6000:])
    return 0 if all(is_good for *_, is_good in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
