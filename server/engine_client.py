"""Starts the engine process, watches it, restarts it, and carries requests to it and events back.

`server/serve.py` makes one client; `server/admission.py` and the routes submit through it; metrics read its counters.
When the engine dies, every running request ends with EngineDiedError and a new engine is started, the first time at
once and then with growing pauses. Too many deaths within ten minutes, or an engine that says it cannot start, and the
client gives up: its state is then `failed` and every request gets EngineFailedError.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec

from vashista.engine.config import EngineConfig, SavedStepTimes
from vashista.engine.errors import EngineDiedError, EngineFailedError, EngineNotReadyError, VashistaError
from vashista.engine.messages import (
    Abort,
    Attempt,
    EngineStats,
    Failed,
    FromEngine,
    Progress,
    Ready,
    StepReport,
    Stop,
    Submit,
    TokenEvent,
)
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.queue import Entry, QueueMirror
from vashista.server.engine_process import ENGINE_COMMAND, EngineProcess
from vashista.server.request_stream import RequestStream, error_from_engine

logger = logging.getLogger(__name__)
RESTART_WINDOW_S = 600.0
LAST_WORDS_S = 2.0
"""How long the end waits for what aborted requests took; a step takes less."""
DELIVERY_SHARE, MOST_LATE_S = 0.02, 0.05
"""How much one report moves what is known of its way, and the longest one that counts."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0


class EngineState(StrEnum):
    """Where the engine stands."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    CLOSED = "closed"


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How long the engine may be silent and how often it may die; from the settings."""

    start_timeout_s: float
    stall_timeout_s: float
    max_restarts: int
    """Within RESTART_WINDOW_S."""


class EngineClient:
    """The one door to the engine. All methods belong to the event loop that called `start`."""

    def __init__(
        self,
        config: EngineConfig,
        limits: EngineLimits,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        before_restart: Callable[[], object] = lambda: None,
        on_attempt: Callable[[Attempt], None] | None = None,
        on_fork: Callable[[], object] = lambda: None,
        on_start: Callable[[int], object] = lambda pid: None,
    ) -> None:
        """`before_restart` runs in a thread; a VashistaError of it is final. `on_attempt` hears of what the engine's
        code tried to reach, `on_fork` that its process is about to be started, `on_start` which it is."""
        self._before_restart = before_restart
        self._on_attempt = on_attempt
        self._on_fork = on_fork
        self._on_start = on_start
        self._config = config
        self._limits = limits
        self._command = command
        self._process: EngineProcess | None = None
        self._streams: dict[str, RequestStream] = {}
        self._aborting: dict[str, RequestStream] = {}
        """Requests that are aborted and wait for the engine's last word."""
        self._aborting_done = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._restarts: deque[float] = deque()
        self._last_sign_s = 0.0
        self._last_word: Failed | None = None
        self._preemptions_before = self._broken_gaps_before = 0
        self._busy_before_s = 0.0
        self.state = EngineState.STARTING
        self.ready: Ready | None = None
        self._last_ready: Ready | None = None
        self.stats = EngineStats()
        self.queue = QueueMirror()
        """What is in the engine."""
        self.coefficients: StepCoefficients | None = None
        """What its steps take, as it has learnt so far."""
        self.delivery_s = 2e-4
        """How long after its step an event is here, usually."""
        self.progress: Progress | None = None
        self.failure: VashistaError | None = None
        """Why the state is `failed`."""
        self.num_restarts = 0

    @property
    def num_preemptions(self) -> int:
        """Preemptions of all engines since the server started."""
        return self._preemptions_before + self.stats.num_preemptions_total

    @property
    def num_broken_gaps(self) -> int:
        """Gaps longer than promised, of all engines since the server started."""
        return self._broken_gaps_before + self.stats.num_broken_gaps_total

    @property
    def busy_s(self) -> float:
        """Busy seconds of all engines since the server started."""
        return self._busy_before_s + self.stats.busy_s_total

    @property
    def step_times(self) -> SavedStepTimes | None:
        """What the engine has learnt of its steps, to be kept for the next; None before it is ready."""
        if self._last_ready is None or self.coefficients is None:
            return None
        ready = self._last_ready
        return SavedStepTimes(
            model_digest=ready.model_digest,
            device_name=ready.device_name,
            dtype=ready.dtype,
            coefficients=self.coefficients,
        )

    @property
    def pid(self) -> int | None:
        """Process id of the engine, None while there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the engine and watch it from now on."""
        self._supervisor = asyncio.create_task(self._supervise())

    async def wait_until(self, condition: Callable[[EngineState], bool]) -> EngineState:
        """Wait until the state satisfies the condition; returns it."""
        while not condition(self.state):
            self._changed.clear()
            await self._changed.wait()
        return self.state

    def check_ready(self) -> Ready:
        """What the engine said of itself; EngineNotReadyError or EngineFailedError when it cannot answer now."""
        if self.ready is not None:
            return self.ready
        if self.failure is not None:
            raise EngineFailedError(self.failure.message)
        doing = "being restarted" if self.state is EngineState.RESTARTING else "loading the model"
        if self.progress is not None and self.progress.total_bytes:
            doing += f" ({self.progress.loaded_bytes * 100 // self.progress.total_bytes} %)"
        raise EngineNotReadyError(f"The engine is {doing}.")

    def submit(self, submits: Sequence[Submit], num_cached: Sequence[int] = ()) -> RequestStream:
        """Hand requests to the engine; their events come out of the stream, which the caller must close.

        num_cached: of each, prompt tokens expected to come from the prefix cache.
        """
        self.check_ready()
        assert self._process is not None
        stream = RequestStream([submit.request_id for submit in submits], self._abort)
        now_s = time.monotonic()
        for index, submit in enumerate(submits):
            assert submit.request_id not in self._streams
            self.queue.submit(Entry(submit, now_s, num_cached[index] if num_cached else 0))
            self._streams[submit.request_id] = stream
            self._process.send(submit)
        return stream

    def fail_all(self, error: VashistaError) -> None:
        """End every running request with the error."""
        for stream in set(self._streams.values()):
            stream.fail(error)

    async def close(self) -> None:
        """End the engine and stop watching it."""
        await self._hear_last_words()
        was_ready = self.ready is not None
        self._set_state(EngineState.CLOSED)
        if self._process is not None:
            self._process.send(Stop())
            if not was_ready:
                self._process.kill()  # it would listen only after it has loaded the model
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._process is not None:
            await self._process.end()
            self._process = None
        self.fail_all(EngineDiedError("The server is stopping."))
        self._settle_all()

    def kill(self) -> None:
        """SIGKILL to the engine, for a server that must end now."""
        if self._process is not None:
            self._process.kill()

    def _abort(self, request_id: str) -> None:
        stream = self._streams.pop(request_id, None)
        self.queue.remove(request_id)
        if stream is None:
            return
        if self._process is None:
            stream.settle(request_id)
            return
        self._aborting[request_id] = stream
        self._process.send(Abort(request_id))

    async def _hear_last_words(self) -> None:
        """Wait a moment for what aborted requests took to the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                while self._aborting and self.ready is not None:
                    self._aborting_done.clear()
                    await self._aborting_done.wait()

    def _settle_all(self) -> None:
        """No engine will say more of any request."""
        for request_id, stream in [*self._streams.items(), *self._aborting.items()]:
            stream.settle(request_id)
        self._aborting.clear()
        self._aborting_done.set()

    def _set_state(self, state: EngineState) -> None:
        if self.state is EngineState.CLOSED:
            return
        self.state = state
        if state is not EngineState.READY:
            self.ready = None
        self._changed.set()

    async def _supervise(self) -> None:
        while True:
            cause, could_not_start = await self._run_once()
            # A first start that fails with a reason fails again; a later one may have met a passing shortage.
            is_final = could_not_start and self.num_restarts == 0
            self._lose_engine()
            now_s = asyncio.get_running_loop().time()
            while self._restarts and now_s - self._restarts[0] > RESTART_WINDOW_S:
                self._restarts.popleft()
            if is_final or len(self._restarts) >= self._limits.max_restarts:
                self._give_up(cause, is_final)
                return
            pause_s = 0.0 if not self._restarts else FIRST_PAUSE_S * 2 ** (len(self._restarts) - 1)
            self._restarts.append(now_s)
            self.num_restarts += 1
            logger.error("the engine ended (%s); restarting it", cause.message)
            self._set_state(EngineState.RESTARTING)
            await asyncio.sleep(min(pause_s, LONGEST_PAUSE_S))
            try:
                await asyncio.to_thread(self._before_restart)
            except VashistaError as error:
                self._give_up(error, True)
                return

    def _lose_engine(self) -> None:
        self._preemptions_before += self.stats.num_preemptions_total
        self._broken_gaps_before += self.stats.num_broken_gaps_total
        self._busy_before_s += self.stats.busy_s_total
        self.stats = EngineStats()
        self.queue.clear()
        self._keep_step_times()
        self.progress = None
        self._set_state(EngineState.RESTARTING)
        self._settle_all()
        streams, self._streams = set(self._streams.values()), {}
        for stream in streams:
            stream.fail(EngineDiedError("The engine process ended while this request ran."))

    def _keep_step_times(self) -> None:
        """The next engine goes on from what this one has learnt."""
        if self.step_times is not None:
            self._config = msgspec.structs.replace(self._config, step_times=self.step_times)

    def _give_up(self, cause: VashistaError, is_final: bool) -> None:
        times = f" It ended {len(self._restarts) + 1} times within {RESTART_WINDOW_S / 60:.0f} minutes."
        self.failure = cause if is_final else EngineFailedError(cause.message + times)
        logger.critical("giving up on the engine: %s", self.failure.message)
        self._set_state(EngineState.FAILED)

    async def _run_once(self) -> tuple[VashistaError, bool]:
        """One engine from start to end: why it ended, and whether it said itself that it cannot start."""
        try:
            self._on_fork()
            process = self._process = await EngineProcess.start(self._command, self._config)
        except OSError as error:
            return EngineFailedError(f"The engine process cannot be started: {error.strerror}."), False
        self._on_start(process.pid)
        logger.info("engine process started", extra={"fields": {"engine_pid": process.pid}})
        self._last_sign_s = asyncio.get_running_loop().time()
        watch = asyncio.create_task(self._watch(process))
        self._last_word = None
        try:
            await process.listen(self._take)
        except msgspec.DecodeError as error:
            logger.error("the engine sent what is not a message: %s", error)
            process.kill()
        except Exception:
            # A bug of ours. Nobody would read on: requests would wait for ever for an engine that seems ready.
            logger.exception("a message of the engine could not be taken")
            process.kill()
        finally:
            watch.cancel()
        was_ready = self.ready is not None
        # Nothing can be answered any more, whatever the process still does.
        self.ready = None
        silence = await asyncio.gather(watch, return_exceptions=True)
        ending = await process.end()
        self._process = None
        if self._last_word is not None:
            return error_from_engine(self._last_word.code, self._last_word.message), not was_ready
        reason = silence[0] if isinstance(silence[0], str) else ending
        return EngineFailedError(f"The engine process ended: {reason}."), False

    def _take(self, message: FromEngine) -> None:
        """Whatever the engine says, as it arrives."""
        self._last_sign_s = asyncio.get_running_loop().time()
        match message:
            case StepReport():
                self.stats = message.stats
                self.queue.take(message)
                if message.events:
                    late_s = min(max(time.monotonic() - message.stats.step_ended_s, 0.0), MOST_LATE_S)
                    self.delivery_s += DELIVERY_SHARE * (late_s - self.delivery_s)
                self.coefficients = message.coefficients or self.coefficients
                self._share(message)
                for event in message.events:
                    self._deliver(event)
            case Progress():
                self.progress = message
            case Ready():
                self.ready = self._last_ready = message
                self.coefficients = message.coefficients
                self._set_state(EngineState.READY)
                logger.info("engine ready", extra={"fields": {"load_s": round(message.load_s, 2)}})
            case Attempt():
                if self._on_attempt is not None:
                    self._on_attempt(message)
            case Failed():
                self._last_word = message

    def _share(self, report: StepReport) -> None:
        """Give each request its share of the step."""
        power_w, source = report.stats.power_w, report.stats.power_source
        for request_id, busy_s in report.shares.items():
            stream = self._streams.get(request_id) or self._aborting.get(request_id)
            if stream is not None:
                stream.spending.add(busy_s, power_w, source)

    def _deliver(self, event: TokenEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            if event.finish_reason is not None and event.request_id in self._aborting:
                self._aborting.pop(event.request_id).settle(event.request_id)
                self._aborting_done.set()
            return  # aborted by us a moment ago
        if event.finish_reason is not None:
            del self._streams[event.request_id]
        stream.push(event)

    async def _watch(self, process: EngineProcess) -> str:
        """Kill the engine once it is silent for too long; returns what was wrong."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        interval_s = min(self._limits.start_timeout_s, self._limits.stall_timeout_s, 4.0) / 4
        while True:
            before_s = loop.time()
            await asyncio.sleep(interval_s)
            now_s = loop.time()
            if now_s - before_s > 2 * interval_s:
                # This process was held up itself: what the engine sent meanwhile is still unread.
                self._last_sign_s = now_s
            if self.ready is None and now_s - started_s > self._limits.start_timeout_s:
                reason = f"not ready within {self._limits.start_timeout_s:g} s"
            elif self.ready is not None and now_s - self._last_sign_s > self._limits.stall_timeout_s:
                reason = f"no sign of life for {self._limits.stall_timeout_s:g} s"
            else:
                continue
            process.kill()
            return reason
