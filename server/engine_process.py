"""One engine process as the server sees it: started, spoken to, ended. `server/engine_client.py` owns at most one.

The process gets one end of a socket pair (`--fd N`) and its `EngineConfig` as JSON (`--config`). It ends when that
socket closes, so it cannot outlive the server. What it writes to stdout or stderr goes to the server's log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence

import msgspec

from vashista.engine.channel import HEADER, MAX_FRAME_BYTES, decode_from_engine, encode_frame
from vashista.engine.config import EngineConfig
from vashista.engine.messages import FromEngine, ToEngine

logger = logging.getLogger(__name__)
ENGINE_COMMAND = (sys.executable, "-m", "vashista.engine.process")
END_GRACE_S = 5.0
LAST_LINES_S = 1.0
LINE_BYTES = 1 << 16


class EngineChannelProtocol(asyncio.Protocol):
    """Cuts what arrives into frames and hands each message over at once: a token crosses the server in one turn.

    A stream reader would take two more turns of the event loop for it. Messages that come before `listen` wait.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._take: Callable[[FromEngine], None] | None = None
        self._transport: asyncio.BaseTransport | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the channel has ended; its exception is what a frame or its receiver raised."""

    def listen(self, take: Callable[[FromEngine], None]) -> None:
        """Hand messages to `take` from now on."""
        self._take = take
        self._read_frames()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The channel is open."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes of any number of frames."""
        self._buffer += data
        self._read_frames()

    def connection_lost(self, exc: Exception | None) -> None:
        """The channel has ended, by either side."""
        if not self.closed.done():
            self.closed.set_result(None)

    def _read_frames(self) -> None:
        buffer, start = self._buffer, 0
        try:
            while self._take is not None and not self.closed.done() and len(buffer) >= start + HEADER.size:
                num_bytes = HEADER.unpack_from(buffer, start)[0]
                if num_bytes > MAX_FRAME_BYTES:
                    raise msgspec.DecodeError(f"a frame of {num_bytes} bytes")
                end = start + HEADER.size + num_bytes
                if len(buffer) < end:
                    break
                body, start = bytes(buffer[start + HEADER.size : end]), end
                self._take(decode_from_engine(body))
        except Exception as error:
            self.closed.set_exception(error)
        del buffer[:start]


class EngineProcess:
    """A running child and the server's end of its channel. Made by `start`, ended by `end`."""

    def __init__(
        self,
        process: Process,
        transport: asyncio.WriteTransport,
        protocol: EngineChannelProtocol,
        log: asyncio.Task[None],
    ) -> None:
        self._process = process
        self._transport = transport
        self._protocol = protocol
        self._log = log

    @classmethod
    async def start(cls, command: Sequence[str], config: EngineConfig) -> EngineProcess:
        """Start the child; OSError when the command cannot be run."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                "--fd",
                str(theirs.fileno()),
                "--config",
                msgspec.json.encode(config).decode(),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                # Its own session: Ctrl+C reaches the server alone, which then drains before the engine ends.
                start_new_session=True,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.create_unix_connection(EngineChannelProtocol, sock=ours)
        assert process.stdout is not None
        log = asyncio.create_task(_copy_log(process.stdout, process.pid))
        return cls(process, transport, protocol, log)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue one message; lost silently when the child has just died, after which `listen` returns."""
        if not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    async def listen(self, take: Callable[[FromEngine], None]) -> None:
        """Hand every message to `take` as it arrives, until the channel ends.

        Raises what `take` raises, and msgspec.DecodeError when a frame makes no sense.
        """
        self._protocol.listen(take)
        await asyncio.shield(self._protocol.closed)

    def kill(self) -> None:
        """SIGKILL, at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)

    async def end(self, grace_s: float = END_GRACE_S) -> str:
        """Close the channel, wait, kill if it does not end by itself; says how it ended."""
        self._transport.close()
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self.kill()
            await self._process.wait()
        # A child that stopped reading would keep what is still to be written waiting for ever.
        self._transport.abort()
        # What it wrote last. A child of its own may outlive it and keep its output open: then reading goes on.
        await asyncio.wait({self._log}, timeout=LAST_LINES_S)
        code = self._process.returncode
        assert code is not None
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


async def _copy_log(stream: asyncio.StreamReader, pid: int) -> None:
    """Every line that the engine prints, as a record of the server's log."""
    engine_logger = logging.getLogger("vashista.engine.output")
    while True:
        try:
            line = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            line = error.partial
            if not line:
                return
        except asyncio.LimitOverrunError as error:
            line = await stream.readexactly(error.consumed)
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            engine_logger.warning("%s", text, extra={"fields": {"engine_pid": pid}})
