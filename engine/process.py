"""The engine's own process: `python -m vashista.engine.process --fd N --config JSON`, started by the server.

Messages come over the socket of `--fd` (engine/channel.py). A thread reads them into a queue; the main thread loads
the model, then steps while there is work and sleeps otherwise. After every step it reports; while idle it reports once
a second, as a sign of life. It ends when the server says so or is gone. Signals that stop the server are ignored here:
the server drains and then closes the channel.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback

import msgspec

from vashista.engine.channel import EngineChannel
from vashista.engine.config import EngineConfig
from vashista.engine.egress import AttemptBox, watch
from vashista.engine.errors import VashistaError
from vashista.engine.main_memory import shortage_named
from vashista.engine.messages import (
    Abort,
    Failed,
    FinishReason,
    Progress,
    Stop,
    Submit,
    ToEngine,
    TokenEvent,
)
from vashista.engine.offline import go_offline
from vashista.engine.outbox import Outbox

IDLE_REPORT_S = 1.0
PROGRESS_S = 0.2
SPIN_COUNT = 20_000
"""How long an idle compute thread keeps its core, in turns of GNU's OpenMP (its default is 300,000). Between two steps
the server and its clients need that core: with 20,000 a streamed completion took 4 % longer over HTTP than in the
engine alone, with the default 8 % (two cores, AMD EPYC, probe-26m, medians of 14 turns, 2026-11). The environment's
GOMP_SPINCOUNT overrules it."""
KEPT_BYTES = 256 << 20
"""What a step has freed stays with the process up to so much, and the next one finds it."""
_PR_SET_PDEATHSIG, _PR_SET_PTRACER = 1, 0x59616D61
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD, _TOP_PAD = 32 << 20, 16 << 20


def main(arguments: list[str] | None = None) -> int:
    """Run until the server closes the channel. Exit status 1 if the engine could not start or go on."""
    parser = argparse.ArgumentParser(prog="vashista.engine.process", description="Started by the server, not by hand.")
    parser.add_argument("--fd", type=int, required=True, help="socket to the server")
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    options = parser.parse_args(arguments)
    config = msgspec.json.decode(options.config, type=EngineConfig)
    parent = os.getppid()
    library = ctypes.CDLL(None)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Yama lets none but ancestors look at a process: the supervisor of the filter, a sibling, names what we ask for.
    library.prctl(_PR_SET_PTRACER, parent)
    keep_freed_memory(library)
    go_offline(os.environ)
    attempts = AttemptBox()
    watch(attempts.put)
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))  # before torch loads the OpenMP library, which reads it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if os.getppid() != parent:  # the server died before prctl
        return 0
    channel = EngineChannel(socket.socket(fileno=options.fd))
    try:
        with shortage_named():
            EngineLoop(channel, config, attempts).run()
    except VashistaError as error:
        return _report_failure(channel, error.code, error.message)
    except OSError as error:
        sys.stderr.write(f"engine: the server is gone ({error})\n")
        return 0
    except BaseException as error:
        traceback.print_exc()
        return _report_failure(channel, "internal_error", f"{type(error).__name__}: {error}")
    return 0


def keep_freed_memory(library: ctypes.CDLL) -> None:
    """Have the C library keep what is freed, where it is GNU's.

    Left to itself it gives the tensors between the layers of a prompt back to the system and asks for them again: of
    prompts of more than 150 tokens two in three met 500 to 4,000 page faults, each of which zeroes 4 KiB.
    """
    mallopt = getattr(library, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_TOP_PAD, _TOP_PAD)


class EngineLoop:
    """Connects the channel with an `Engine`."""

    def __init__(self, channel: EngineChannel, config: EngineConfig, attempts: AttemptBox) -> None:
        self._channel = channel
        self._attempts = attempts
        self._config = config
        self._outbox = Outbox(channel.send, time.monotonic)
        self._inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._progress_s = 0.0

    def run(self) -> None:
        """Load, say `Ready`, and serve until the channel closes or `Stop` comes."""
        threading.Thread(target=self._read, name="channel-reader", daemon=True).start()
        from vashista.engine.engine import Engine  # imports torch: after the reader is there to notice a lost server

        self._engine = Engine(self._config, self._report_progress)
        if self._engine.ready.device == "cpu":
            from vashista.kernels.cpu.cores import place_threads

            place_threads(os.environ)
        # What is loaded stays: keep the collector from walking through it in the middle of a step.
        gc.collect()
        gc.freeze()
        self._channel.send(self._engine.ready)
        while self._receive():
            if self._engine.has_work:
                engine = self._engine
                events = engine.step()
                self._outbox.put(events, engine.stats, engine.shares, engine.progress, engine.step_times.coefficients)
                engine.keep_room()

    def _read(self) -> None:
        message: ToEngine | None = Stop()
        while message is not None:
            try:
                message = self._channel.receive()
            except OSError:
                message = None
            self._inbox.put(message)

    def _receive(self) -> bool:
        """Take in all messages; make room, then wait for one, if there is nothing to compute. False at the end."""
        while True:
            for attempt in self._attempts.take():
                self._channel.send(attempt)
            is_idle = not self._engine.has_work
            has_made_room = is_idle and self._inbox.empty() and self._engine.make_room()
            try:
                message = self._inbox.get(is_idle and not has_made_room, IDLE_REPORT_S)
            except queue.Empty:
                if not is_idle:
                    return True
                if not has_made_room:
                    self._outbox.put([], self._engine.stats)
                continue
            if message is None or isinstance(message, Stop):
                return False
            self._handle(message)

    def _handle(self, message: Submit | Abort) -> None:
        if isinstance(message, Abort):
            self._engine.abort(message.request_id)
            last_word = TokenEvent(message.request_id, finish_reason=FinishReason.ABORT)
            self._outbox.forget(message.request_id)
            self._outbox.put([last_word], self._engine.stats)
            return
        self._outbox.expect(message)
        try:
            self._engine.submit(message)
        except VashistaError as error:
            event = TokenEvent(
                message.request_id,
                finish_reason=FinishReason.ERROR,
                error_code=error.code,
                error_message=error.message,
            )
            self._outbox.put([event], self._engine.stats)

    def _report_progress(self, loaded_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if loaded_bytes == total_bytes or now - self._progress_s > PROGRESS_S:
            self._progress_s = now
            self._channel.send(Progress(loaded_bytes, total_bytes))


def _report_failure(channel: EngineChannel, code: str, message: str) -> int:
    try:
        channel.send(Failed(code, message))
    except OSError:
        sys.stderr.write(f"engine: {message}\n")
    return 1


if __name__ == "__main__":
    exit_status = main()
    sys.stderr.flush()
    # Not sys.exit: the reader thread may wait for the server, and native libraries abort while it is torn down.
    os._exit(exit_status)
