"""A fake engine process: speaks the real channel, needs no torch, and does what the request's seed says.

It answers with the prompt's tokens over and over (one token a step), so a test knows what must come back. Seeds with a
meaning are in `Script`. Every message that it receives goes as a line of JSON to the file named by SCRIPTED_LOG.
Environment: SCRIPTED_STEP_S (pause of a step), SCRIPTED_PAGES (KV pages), SCRIPTED_START (fail, die, hang or garbage),
SCRIPTED_POWER (report a measured power).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import select
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import tokenizers

from vashista.engine.channel import EngineChannel
from vashista.engine.config import EngineConfig
from vashista.engine.messages import (
    Abort,
    EngineStats,
    Failed,
    FinishReason,
    Progress,
    Ready,
    SchedulerRules,
    StepReport,
    Stop,
    Submit,
    SupportAudit,
    SupportReport,
    TokenEvent,
    TokenLogprobs,
)
from vashista.engine.model_digest import model_digest
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.features import COUNTS, KNOTS
from vashista.engine.prompt_logprobs import packed


class Script:
    """Seeds that make the engine misbehave."""

    DIE = 900
    """Exit at the third token."""
    STALL = 901
    """Stop saying anything, to anybody."""
    HANG = 902
    """Never answer this request."""
    ERROR = 903
    """End with an error before the first token."""
    LATE_ERROR = 904
    """End with an error after two tokens."""
    STOP = 905
    """Finish with reason stop after two tokens."""
    GARBAGE = 906
    """Send a frame that is no message."""
    ENDLESS = 907
    """Generate without regard to max_tokens."""


PAGE_SIZE, NUM_CACHED = 64, 3
STEP_SHARE_S = 0.25
"""What each step takes of each request that is in it."""
SUPPORT = SupportReport(
    num_head_steps=100,
    dense_share=0.25,
    tokens_attended=300.0,
    tokens_visible=1000.0,
    dropped_mass_bound=1.0,
    dropped_mass_estimate=0.125,
    support_gap=4.5,
    audit=SupportAudit(2, 0.1, 0.0, 0.4, 0.05, 0.15, 50.0, 200.0, 700.0),
)


@dataclass
class Running:
    submit: Submit
    tokens: itertools.cycle = field(init=False)
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.tokens = itertools.cycle(self.submit.prompt_token_ids)


class ScriptedEngine:
    def __init__(self, channel: EngineChannel, sock: socket.socket, config: EngineConfig) -> None:
        self._channel, self._sock = channel, sock
        self._running: dict[str, Running] = {}
        self._tokenizer = tokenizers.Tokenizer.from_file(str(Path(config.model_dir) / "tokenizer.json"))
        self._log_path = Path(os.environ.get("SCRIPTED_LOG", os.devnull))
        self._step_s = float(os.environ.get("SCRIPTED_STEP_S", "0"))
        self._num_pages = int(os.environ.get("SCRIPTED_PAGES", "1024"))
        self._num_steps = 0
        self._busy_s = 0.0
        ready = Ready(
            model_dir=config.model_dir,
            architecture="LlamaForCausalLM",
            num_parameters=1,
            dtype="float32",
            device="cpu",
            device_name="scripted",
            attention="vashista" if config.attention == "auto" else config.attention,
            has_support_profile=False,
            vocab_size=8192,
            max_context=config.max_context or 16384,
            page_size=PAGE_SIZE,
            num_pages=self._num_pages,
            kv_bytes=1,
            eos_token_ids=[0],
            load_s=0.0,
            model_digest=model_digest(config.model_dir),
            rules=SchedulerRules(
                page_size=PAGE_SIZE,
                num_pages=self._num_pages,
                max_running_requests=config.max_running_requests,
                max_batch_tokens=512,
                prefix_caching=True,
            ),
            coefficients=StepCoefficients(
                base_s=max(self._step_s, 1e-4), per_token_s=[1e-6] * len(KNOTS), counts_s=[0.0] * len(COUNTS)
            ),
        )
        self._channel.send(Progress(1, 2))
        self._channel.send(ready)

    def run(self) -> None:
        last_s = 0.0
        while True:
            while select.select([self._sock], [], [], 0.1 if not self._active() else 0)[0]:
                message = self._channel.receive()
                if message is None or isinstance(message, Stop):
                    return
                self._take(message)
            computed = [running.submit.request_id for running in self._active()]
            events = [event for running in self._active() for event in self._step(running)]
            self._busy_s += STEP_SHARE_S * len(computed)
            if events or time.monotonic() - last_s > 0.2:
                last_s = time.monotonic()
                shares = dict.fromkeys(computed, STEP_SHARE_S)
                self._channel.send(StepReport(events, self._stats(), shares))
            if events and self._step_s:
                time.sleep(self._step_s)

    def _active(self) -> list[Running]:
        return [running for running in self._running.values() if running.submit.sampling.seed != Script.HANG]

    def _take(self, message: Submit | Abort) -> None:
        with self._log_path.open("a") as log:
            log.write(json.dumps({"kind": type(message).__name__, **msgspec.to_builtins(message)}) + "\n")
        if isinstance(message, Abort):
            self._running.pop(message.request_id, None)
            last_word = TokenEvent(message.request_id, finish_reason=FinishReason.ABORT)
            self._channel.send(StepReport([last_word], self._stats()))
        else:
            self._running[message.request_id] = Running(message)

    def _step(self, running: Running) -> list[TokenEvent]:
        submit, sampling = running.submit, running.submit.sampling
        self._misbehave(running)
        first = {}
        if running.num_tokens == 0:
            first = {"num_cached_tokens": NUM_CACHED, "scheduled_s": time.monotonic()}
            if sampling.prompt_logprobs is not None:
                entries = [_logprobs(token, sampling.prompt_logprobs) for token in submit.prompt_token_ids[1:]]
                first["prompt_logprobs"] = packed([None, *entries], sampling.prompt_logprobs)
        if sampling.seed == Script.ERROR or (sampling.seed == Script.LATE_ERROR and running.num_tokens == 2):
            del self._running[submit.request_id]
            error = {"error_code": "invalid_grammar", "error_message": "scripted"}
            return [TokenEvent(submit.request_id, finish_reason=FinishReason.ERROR, **error)]
        if sampling.max_tokens == 0:
            del self._running[submit.request_id]
            return [TokenEvent(submit.request_id, finish_reason=FinishReason.LENGTH, **first)]
        token = next(running.tokens)
        running.num_tokens += 1
        reason = stop_reason = None
        if running.num_tokens >= sampling.max_tokens and sampling.seed != Script.ENDLESS:
            reason = FinishReason.LENGTH
        if sampling.seed == Script.STOP and running.num_tokens == 2:
            reason, stop_reason = FinishReason.STOP, (sampling.stop or (None,))[0]
        if reason is not None:
            del self._running[submit.request_id]
        logprobs = None if sampling.logprobs is None else [_logprobs(token, sampling.logprobs)]
        text = self._tokenizer.decode([token])
        return [
            TokenEvent(
                submit.request_id,
                [token],
                text,
                logprobs=logprobs,
                finish_reason=reason,
                stop_reason=stop_reason,
                support=SUPPORT if reason is not None and submit.attention.is_sparse else None,
                **first,
            )
        ]

    def _misbehave(self, running: Running) -> None:
        seed = running.submit.sampling.seed
        if seed == Script.DIE and running.num_tokens == 2:
            os._exit(7)
        if seed == Script.STALL:
            time.sleep(3600)
        if seed == Script.GARBAGE:
            self._sock.sendall(b"\x04\x00\x00\x00\xc1\xc1\xc1\xc1")

    def _stats(self) -> EngineStats:
        self._num_steps += 1
        used = len(self._running)
        return EngineStats(
            num_running=used,
            num_waiting=0,
            num_pages=self._num_pages,
            num_pages_used=used,
            num_pages_cached=1,
            num_steps_total=self._num_steps,
            num_preemptions_total=2,
            num_computed_tokens_total=0,
            step_s=0.001,
            busy_s_total=self._busy_s,
            step_ended_s=time.monotonic(),
            power_w=150.0 if "SCRIPTED_POWER" in os.environ else None,
            power_source="rapl" if "SCRIPTED_POWER" in os.environ else None,
        )


def _logprobs(token: int, num_top: int) -> TokenLogprobs:
    top = [(token, -0.5), *((other, float("-inf")) for other in range(1, num_top))]
    return TokenLogprobs(token, -0.5, 1, top[:num_top])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--config", required=True)
    options = parser.parse_args()
    sock = socket.socket(fileno=options.fd)
    channel = EngineChannel(sock)
    match os.environ.get("SCRIPTED_START"):
        case "fail":
            channel.send(Failed("not_enough_memory", "The model needs 9 GiB; 1 GiB is free."))
            return 1
        case "die":
            print("dying as told", file=sys.stderr)
            return 3
        case "hang":
            channel.receive()
            return 0
    ScriptedEngine(channel, sock, msgspec.json.decode(options.config, type=EngineConfig)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
