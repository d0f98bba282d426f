"""Replies with log probabilities of a prompt are written beside the event loop, others on it."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from vashista.engine.messages import TokenEvent
from vashista.engine.prompt_logprobs import packed
from vashista.server.reply import ChoiceParts, written
from vashista.server.sse import StreamResponse


@pytest.mark.parametrize("reports_prompt", [False, True])
def test_a_whole_reply(reports_prompt: bool) -> None:
    parts = [ChoiceParts(), ChoiceParts(prompt_logprobs=packed([None], 0) if reports_prompt else None)]
    thread = asyncio.run(written(threading.current_thread, parts))
    assert (thread is threading.main_thread()) != reports_prompt


def test_a_stream() -> None:
    """12,000 tokens with 20 alternatives each kept everybody waiting for 0.4 s."""
    news = [
        [(0, TokenEvent("a", text="x"))],
        [(0, TokenEvent("a", text="y")), (1, TokenEvent("b", prompt_logprobs=packed([None], 0)))],
        [(0, TokenEvent("a", text="z"))],
        [],
    ]
    threads, sent = [], []

    class Chunks:
        def encode(self, index: int, event: TokenEvent) -> bytes:
            threads.append(threading.current_thread() is threading.main_thread())
            return event.text.encode()

        def end(self, generation: Any) -> bytes:
            return b"end"

    async def next_events() -> list[tuple[int, TokenEvent]]:
        return news.pop(0)

    async def settle() -> None:
        return None

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    account = SimpleNamespace(is_streamed=False, settle=settle)
    request: Any = SimpleNamespace(scope={"state": {"account": account, "request_id": "r"}})
    generation: Any = SimpleNamespace(next_events=next_events, close=lambda: None)
    chunks: Any = Chunks()
    response = StreamResponse(generation, chunks, metrics=SimpleNamespace(), request=request)  # type: ignore[arg-type]
    asyncio.run(response._stream(send, send))
    assert threads == [True, False, False, True]
    assert sent == [None, b"x", b"y", b"z", b"end"]
