"""Renders chat templates in a process of its own: `python -m vashista.engine.template_worker`, by the server.

A template is a program that comes with the model. The sandbox keeps it from the machine, but not from taking gigabytes
or minutes within one call of a filter (`'%1000000000s'|format(1)`, a list that holds itself forty times over), and in
the server it would halt all streams. Here the kernel refuses it memory beyond `--memory`, kills it first when the
machine has none left, and the server kills it when its time is over (`server/chat_prompts.py`).

Frames are four bytes of length (little endian) and JSON: first `Loaded`, then a `Rendered` for each `Render`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from vashista.engine.channel import HEADER
from vashista.engine.chat_template import ChatTemplate
from vashista.engine.errors import ChatTemplateError, VashistaError

NAME = b"vashista-chats"
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


class Render(msgspec.Struct, frozen=True):
    """One prompt to write."""

    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    opens_turn: bool = True
    is_unfinished: bool = False
    """Whether the prompt ends within the last message, which the reply continues."""


class Loaded(msgspec.Struct, frozen=True, omit_defaults=True):
    """The model's folder was read; or the code and words of the error."""

    has_template: bool = False
    code: str | None = None
    message: str = ""


class Rendered(msgspec.Struct, frozen=True, omit_defaults=True):
    """The prompt; or why there is none."""

    text: str | None = None
    message: str = ""
    param: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """Answer until the server closes the socket."""
    parser = argparse.ArgumentParser(prog="vashista.engine.template_worker", description="Started by the server.")
    parser.add_argument("--fd", type=int, required=True, help="socket to the server")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--memory", type=int, required=True, help="bytes of address space")
    options = parser.parse_args(arguments)
    parent = os.getppid()
    _confine(options.memory)
    if os.getppid() != parent:  # the server died before prctl
        return 0
    channel = socket.socket(fileno=options.fd).makefile("rwb")
    try:
        template = ChatTemplate.load(options.model)
    except VashistaError as error:
        _send(channel, Loaded(code=error.code, message=error.message))
        return 0
    _send(channel, Loaded(has_template=template is not None))
    decoder = msgspec.json.Decoder(Render)
    while len(head := channel.read(HEADER.size)) == HEADER.size and template is not None:
        _send(channel, render(template, decoder.decode(channel.read(HEADER.unpack(head)[0]))))
    return 0


def render(template: ChatTemplate, asked: Render) -> Rendered:
    """The prompt, or the template's error."""
    try:
        if asked.is_unfinished:
            text = template.render_unfinished(asked.messages, **asked.variables)
        else:
            text = template.render(asked.messages, add_generation_prompt=asked.opens_turn, **asked.variables)
        text.encode()  # a half of a surrogate pair is no text
    except ChatTemplateError as error:
        return Rendered(message=error.message, param=error.param)
    except UnicodeEncodeError as error:
        return Rendered(message=f"The model's chat template writes what is no text: {error.reason}.")
    return Rendered(text=text)


def _confine(memory_bytes: int) -> None:
    library = ctypes.CDLL(None)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    library.prctl(_PR_SET_NAME, NAME)
    # A unit may forbid the calls, which Python says as either error; the server looks, too.
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)  # who started the server may allow less
        most = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _send(channel: Any, message: Loaded | Rendered) -> None:
    body = msgspec.json.encode(message)
    channel.write(HEADER.pack(len(body)))
    channel.write(body)
    channel.flush()


if __name__ == "__main__":
    sys.exit(main())
