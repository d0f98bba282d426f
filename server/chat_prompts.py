"""Chat messages to a prompt, by a process that renders the model's template: `engine/template_worker.py`.

`server/served_model.py` starts it while the engine loads; admission and /tokenize ask it. A template that takes more
memory than it may, more time, or its process with it, costs its own request an error and a new process; no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vashista.engine.channel import HEADER
from vashista.engine.errors import ERRORS, ChatTemplateError, ChatTemplateFileError, InternalError
from vashista.engine.template_sandbox import TIME_LIMIT_S
from vashista.engine.template_worker import Loaded, Render, Rendered
from vashista.server.turns import Turns

if TYPE_CHECKING:
    from vashista.server.schemas.chat import ChatMessage

logger = logging.getLogger(__name__)
COMMAND = (sys.executable, "-m", "vashista.engine.template_worker")
START_TIMEOUT_S = 60.0
LOOK_S = 0.05
"""How often the memory of a process that is at work is looked at."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
BYTES_A_SECOND = 8 << 20
"""How fast messages and prompt go through the socket at least, on a machine that has other things to do."""
MEMORY_BYTES = 512 << 20
"""What the process may have, for Python, Jinja and messages of usual size; and 32 times the largest body besides."""
MAX_PROMPT_BYTES = 256 << 20
"""JSON of what `engine/template_sandbox.py` lets through: 32 Mi characters."""
INLINE_MESSAGES = 1000
"""So many are rewritten on the event loop (below 1 ms)."""


async def messages_for_template(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """As `ChatPrompts.render` takes them; many are rewritten in a thread, so that other streams do not halt."""

    def rewrite() -> list[dict[str, Any]]:
        return [message.for_template() for message in messages]

    return rewrite() if len(messages) <= INLINE_MESSAGES else await asyncio.to_thread(rewrite)


class ChatPrompts:
    """The templates of one model, and the process that renders them. For use on one event loop after `start`."""

    def __init__(self, folder: Path, max_body_bytes: int) -> None:
        self._folder = folder
        self._memory_bytes = MEMORY_BYTES + 32 * max_body_bytes
        self._turns = Turns()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self.num_starts = 0

    def start(self) -> bool:
        """Start the process; whether the model has a template. Blocks while the folder is read, and raises what that
        raises; then there is no process."""
        try:
            return self._start()
        except OSError as error:  # a timeout is one
            self.close()
            raise ChatTemplateFileError(
                "The process that renders the model's chat template cannot be started: "
                f"{error.strerror or f'it is not ready after {START_TIMEOUT_S:g} s'}."
            ) from error
        except BaseException:
            self.close()
            raise

    def _start(self) -> bool:
        self.num_starts += 1
        ours, theirs = socket.socketpair()
        self._socket = ours
        with theirs:
            ours.settimeout(START_TIMEOUT_S)
            command = [*COMMAND, "--fd", str(theirs.fileno()), "--model", str(self._folder.absolute())]
            self._process = subprocess.Popen(
                [*command, "--memory", str(self._memory_bytes)],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl+C reaches the server alone
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
        with ours.makefile("rb") as stream:
            head = stream.read(HEADER.size)
            body = stream.read(HEADER.unpack(head)[0]) if len(head) == HEADER.size else b""
        if not body:
            raise ChatTemplateFileError("The model's chat template cannot be compiled in the memory that it may take.")
        ours.setblocking(False)
        loaded = msgspec.json.decode(body, type=Loaded)
        if loaded.code is not None:
            raise ERRORS.get(loaded.code, InternalError)(loaded.message)
        return loaded.has_template

    async def render(
        self,
        messages: list[dict[str, Any]],
        variables: Mapping[str, Any],
        *,
        opens_turn: bool = True,
        is_unfinished: bool = False,
    ) -> str:
        """The prompt; ChatTemplateError with the template's own words, or with the bound that it has passed.

        `is_unfinished`: the prompt ends within the last message. One prompt is rendered at a time, the small first.
        """
        asked = Render(messages, dict(variables), opens_turn, is_unfinished)
        body = msgspec.json.encode(asked)
        limit_s = 2 * TIME_LIMIT_S + len(body) / BYTES_A_SECOND
        async with self._turns.of(len(body)):
            if self._process is not None and self._process.poll() is not None:
                self._end("it was killed while it had nothing to do")  # no template's fault
            if self._process is None:
                await asyncio.to_thread(self.start)
            try:
                rendered = await self._watched(self._ask(body), limit_s)
            except TimeoutError:
                self._end("time")
                raise ChatTemplateError(
                    f"The model's chat template was stopped: it is not done after {limit_s:.1f} s."
                ) from None
            except MemoryError:
                self._end("memory")
                raise ChatTemplateError(
                    f"The model's chat template was stopped: it takes more memory than {self._memory_bytes >> 20} MiB."
                ) from None
            except (OSError, EOFError, msgspec.DecodeError) as error:
                self._end("gone")
                raise ChatTemplateError("The model's chat template was stopped: it took its process down.") from error
            except BaseException:  # the client has gone in the midst of a frame
                self._end("client")
                raise
        if rendered.text is None:
            raise ChatTemplateError(rendered.message, param=rendered.param)
        return rendered.text

    def close(self) -> None:
        """End the process."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._socket = None

    async def _watched(self, answer: Coroutine[Any, Any, Rendered], limit_s: float) -> Rendered:
        """The answer; TimeoutError or MemoryError when the process has passed a bound, whatever the kernel knows."""
        task = asyncio.create_task(answer)
        end_s = time.monotonic() + limit_s
        try:
            while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
                if time.monotonic() > end_s:
                    raise TimeoutError
                if self._resident_bytes() > self._memory_bytes:
                    raise MemoryError
            return task.result()
        finally:
            task.cancel()

    def _resident_bytes(self) -> int:
        assert self._process is not None
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended
            return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * PAGE_BYTES
        return 0

    async def _ask(self, body: bytes) -> Rendered:
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, HEADER.pack(len(body)) + body)
        (size,) = HEADER.unpack(await self._read(HEADER.size))
        if size > MAX_PROMPT_BYTES:
            raise EOFError
        return msgspec.json.decode(await self._read(size), type=Rendered)

    async def _read(self, num_bytes: int) -> bytearray:
        assert self._socket is not None
        loop, data = asyncio.get_running_loop(), bytearray()
        while len(data) < num_bytes:
            part = await loop.sock_recv(self._socket, min(num_bytes - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return data

    def _end(self, reason: str) -> None:
        """Kill the process; the next request starts another."""
        logger.warning("the process that renders chat templates is started anew: %s", reason)
        with contextlib.suppress(OSError):
            self.close()
