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
from collections.abc import Sequence

import msgspec

from vashista.engine.channel import HEADER, MAX_FRAME_BYTES, decode_from_engine, encode_frame
from vashista.engine.config import EngineConfig
from vashista.engine.messages import FromEngine, ToEngine

logger = logging.getLogger(__name__)
ENGINE_COMMAND = (sys.executable, "-m", "vashista.engine.process")
END_GRACE_S = 5.0
LINE_BYTES = 1 << 16


class EngineProcess:
    """A running child and the server's end of its channel. Made by `start`, ended by `end`."""

    def __init__(
        self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, log: asyncio.Task[None]
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
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
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 20)
        assert process.stdout is not None
        log = asyncio.create_task(_copy_log(process.stdout, process.pid))
        return cls(process, reader, writer, log)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue one message; lost silently when the child has just died, which `receive` then reports."""
        if not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def receive(self) -> FromEngine | None:
        """The next message; None at the end of the channel. msgspec.DecodeError when a frame makes no sense."""
        try:
            num_bytes = HEADER.unpack(await self._reader.readexactly(HEADER.size))[0]
            if num_bytes > MAX_FRAME_BYTES:
                raise msgspec.DecodeError(f"a frame of {num_bytes} bytes")
            return decode_from_engine(await self._reader.readexactly(num_bytes))
        except (asyncio.IncompleteReadError, OSError):
            return None

    def kill(self) -> None:
        """SIGKILL, at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)

    async def end(self, grace_s: float = END_GRACE_S) -> str:
        """Close the channel, wait, kill if it does not end by itself; says how it ended."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self.kill()
            await self._process.wait()
        # Only now: a child that has stopped reading would keep what is still to be written, and us, waiting for ever.
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        await self._log
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
