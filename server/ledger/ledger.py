"""The ledger as the server uses it: `append` from any thread, one thread that writes.

Admission and generation make a `Receipt` and wait for the future of `append` before they answer the last of a
request; it resolves once the receipt is on disk. Receipts that wait together share one transaction and one sync of the
disk, so that a slow disk makes larger batches. `check` tells admission whether the last write failed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from vashista.engine.errors import LedgerClosedError, LedgerError, LedgerOverloadedError
from vashista.server.ledger.receipt import Receipt, encode
from vashista.server.ledger.signing import PublicKey
from vashista.server.ledger.writer import ChainWriter

log = logging.getLogger(__name__)

CHECKPOINT_ROWS = 4096
CHECKPOINT_S = 3600.0
QUEUE_ROWS = 16384
QUEUE_BYTES = 256 << 20
"""Receipts and sealed prompts that wait."""
BATCH_ROWS = 1024
BUSY_TIMEOUT_S = 2.0
RETRY_S = 1.0
LINGER_S = 0.002
"""Under load the next batch waits so long for more receipts: fewer syncs and signatures, less of the server's CPU."""


class Ledger:
    """A ledger open for writing. All methods may be called from any thread, and none but `close` waits for the disk."""

    def __init__(
        self,
        folder: Path,
        *,
        checkpoint_rows: int = CHECKPOINT_ROWS,
        checkpoint_s: float = CHECKPOINT_S,
        queue_rows: int = QUEUE_ROWS,
        batch_rows: int = BATCH_ROWS,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
        retry_s: float = RETRY_S,
        linger_s: float = LINGER_S,
        synchronous: str = "FULL",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the ledger in the state folder, or begin one. LedgerError when it cannot be written or is damaged."""
        self._writer = ChainWriter(
            folder,
            checkpoint_rows=checkpoint_rows,
            checkpoint_s=checkpoint_s,
            busy_timeout_s=busy_timeout_s,
            synchronous=synchronous,
            clock=clock,
        )
        self._queue_rows = queue_rows
        self._batch_rows = batch_rows
        self._retry_s = retry_s
        self._linger_s = linger_s
        self._committed_at = 0.0
        self._waiting: deque[_Entry] = deque()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self._failure: LedgerError | None = None
        self.num_written_total = 0
        """Receipts on disk since the start. Metrics read these three without a lock."""
        self.num_failed_total = 0
        self.num_batches_total = 0
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path:
        """The database."""
        return self._writer.path

    @property
    def public_key(self) -> PublicKey:
        """Checks the signatures of this ledger; its fingerprint is worth printing at the start."""
        return self._writer.public

    @property
    def num_waiting(self) -> int:
        """Receipts that are not handed to the disk yet."""
        return len(self._waiting)

    @property
    def checkpoint_age_s(self) -> float:
        """Seconds since the last signed checkpoint, or since the start."""
        return self._writer.checkpoint_age_s

    @property
    def failure(self) -> LedgerError | None:
        """Why the last write failed; None again after one that went well. It is tried again every `retry_s`."""
        return self._failure

    def check(self) -> None:
        """Raise why receipts cannot be written now, if they cannot: before a request is let in."""
        failure = self._failure
        if failure is not None:
            raise type(failure)(failure.message)
        if self._is_closed:
            raise LedgerClosedError("The ledger is closed.")
        self._check_room()

    def append(self, receipt: Receipt, box: bytes | None = None) -> Future[int]:
        """Queue a receipt and its sealed prompt. The future gives its number once both are on disk, or the LedgerError
        that lost them.

        It cannot be cancelled. Raises at once InvalidReceiptError, LedgerOverloadedError, LedgerClosedError.
        """
        body = encode(receipt)
        future: Future[int] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            if self._is_closed:
                raise LedgerClosedError("The ledger is closed.")
            self._check_room()
            entry = _Entry(body, box, future)
            self._waiting.append(entry)
            self._waiting_bytes += entry.num_bytes
            self._changed.notify()
        return future

    def close(self) -> None:
        """Write what waits, sign a checkpoint, close. A second call does nothing. LedgerError if that fails."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        try:
            self._writer.write([], checkpoint=True)
        finally:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    is_awake = self._changed.wait(self._retry_s if self._failure else None)
                    if not is_awake:
                        break
            if self._waiting and time.monotonic() - self._committed_at < self._linger_s:
                time.sleep(self._linger_s)
            with self._changed:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._batch_rows))]
                self._waiting_bytes -= sum(entry.num_bytes for entry in batch)
                if not batch and self._is_closed:
                    return
            # An empty batch renews the head: the test whether an unwritable ledger can be written again.
            self._write(batch)

    def _write(self, batch: list[_Entry]) -> None:
        try:
            first = self._writer.write([entry.body for entry in batch], boxes=[entry.box for entry in batch])
        except Exception as error:
            failure = (
                error if isinstance(error, LedgerError) else LedgerError(f"The ledger cannot be written: {error!r}.")
            )
            self._fail(failure, batch)
            return
        if self._failure is not None:
            log.warning("the ledger can be written again")
        self._failure = None
        self.num_written_total += len(batch)
        self.num_batches_total += 1
        self._committed_at = time.monotonic()
        for seq, entry in enumerate(batch, first):
            entry.future.set_result(seq)

    def _fail(self, failure: LedgerError, batch: list[_Entry]) -> None:
        if self._failure is None or self._failure.message != failure.message:
            log.error("error[%s]: %s %s", failure.code, failure.message, failure.remedy)
        self._failure = failure
        self.num_failed_total += len(batch)
        for entry in batch:
            # One exception object each: raising adds its traceback to it.
            entry.future.set_exception(type(failure)(failure.message))

    def _check_room(self) -> None:
        num_rows, num_bytes = len(self._waiting), self._waiting_bytes
        if num_rows >= self._queue_rows or num_bytes >= QUEUE_BYTES:
            raise LedgerOverloadedError(
                f"{num_rows} receipts of {num_bytes} bytes wait for the ledger's disk; no more are taken."
            )


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one `append` asked for."""

    body: bytes
    box: bytes | None
    future: Future[int]

    @property
    def num_bytes(self) -> int:
        return len(self.body) + len(self.box or b"")
