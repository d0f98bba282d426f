"""The server's life: listen, start the engine, answer, drain, end. `vashista serve` calls `run`.

The ledger is opened while the engine loads and closed when everything else has ended.

Signals: the first SIGTERM or SIGINT drains (new requests get 503, accepted ones may take `drain_timeout_s` more); a
second one ends the server at once. An engine that cannot be started ends the server with the engine's own error; an
engine that dies later does not. A socket that systemd passed is shared with the next server: this one
takes connections from when its engine can answer until the first signal, and none is refused. The engine process is
started before the web libraries are imported: the two take about a second each, side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click
import msgspec
import uvloop

from vashista.engine.errors import DrainingError, LedgerError
from vashista.engine.offline import go_offline
from vashista.server.engine_client import EngineClient, EngineLimits, EngineState
from vashista.server.engine_process import ENGINE_COMMAND
from vashista.server.isolation.confinement import Confinement, confine
from vashista.server.keys import KeyStore
from vashista.server.listening import Listener, listen
from vashista.server.logs import configure_logging
from vashista.server.model_store.startup import VerifiedModel, check_before_load
from vashista.server.model_store.store import in_use
from vashista.server.prediction_file import PredictionFile
from vashista.server.settings import Settings
from vashista.server.state_folder import held
from vashista.server.systemd import ServiceManager
from vashista.server.tls import Tls

if TYPE_CHECKING:
    from vashista.server.http import HttpServer
    from vashista.server.ledger.ledger import Ledger
    from vashista.server.served_model import ServedModel
    from vashista.server.services import Services

logger = logging.getLogger(__name__)
END_S = 15.0
"""What the end may take besides the drain: last writes, the engine, the ledger's checkpoint."""


def run(settings: Settings, *, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serve until a signal; the exit status. Raises a VashistaError when the server cannot start."""
    configure_logging(settings.log_level, settings.log_format)
    go_offline(os.environ)
    allow_all_files()
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(settings.state_dir))
        keys = KeyStore(settings.keys_path)
        stack.callback(keys.close)
        if keys.are_needed() and all(key.is_revoked for key in keys.list()):
            logger.warning(
                "there is no live API key, so every request is refused: make one with `vashista keys create NAME`, or "
                "let everyone in with `vashista keys open`"
            )
        if settings.model.is_dir():
            stack.enter_context(in_use(settings.model))
        tls = None if settings.tls_certificate is None else Tls(settings)
        manager = ServiceManager(os.environ)
        stack.callback(manager.close)
        listener = listen(settings, manager.passed_socket())
        stack.callback(listener.close)
        confinement = confine(settings.isolation, wants_filter=settings.network_filter, listener=listener.socket)
        stack.callback(confinement.close)

        def open_ledger() -> Ledger:
            from vashista.server.ledger.ledger import Ledger

            ledger = Ledger(settings.state_dir, synchronous=settings.ledger_sync.upper())
            stack.callback(_close_ledger, ledger)
            return ledger

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            server = Server(settings, listener, keys, open_ledger, manager, confinement, tls, engine_command)
            return runner.run(server.serve())


def _close_ledger(ledger: Ledger) -> None:
    """Write what waits and sign a checkpoint: after the loop has ended, so that no request can come behind it."""
    try:
        ledger.close()
    except LedgerError as error:
        logger.error("the ledger cannot be closed: error[%s]: %s %s", error.code, error.message, error.remedy)


def allow_all_files() -> None:
    """Raise the soft limit of open files, often 1024, to the hard one: each connection is a file."""
    # A unit may forbid the calls, which Python says as either error, and then sets the limit itself.
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Server:
    """One server from its start to its end."""

    def __init__(
        self,
        settings: Settings,
        listener: Listener,
        keys: KeyStore,
        open_ledger: Callable[[], Ledger],
        manager: ServiceManager,
        confinement: Confinement,
        tls: Tls | None = None,
        engine_command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._confinement = confinement
        self._manager = manager
        self._tls = tls
        self._verified: VerifiedModel | None = None
        self._model: ServedModel | None = None
        self._open_ledger = open_ledger
        self._settings = settings
        self._listener = listener
        self._keys = keys
        limits = EngineLimits(
            start_timeout_s=settings.engine_start_timeout_s,
            stall_timeout_s=settings.engine_stall_timeout_s,
            max_restarts=settings.max_engine_restarts,
        )
        self._predictions = PredictionFile(settings.state_dir)
        self._saved = self._predictions.load()
        config = settings.engine_config()
        if self._saved is not None:
            config = msgspec.structs.replace(config, step_times=self._saved.step_times)
        self.engine = EngineClient(
            config,
            limits,
            command=engine_command,
            before_restart=lambda: check_before_load(settings),
            on_attempt=confinement.count_of_engine,
            on_fork=confinement.expect_fork,
            on_start=confinement.expect_engine,
        )
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    async def serve(self) -> int:
        """Everything, in order. 0 after a drain, 1 when a second signal cut it short."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        self._verified = await asyncio.to_thread(check_before_load, self._settings)
        watch = None if self._tls is None else asyncio.create_task(self._tls.watch())
        self.engine.start()
        try:
            services, http = await asyncio.to_thread(self._load)
            if self._listener.is_inherited:
                await self._engine_known()  # clients wait in the socket meanwhile
            http_task = asyncio.create_task(http.serve(sockets=[self._listener.socket]))
            try:
                async with (
                    self._manager.signs_of_life(),
                    self._confinement.followed(),
                    self._predictions.kept(services.forecaster.state),
                ):
                    await self._until_stopped(services)
                    await self._drain(services, http)
            finally:
                http.should_exit = True
                http.force_exit = self._stop_now.is_set()
                await http_task
                services.books.flush()
        finally:
            if self._stop_now.is_set():
                self.engine.kill()
            await self.engine.close()
            if self._model is not None:
                self._model.close()
            if watch is not None:
                watch.cancel()
        logger.info("stopped")
        return 1 if self._stop_now.is_set() else 0

    def stop(self) -> None:
        """Drain and end; called again, end at once."""
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    def _load(self) -> tuple[Services, HttpServer]:
        """Open the ledger, import the web libraries and read the model's text files, while the engine loads."""
        from vashista.server.http import HttpServer, uvicorn_config
        from vashista.server.served_model import ServedModel
        from vashista.server.services import Services

        ledger = self._open_ledger()
        model = self._model = ServedModel.load(self._settings, self._verified)
        services = Services.build(self._settings, model, self.engine, self._keys, ledger)
        services.metrics.follow_tls(self._tls)
        services.metrics.follow_confinement(self._confinement)
        if self._saved is not None:
            services.forecaster.restore(self._saved)
        return services, HttpServer(uvicorn_config(services, self._tls))

    async def _engine_known(self) -> None:
        """Wait until the engine can answer or a signal comes. Raises the error of an engine that cannot start."""
        known = asyncio.create_task(
            self.engine.wait_until(lambda state: state in {EngineState.READY, EngineState.FAILED})
        )
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({known, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (known, stopped):
            task.cancel()
        if self.engine.failure is not None and not self._stop.is_set():
            raise self.engine.failure

    async def _until_stopped(self, services: Services) -> None:
        """Wait for the engine, announce it, wait for a signal. Raises the error of an engine that cannot start."""
        await self._engine_known()
        if not self._stop.is_set():
            gc.collect()
            gc.freeze()  # what is there now stays: the collector need not walk through it between two tokens
            _announce(services, self._listener, needs_key=self._keys.are_needed())
            self._manager.tell("READY=1", f"STATUS=Serving {services.model.name}.")
        await self._stop.wait()

    async def _drain(self, services: Services, http: HttpServer) -> None:
        timeout_us = int((self._settings.drain_timeout_s + END_S) * 1e6)
        self._manager.tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={timeout_us}", "STATUS=Finishing accepted requests.")
        if self._listener.is_inherited:
            # What was taken from the socket is answered, also what has not come as far as admission yet.
            await http.hand_over()
            empty = asyncio.create_task(http.wait_answered())
        else:
            services.room.close()
            empty = asyncio.create_task(services.room.wait_empty())
        fields = {"requests": services.room.num_inside, "timeout_s": self._settings.drain_timeout_s}
        logger.info("draining", extra={"fields": fields})
        now = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait({empty, now}, timeout=self._settings.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        services.room.close()
        if not empty.done():
            logger.warning("ending %d requests that are not finished", services.room.num_inside)
            self.engine.fail_all(DrainingError("The server stopped before this request was finished."))
        empty.cancel()
        now.cancel()


def _announce(services: Services, listener: Listener, *, needs_key: bool) -> None:
    """Print the announcement. Where it cannot go, as to a full disk, the server serves all the same."""
    if sys.stdout is None:
        return
    try:
        click.echo(_announcement(services, listener, needs_key=needs_key))
    except OSError as error:
        logger.warning("the announcement cannot be written to stdout: %s", error.strerror)


def _announcement(services: Services, listener: Listener, *, needs_key: bool) -> str:
    """The address, and a command to try it."""
    body = {"model": services.model.name, "prompt": "It was a dark and stormy night", "max_tokens": 32}
    key = '-H "Authorization: Bearer $KEY" ' if needs_key else ""
    ready = services.engine.ready
    device = f" on {ready.device_name}" if ready is not None else ""
    return (
        f"Vashista serves {services.model.name}{device} at {listener.url} (process {os.getpid()}).\n"
        f"{_attention_line(services)}{_ledger_line(services)}Try:\n\n"
        f"  curl {listener.curl_options}{listener.url}/v1/completions -H 'Content-Type: application/json' "
        f"{key}-d {shlex.quote(json.dumps(body))}\n"
    )


def _ledger_line(services: Services) -> str:
    """Where receipts go and whose they are: a fingerprint noted elsewhere shows that a ledger was replaced."""
    return f"Receipts go to {services.books.path}, signed by the key {services.books.fingerprint}.\n"


def _attention_line(services: Services) -> str:
    """How requests attend, and whether budgets were measured."""
    ready, settings = services.engine.ready, services.settings
    if ready is None or ready.attention == "dense":
        return ""
    line = f"Attention is {ready.attention}; requests are {settings.attention_mode} unless they ask otherwise.\n"
    if not ready.has_support_profile:
        line += (
            "It has no support profile of its own: a max_dropped_mass starts from half of the context, and what is "
            "dropped corrects it.\n"
            f"Measure one with `vashista calibrate {shlex.quote(str(settings.model))}`.\n"
        )
    return line
