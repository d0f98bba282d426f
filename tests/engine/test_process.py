"""The engine process over its real channel: starts, answers, reports failures, and never outlives the server."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from vashista.engine.channel import HEADER, decode_from_engine, encode_frame
from vashista.engine.config import EngineConfig
from vashista.engine.messages import (
    Abort,
    Failed,
    FinishReason,
    FromEngine,
    Progress,
    Ready,
    SamplingParams,
    StepReport,
    Stop,
    Submit,
    ToEngine,
    TokenEvent,
)

MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"


class EngineProcess:
    """A started engine process and the server's end of its channel."""

    def __init__(self, config: EngineConfig) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(60)
        arguments = ["-m", "vashista.engine.process", "--fd", str(theirs.fileno())]
        arguments += ["--config", msgspec.json.encode(config).decode()]
        self.process = subprocess.Popen([sys.executable, *arguments], pass_fds=[theirs.fileno()])
        theirs.close()

    def send(self, message: ToEngine) -> None:
        self.socket.sendall(encode_frame(message))

    def receive(self) -> FromEngine:
        size = HEADER.unpack(self.socket.recv(HEADER.size, socket.MSG_WAITALL))[0]
        return decode_from_engine(self.socket.recv(size, socket.MSG_WAITALL))

    def receive_until(self, kind: type) -> FromEngine:
        while not isinstance(message := self.receive(), kind):
            assert isinstance(message, Progress)
        return message

    def close(self) -> int:
        """Close the channel, as a server that ends; the engine's exit status."""
        self.socket.close()
        return self.process.wait(10)

    def events_until_end(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        while not events or events[-1].finish_reason is None:
            report = self.receive()
            assert isinstance(report, StepReport)
            events += report.events
        return events


def submit(name: str, max_tokens: int = 4, prompt: list[int] | None = None) -> Submit:
    sampling = SamplingParams(seed=0, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Submit(name, prompt or [5, 6, 7], sampling, time.monotonic())


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    engine = EngineProcess(EngineConfig(model_dir=str(MODEL), num_threads=1, max_context=2048))
    assert isinstance(engine.receive_until(Ready), Ready)
    yield engine
    assert engine.close() == 0, "the engine must end when the server is gone"


def test_a_request_is_answered_and_its_pages_are_free_again(engine: EngineProcess) -> None:
    engine.send(submit("a"))
    events = engine.events_until_end()
    assert sum(len(event.token_ids) for event in events) == 4
    assert events[-1].finish_reason is FinishReason.LENGTH
    report = engine.receive()
    assert isinstance(report, StepReport)
    assert report.events == [], "an idle engine still reports, as a sign of life"
    assert report.stats.num_pages_used == 0


def test_news_of_a_whole_reply_come_a_few_together(engine: EngineProcess) -> None:
    engine.send(msgspec.structs.replace(submit("w", max_tokens=200), is_streaming=False))
    sizes = []
    ages_s = []
    while sum(sizes) < 200:
        report = engine.receive()
        assert isinstance(report, StepReport)
        sizes.append(sum(len(event.token_ids) for event in report.events))
        ages_s += [event.age_s for event in report.events]
    assert sizes[0] <= 1, "the first token comes at once"
    assert len(sizes) < 100
    assert max(ages_s) > 0


def test_a_request_that_can_never_run_is_refused_by_name(engine: EngineProcess) -> None:
    engine.send(submit("b", max_tokens=4000))
    [event] = engine.events_until_end()
    assert (event.finish_reason, event.error_code) == (FinishReason.ERROR, "context_length_exceeded")


def test_an_abort_is_answered_behind_all_shares_of_the_request(engine: EngineProcess) -> None:
    engine.send(submit("c", max_tokens=2000))
    engine.receive()
    engine.send(Abort("c"))
    [*_, last] = engine.events_until_end()
    assert (last.request_id, last.finish_reason, last.token_ids) == ("c", FinishReason.ABORT, [])
    report = engine.receive()
    assert isinstance(report, StepReport)
    assert (report.shares, report.stats.num_running, report.stats.num_pages_used) == ({}, 0, 0)


def test_an_abort_of_a_request_that_has_ended_is_answered_too(engine: EngineProcess) -> None:
    engine.send(Abort("long gone"))
    [event] = engine.events_until_end()
    assert (event.request_id, event.finish_reason) == ("long gone", FinishReason.ABORT)


def test_the_shares_of_all_reports_add_up_to_the_busy_time(engine: EngineProcess) -> None:
    report = engine.receive()
    assert isinstance(report, StepReport)
    before_s = report.stats.busy_s_total
    engine.send(submit("e", max_tokens=30))
    engine.send(submit("f", max_tokens=3, prompt=list(range(5, 900))))
    shares = {"e": 0.0, "f": 0.0}
    num_ended = 0
    while num_ended < 2:
        report = engine.receive()
        assert isinstance(report, StepReport)
        num_ended += sum(event.finish_reason is not None for event in report.events)
        for name, share in report.shares.items():
            shares[name] += share
    assert sum(shares.values()) == pytest.approx(report.stats.busy_s_total - before_s, rel=1e-9)
    # A prompt of 895 tokens in two steps without an event costs more than thirty short tokens.
    assert shares["f"] > shares["e"] > 0


def test_stopping_signals_are_left_to_the_server(engine: EngineProcess) -> None:
    os.kill(engine.process.pid, signal.SIGTERM)
    os.kill(engine.process.pid, signal.SIGINT)
    engine.send(submit("d"))
    assert engine.events_until_end()[-1].finish_reason is FinishReason.LENGTH


def test_a_model_that_cannot_be_loaded_is_reported_with_its_code(tmp_path: Path) -> None:
    engine = EngineProcess(EngineConfig(model_dir=str(tmp_path / "nothing")))
    failed = engine.receive()
    assert isinstance(failed, Failed)
    assert failed.code == "model_folder"
    assert engine.close() == 1


def test_the_engine_ends_on_stop() -> None:
    engine = EngineProcess(EngineConfig(model_dir=str(MODEL), num_threads=1, max_context=2048))
    engine.send(Stop())
    engine.receive_until(Ready)
    assert engine.process.wait(10) == 0
    engine.close()


def test_what_a_step_has_freed_the_next_one_finds() -> None:
    """Layers take and give several tensors of megabytes: hardly any memory comes anew from the system for it.

    None did in half of the runs; where what is freed lies badly for what is asked next, up to ten of 512 pieces did.
    """
    code = (
        "import ctypes, resource, sys, torch\n"
        "from vashista.engine.process import keep_freed_memory\n"
        "if sys.argv[1] == 'kept':\n"
        "    keep_freed_memory(ctypes.CDLL(None))\n"
        "def step():\n"
        "    for _ in range(8):\n"
        "        held = [torch.ones(1 << 19) for _ in range(8)]\n"
        "for _ in range(4):\n"
        "    step()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(8):\n"
        "    step()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    gives_back = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    num_faults = {}
    for name in ("kept", "given back"):
        command, environ = [sys.executable, "-c", code, name], os.environ | gives_back
        num_faults[name] = int(subprocess.run(command, capture_output=True, check=True, env=environ).stdout)
    size = 8 * 8 * 8 * (2 << 20) // resource.getpagesize()
    assert num_faults["given back"] >= size // 2, "this C library keeps what is freed: the test tells nothing"
    assert num_faults["kept"] < size // 20
