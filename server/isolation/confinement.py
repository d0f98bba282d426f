"""Takes the network away from this process, and makes sure of it: what `vashista serve` does before its engine starts.

In this order: look at what is open already and at the network (with `isolation = required`, leave it for one that has
nothing but `lo` where the unit or container has not done so), put the filter on, try what must fail now, watch what is
tried from now on. Where isolation was asked for and is not there, nothing is served. Nothing here can send a packet:
sockets are only opened, never connected beyond this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from vashista.engine.egress import watch
from vashista.engine.errors import IsolationMissingError
from vashista.engine.messages import Attempt
from vashista.server.isolation import baggage, tries
from vashista.server.isolation.attempts import Attempts
from vashista.server.isolation.filter import RULES, Architecture, architecture, install, program
from vashista.server.isolation.network import Network, leave, look

logger = logging.getLogger(__name__)
SENTRY = Path(__file__).with_name("sentry.py")
SENTRY_TIMEOUT_S = 10.0
MAX_REPORT_BYTES = 4096
MPS_FOLDER = "/tmp/nvidia-mps"
"""Where CUDA looks for the socket `control` unless CUDA_MPS_PIPE_DIRECTORY says otherwise (NVIDIA, Multi-Process
Service, environment variables)."""
Mode = Literal["none", "lan", "required"]


class Confinement:
    """What holds for this process from now on; one for a server."""

    def __init__(self, mode: Mode, attempts: Attempts) -> None:
        self.mode = mode
        self.attempts = attempts
        self.has_filter = False
        self.sentry: socket.socket | None = None
        """Reports of the filter's supervisor; None where the kernel has none."""
        self.supervisor: subprocess.Popen[bytes] | None = None
        self._num_loops = 1
        """Event loops whose question for io_uring is still to come."""
        self._starting_engines: set[int] = set()
        """Process ids of engines whose CUDA has not asked for its multi-process service yet."""

    @property
    def num_interfaces(self) -> int:
        """Network interfaces besides `lo` that this process has now."""
        return len(look().interfaces)

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Count what the supervisor reports, within a running event loop."""
        loop = asyncio.get_running_loop()
        if self.sentry is not None:
            loop.add_reader(self.sentry.fileno(), self._read)
        try:
            yield
        finally:
            if self.sentry is not None:
                loop.remove_reader(self.sentry.fileno())

    def close(self) -> None:
        """End the supervisor; the filter stays."""
        if self.sentry is not None and self.supervisor is not None:
            self.sentry.close()
            self.supervisor.wait(SENTRY_TIMEOUT_S)

    def count_of_engine(self, attempt: Attempt) -> None:
        """An attempt that the engine's process reports."""
        self.attempts.count("engine", attempt.what, attempt.detail, attempt.culprit, attempt.times)

    def expect_fork(self) -> None:
        """The event loop is about to start a program: its copy in the child asks for io_uring once more."""
        self._num_loops += 1

    def expect_engine(self, pid: int) -> None:
        """This process is an engine: where it has a GPU, CUDA's start asks once for the multi-process service."""
        self._starting_engines.add(pid)

    def _is_cudas(self, report: dict[str, Any]) -> bool:
        """Whether it is what NVIDIA's driver asks at every start, once: to connect to the service that shares a GPU
        among programs, whose socket has a path of its own. It is refused as everything is, and goes on without."""
        folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", MPS_FOLDER)
        is_its_path = report["detail"] == f"AF_UNIX {folder + '/control'!r}"
        is_it = report["call"] == "connect" and is_its_path and report["has_driver"]
        if not is_it or report["pid"] not in self._starting_engines:
            return False
        self._starting_engines.discard(report["pid"])
        fields = {"engine_pid": report["pid"], "detail": report["detail"]}
        logger.info(
            "CUDA asked for its multi-process service, as at each start, and was refused", extra={"fields": fields}
        )
        return True

    def _is_the_loops(self, report: dict[str, Any]) -> bool:
        """Whether it is what libuv, under the event loop, asks when a loop is made, or copied by a fork."""
        is_ours = os.getpid() in (report["pid"], report["parent"])
        is_it = report["call"] == "io_uring_setup" and is_ours and self._num_loops > 0
        self._num_loops -= is_it
        return is_it

    def _read(self) -> None:
        assert self.sentry is not None
        while True:
            try:
                message = self.sentry.recv(MAX_REPORT_BYTES)
            except BlockingIOError:
                return
            if not message:
                asyncio.get_running_loop().remove_reader(self.sentry.fileno())
                logger.error("the supervisor of the filter has ended; the kernel refuses by itself, nothing is counted")
                return
            report = json.loads(message)
            if "call" in report and not self._is_the_loops(report) and not self._is_cudas(report):
                culprit = f"{report['program']} (process {report['pid']}{report['file'] and ', in ' + report['file']})"
                self.attempts.count("kernel", report["call"], report["detail"], culprit)
            if report["num_untold"]:
                self.attempts.count("kernel", "others", "too many to tell apart", "unknown", report["num_untold"])


def confine(mode: Mode, *, wants_filter: bool, listener: socket.socket | None = None) -> Confinement:
    """Confine this process; what it has brought along must not lead out. IsolationMissingError where what was asked for
    is not there."""
    _look_at_baggage(mode, listener)
    confinement = Confinement(mode, Attempts())
    if mode == "required":
        _leave_network()
    if wants_filter:
        _put_filter_on(confinement)
        tries.check(confinement.sentry)
    watch(lambda attempt: _count(confinement, attempt), frozenset({sys.executable}))
    _announce(confinement)
    return confinement


def _count(confinement: Confinement, attempt: Attempt) -> None:
    confinement.attempts.count("server", attempt.what, attempt.detail, attempt.culprit)


def _look_at_baggage(mode: Mode, listener: socket.socket | None) -> None:
    """What code that was imported before, or whoever started us, has left open: neither filter nor network holds it."""
    found = [*baggage.sockets(listener), *baggage.threads()]
    if found and mode != "none":
        raise IsolationMissingError(
            f"isolation is {mode}, but before it was there this process had {'; '.join(found)}: neither the filter nor "
            "the network that is left would hold that."
        )
    for what in found:
        logger.warning("neither filter nor network holds what was there before them: %s", what)


def _leave_network() -> None:
    before = look()
    if not before.is_reachable:
        return
    reason = "left, yet there"
    try:
        leave()
    except OSError as error:
        reason = f"it cannot be left: {error.strerror}"
    after = look()
    if after.is_reachable:
        raise IsolationMissingError(f"isolation is required, but this process is on a network ({after}), and {reason}.")
    logger.info("the network was left", extra={"fields": {"before": str(before)}})


def _put_filter_on(confinement: Confinement) -> None:
    """The filter with a supervisor, where the kernel lets us have one, else without."""
    known = architecture()
    if known is None:
        _no_filter(confinement.mode, f"it is not known for {os.uname().machine} machines")
        return
    try:
        confinement.sentry, confinement.supervisor = _start_sentry(known)
    except OSError as error:
        logger.warning("the filter counts nothing: no supervisor of it can be had: %s", error.strerror)
        try:
            install(known, program(known, asks_supervisor=False))
        except OSError as second:
            _no_filter(confinement.mode, str(second.strerror))
            return
    confinement.has_filter = True


def _no_filter(mode: Mode, reason: str) -> None:
    if mode != "none":
        raise IsolationMissingError(f"isolation is {mode}, but the kernel's filter cannot be had: {reason}.")
    logger.warning("the kernel's filter cannot be had: %s", reason)


def _start_sentry(known: Architecture) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Put the filter on this process, start the supervisor under it with the filter's questions, let it answer.

    The descriptor of the questions is inherited: the filter forbids to send one. Until its supervisor answers, a call
    that is refused would wait; neither Popen nor a starting interpreter makes any.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        with theirs:
            questions = install(known, program(known, asks_supervisor=True), with_listener=True)
            assert questions is not None
            try:
                command = [sys.executable, "-I", "-S", str(SENTRY), str(questions)]
                child = subprocess.Popen(command, stdin=theirs.fileno(), pass_fds=[questions])
            finally:
                os.close(questions)
            stack.callback(child.kill)
        calls = {known.numbers[rule.name]: (rule.name, rule.error) for rule in RULES}
        setup = {"filter": program(known, asks_supervisor=False).hex(), "calls": calls}
        ours.settimeout(SENTRY_TIMEOUT_S)
        ours.sendall(json.dumps(setup).encode())
        if ours.recv(100) != b"ready":
            raise OSError(errno.EPIPE, "it has ended")
        ours.setblocking(False)
        stack.pop_all()
    return ours, child


def _announce(confinement: Confinement) -> None:
    network: Network = look()
    fields = {"isolation": confinement.mode, "network_filter": confinement.has_filter, "network": str(network)}
    if confinement.mode == "lan":
        logger.warning("MODE LAN: this server is on a network; it opens no connection itself", extra={"fields": fields})
    else:
        logger.info("confined", extra={"fields": fields})
