"""The server's books: whether it may answer now, and the way of a receipt to the ledger.

`server/serve.py` makes one; the gate opens an `Account` in it for each request, and admission asks `check` before it
lets a request in. What happens when the ledger fails is decided here: with `ledger_on_failure = refuse` nothing is
answered without a receipt on disk, with `serve` it is, counted and logged as an alarm.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from vashista.engine.errors import LedgerError
from vashista.server.ledger.ledger import Ledger
from vashista.server.ledger.receipt import Receipt
from vashista.server.ledger.sealing import Sealer
from vashista.server.metrics import Metrics
from vashista.server.strangers import Strangers

logger = logging.getLogger(__name__)
STRANGERS_S = 60.0
"""A count of refused strangers is written after this time, if no stranger of the next minute had it written."""
ALARM_S = 10.0
"""An alarm that goes on is repeated so often."""


class Books:
    """The ledger, and what the settings say of it."""

    def __init__(
        self,
        ledger: Ledger,
        metrics: Metrics,
        *,
        model: str,
        model_digest: str | None = None,
        refuses_on_failure: bool = True,
        sealer: Sealer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.model_digest = model_digest
        self.sealer = sealer
        """Seals request bodies; None where prompts are not kept."""
        self._ledger = ledger
        self._metrics = metrics
        self._refuses = refuses_on_failure
        self._clock = clock
        self._alarmed_at = -ALARM_S
        self._strangers = Strangers()
        self._flush_timer: asyncio.TimerHandle | None = None

    @property
    def path(self) -> Path:
        """The database."""
        return self._ledger.path

    @property
    def fingerprint(self) -> str:
        """Of the key that signs the ledger."""
        return self._ledger.public_key.fingerprint

    def check(self) -> None:
        """The LedgerError with which requests are refused now, if they are."""
        if self._refuses:
            try:
                self._ledger.check()
            except LedgerError as error:
                raise _for_client(error) from None

    def write(self, receipt: Receipt, box: bytes | None) -> Future[int]:
        """Queue a receipt; never raises. The future gives its number once it is on disk, or why it was lost.

        One of a stranger may only be counted: then the future gives 0 at once.
        """
        if not Strangers.concerns(receipt):
            return self._append(receipt, box)
        due = self._strangers.take(receipt)
        futures = [self._append(one, None) for one in due]
        if self._strangers.num_counted and self._flush_timer is None:
            self._flush_timer = asyncio.get_running_loop().call_later(STRANGERS_S, self.flush)
        if due and due[-1] is receipt:
            return futures[-1]
        counted: Future[int] = Future()
        counted.set_result(0)
        return counted

    def flush(self) -> None:
        """Queue the receipts that count refused strangers; called at the server's end, too."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        for receipt in self._strangers.flush():
            self._append(receipt, None)

    def _append(self, receipt: Receipt, box: bytes | None) -> Future[int]:
        begun_at = self._clock()
        try:
            future = self._ledger.append(receipt, box)
        except LedgerError as error:
            logger.error("a receipt was lost: error[%s]: %s", error.code, error.message)
            self._metrics.receipts_rejected.inc()
            future = Future()
            future.set_exception(error)
            return future
        future.add_done_callback(lambda written: self._observe(written, begun_at))
        return future

    def _observe(self, written: Future[int], begun_at: float) -> None:
        """Called by the ledger's thread."""
        if written.exception() is None:
            self._metrics.ledger_commit.observe(self._clock() - begun_at)

    def after_failure(self, error: LedgerError) -> LedgerError | None:
        """What the client gets instead of the reply whose receipt was lost; None when the reply goes out after all."""
        if self._refuses:
            return _for_client(error)
        self._metrics.answers_without_receipt.inc()
        now_s = self._clock()
        if now_s - self._alarmed_at >= ALARM_S:
            self._alarmed_at = now_s
            logger.critical(
                "ALARM: requests are answered without receipts: error[%s]: %s %s",
                error.code,
                error.message,
                error.remedy,
            )
        return None


def _for_client(error: LedgerError) -> LedgerError:
    """The same kind of error without the paths of the server's log."""
    return type(error)(f"This server answers nothing without a receipt, and none can be written now: {error.__doc__}")
