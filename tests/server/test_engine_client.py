"""The engine's life in the hands of its client, with a scripted engine as a real process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from vashista.engine.config import EngineConfig
from vashista.engine.errors import EngineDiedError, EngineFailedError, EngineNotReadyError, NotEnoughMemoryError
from vashista.engine.messages import FinishReason, SamplingParams, Submit
from vashista.server.engine_client import EngineClient, EngineLimits, EngineState
from vashista.server.engine_process import EngineProcess
from vashista.server.request_stream import RequestStream

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "deploy" / "models" / "reference-26m"
COMMAND = (sys.executable, str(HERE / "scripted_engine.py"))


def make_client(command=COMMAND, **limits) -> EngineClient:
    limits = {"start_timeout_s": 30.0, "stall_timeout_s": 30.0, "max_restarts": 3, **limits}
    return EngineClient(EngineConfig(model_dir=str(MODEL)), EngineLimits(**limits), command=command)


def submit(request_id: str, seed: int = 0, max_tokens: int = 3) -> Submit:
    return Submit(request_id, [5, 6, 7], SamplingParams(seed=seed, max_tokens=max_tokens), time.monotonic())


def run_with(client: EngineClient, body: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def run() -> None:
        client.start()
        try:
            async with asyncio.timeout(60):
                await body(client)
        finally:
            await client.close()

    asyncio.run(run())


async def is_ready(client: EngineClient) -> None:
    await client.wait_until(lambda state: state is EngineState.READY)


async def is_restarted(client: EngineClient, num_restarts: int = 1) -> None:
    while client.num_restarts < num_restarts or client.state is not EngineState.READY:
        await client.wait_until(lambda state: state is not EngineState.READY)
        await is_ready(client)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def logged(path: Path, kind: str) -> list[str]:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry["request_id"] for entry in entries if entry["kind"] == kind]


async def collect(stream) -> list[int]:
    tokens = []
    while events := await stream.next_events():
        tokens += [token for _, event in events for token in event.token_ids]
    return tokens


def test_a_request_runs_and_its_stream_ends():
    async def body(client):
        await is_ready(client)
        assert client.ready.vocab_size == 8192
        with client.submit([submit("a", max_tokens=5)]) as stream:
            assert await collect(stream) == [5, 6, 7, 5, 6]
            assert await stream.next_events() == []
        assert client.stats.num_pages == 1024

    run_with(make_client(), body)


def test_two_requests_of_one_stream_both_finish():
    async def body(client):
        await is_ready(client)
        with client.submit([submit("a", max_tokens=2), submit("b", max_tokens=4)]) as stream:
            finished = []
            while events := await stream.next_events():
                finished += [event.request_id for _, event in events if event.finish_reason is FinishReason.LENGTH]
            assert sorted(finished) == ["a", "b"]

    run_with(make_client(), body)


def test_before_the_engine_is_ready_requests_are_refused_and_told_why():
    async def body(client):
        with pytest.raises(EngineNotReadyError, match="loading the model"):
            client.submit([submit("a")])
        await is_ready(client)

    run_with(make_client(), body)


def test_closing_a_stream_aborts_what_runs_and_only_that(tmp_path, monkeypatch, script):
    log = tmp_path / "log"
    monkeypatch.setenv("SCRIPTED_LOG", str(log))

    async def body(client):
        await is_ready(client)
        with client.submit([submit("done", max_tokens=1), submit("hangs", script.HANG)]) as stream:
            await stream.next_events()
        with client.submit([submit("marker", max_tokens=1)]) as stream:
            await collect(stream)
        assert logged(log, "Abort") == ["hangs"]

    run_with(make_client(), body)


def test_a_dying_engine_ends_its_requests_with_an_error_and_comes_back(script):
    async def body(client):
        await is_ready(client)
        pid = client.pid
        with client.submit([submit("a", script.DIE, max_tokens=9)]) as stream, pytest.raises(EngineDiedError):
            await collect(stream)
        await is_restarted(client)
        assert client.pid != pid
        with client.submit([submit("b")]) as stream:
            assert await collect(stream) == [5, 6, 7]
        assert client.num_restarts == 1
        assert client.num_preemptions >= 2

    run_with(make_client(), body)


def test_a_silent_engine_is_killed_and_restarted(script):
    async def body(client):
        await is_ready(client)
        with client.submit([submit("a", script.STALL)]) as stream, pytest.raises(EngineDiedError):
            await collect(stream)
        await is_restarted(client)

    run_with(make_client(stall_timeout_s=1.5), body)


def test_an_engine_that_talks_nonsense_is_killed_and_restarted(script):
    async def body(client):
        await is_ready(client)
        with client.submit([submit("a", script.GARBAGE)]) as stream, pytest.raises(EngineDiedError):
            await collect(stream)
        await is_restarted(client)

    run_with(make_client(), body)


def test_a_message_that_the_server_fails_to_take_ends_the_engine_and_not_the_watch_over_it(monkeypatch):
    """Else the server would go on as if it were ready, and every request would wait for ever."""
    push = RequestStream.push
    errors = iter([RuntimeError("a bug")])

    def failing(stream, event):
        for error in errors:
            raise error
        push(stream, event)

    async def body(client):
        await is_ready(client)
        monkeypatch.setattr(RequestStream, "push", failing)
        with client.submit([submit("a")]) as stream, pytest.raises(EngineDiedError):
            await collect(stream)
        await is_restarted(client)
        with client.submit([submit("b")]) as stream:
            assert await collect(stream) == [5, 6, 7]

    run_with(make_client(), body)


def test_a_child_of_a_dead_engine_that_holds_its_output_does_not_keep_it_from_coming_back(tmp_path, script):
    alive = tmp_path / "alive"
    alive.touch()
    watch = ["sh", "-c", f"while [ -e '{alive}' ]; do sleep 0.1; done"]
    child = f"import os, subprocess, sys; subprocess.Popen({watch}); os.execv(sys.argv[1], sys.argv[1:])"

    async def body(client):
        await is_ready(client)
        with client.submit([submit("a", script.DIE, max_tokens=9)]) as stream, pytest.raises(EngineDiedError):
            await collect(stream)
        await is_restarted(client)
        logs = [task for task in asyncio.all_tasks() if task.get_coro().__name__ == "_copy_log"]
        assert len(logs) == 2
        alive.unlink()
        await asyncio.wait(logs, return_when=asyncio.FIRST_COMPLETED)

    run_with(make_client((sys.executable, "-c", child, *COMMAND)), body)


def test_an_engine_that_says_it_cannot_start_is_not_tried_again(monkeypatch):
    monkeypatch.setenv("SCRIPTED_START", "fail")

    async def body(client):
        await client.wait_until(lambda state: state is EngineState.FAILED)
        assert isinstance(client.failure, NotEnoughMemoryError)
        assert client.num_restarts == 0
        with pytest.raises(EngineFailedError, match="9 GiB"):
            client.check_ready()

    run_with(make_client(), body)


def test_an_engine_that_keeps_dying_is_given_up(monkeypatch):
    monkeypatch.setenv("SCRIPTED_START", "die")

    async def body(client):
        await client.wait_until(lambda state: state is EngineState.FAILED)
        assert client.num_restarts == 1
        with pytest.raises(EngineFailedError, match=r"exit status 3.*2 times within 10 minutes"):
            client.check_ready()

    run_with(make_client(max_restarts=1), body)


def test_an_engine_that_does_not_get_ready_in_time_is_killed(monkeypatch):
    monkeypatch.setenv("SCRIPTED_START", "hang")

    async def body(client):
        await client.wait_until(lambda state: state is EngineState.FAILED)
        with pytest.raises(EngineFailedError, match=r"not ready within 1\.5 s"):
            client.check_ready()

    run_with(make_client(start_timeout_s=1.5, max_restarts=0), body)


def test_a_command_that_does_not_exist_is_a_named_error():
    async def body(client):
        await client.wait_until(lambda state: state is EngineState.FAILED)
        with pytest.raises(EngineFailedError, match="cannot be started"):
            client.check_ready()

    run_with(make_client(command=("/nonexistent/engine",), max_restarts=0), body)


def test_closing_the_client_ends_the_engine():
    pids = []

    async def body(client):
        await is_ready(client)
        pids.append(client.pid)

    run_with(make_client(), body)
    assert not is_alive(pids[0])


def test_an_engine_that_has_stopped_reading_does_not_keep_the_client_from_closing(monkeypatch):
    monkeypatch.setattr(EngineProcess.end, "__defaults__", (0.2,))
    pids = []

    async def body(client):
        await is_ready(client)
        pids.append(client.pid)
        os.kill(client.pid, signal.SIGSTOP)
        # Far more than a socket holds, so that the rest waits to be written.
        long = Submit("a", [5] * 4_000_000, SamplingParams(seed=0, max_tokens=3), time.monotonic())
        client.submit([long])
        async with asyncio.timeout(20):
            await client.close()

    run_with(make_client(), body)
    assert not is_alive(pids[0])
