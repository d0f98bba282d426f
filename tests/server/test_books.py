"""Policy of the books when the ledger fails, and what an account writes; with a ledger that is not there."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

import pytest

from vashista.engine.errors import InvalidReceiptError, LedgerError, LedgerFullError, QueueFullError
from vashista.server.account import Account, ReceiptFirst
from vashista.server.books import ALARM_S, Books
from vashista.server.ledger.receipt import Receipt
from vashista.server.metrics import Metrics

FULL = LedgerFullError("The ledger /srv/secret/ledger.db cannot be used: database or disk is full (SQLITE_FULL).")


class FakeLedger:
    """Takes receipts; tests resolve the futures."""

    def __init__(self) -> None:
        self.failure: LedgerError | None = None
        self.refusal: LedgerError | None = None
        self.receipts: list[Receipt] = []
        self.futures: list[Future[int]] = []

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def append(self, receipt: Receipt, box: bytes | None) -> Future[int]:
        if self.refusal is not None:
            raise self.refusal
        self.receipts.append(receipt)
        self.futures.append(Future())
        return self.futures[-1]


class Sent:
    """An ASGI `send`."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def __call__(self, message: Any) -> None:
        self.messages.append(message)


def make(**changes: Any) -> tuple[FakeLedger, Books, Metrics]:
    ledger, metrics = FakeLedger(), Metrics()
    return ledger, Books(ledger, metrics, model="m", **changes), metrics  # type: ignore[arg-type]


def scope() -> dict[str, Any]:
    return {"type": "http", "path": "/v1/completions", "client": ("192.0.2.7", 5), "state": {}}


START = {"type": "http.response.start", "status": 429, "headers": []}
BODY = {"type": "http.response.body", "body": b"x", "more_body": False}


async def receive() -> Any:
    return {"type": "http.disconnect"}


async def begin(account: Account, sent: Sent) -> asyncio.Task[None]:
    """Send a whole reply; it has gone as far as it can when this returns."""
    send = ReceiptFirst(account, scope(), receive, sent, "id")

    async def reply() -> None:
        await send(START)
        await send(BODY)

    task = asyncio.create_task(reply())
    await asyncio.sleep(0)
    return task


def test_nothing_of_a_reply_leaves_before_its_receipt_is_on_disk() -> None:
    async def check() -> None:
        ledger, books, _ = make()
        account, sent = Account(books, scope(), "id"), Sent()
        account.fail(QueueFullError("full", retry_after_s=1))
        task = await begin(account, sent)
        assert [receipt.error_code for receipt in ledger.receipts] == ["queue_full"]
        assert sent.messages == []
        ledger.futures[0].set_result(1)
        await task
        assert sent.messages == [START, BODY]
        account.write()
        assert len(ledger.receipts) == 1

    asyncio.run(check())


def test_a_reply_that_needs_no_receipt_is_not_held() -> None:
    async def check() -> None:
        ledger, books, _ = make()
        for account in (Account(books, scope(), "id"), Account(books, scope(), "id", is_kept=False)):
            sent = Sent()
            await (await begin(account, sent))
            assert sent.messages == [START, BODY]
        assert ledger.receipts == []

    asyncio.run(check())


@pytest.mark.parametrize("fails_at_once", [True, False])
def test_a_lost_receipt_turns_the_reply_into_the_ledgers_error_without_the_servers_paths(fails_at_once: bool) -> None:
    async def check() -> None:
        ledger, books, metrics = make()
        ledger.refusal = FULL if fails_at_once else None
        account, sent = Account(books, scope(), "id"), Sent()
        account.fail(QueueFullError("full", retry_after_s=1))
        task = await begin(account, sent)
        if not fails_at_once:
            ledger.futures[0].set_exception(FULL)
        await task
        start, body = sent.messages
        assert start["status"] == 503
        assert b'"code":"ledger_full"' in body["body"]
        assert b"secret" not in body["body"]
        rejected = metrics.receipts_rejected._value.get()
        assert rejected == float(fails_at_once)

    asyncio.run(check())


def test_a_server_that_serves_on_answers_counts_and_repeats_its_alarm(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    _, books, metrics = make(refuses_on_failure=False, clock=lambda: now[0])
    for _ in range(3):
        assert books.after_failure(FULL) is None
    assert len(caplog.records) == 1
    assert caplog.records[0].levelname == "CRITICAL"
    now[0] += ALARM_S
    books.after_failure(FULL)
    assert len(caplog.records) == 2
    assert metrics.answers_without_receipt._value.get() == 4


def test_a_ledger_that_fails_refuses_before_a_request_is_let_in_unless_told_to_serve() -> None:
    for refuses in (True, False):
        ledger, books, _ = make(refuses_on_failure=refuses)
        books.check()
        ledger.failure = FULL
        if refuses:
            with pytest.raises(LedgerFullError, match="receipt") as caught:
                books.check()
            assert "secret" not in caught.value.message
        else:
            books.check()


def test_a_receipt_that_cannot_be_written_down_is_an_error_of_its_own() -> None:
    ledger, books, _ = make()
    ledger.refusal = InvalidReceiptError("The receipt has 999999 bytes.")
    account = Account(books, scope(), "id")
    account.fail(QueueFullError("full", retry_after_s=1))
    error = asyncio.run(account.settle())
    assert isinstance(error, InvalidReceiptError)
    assert error.http_status == 500


def test_a_bug_in_making_a_receipt_is_an_error_and_lets_nothing_pass(caplog: pytest.LogCaptureFixture) -> None:
    ledger, books, _ = make()
    account = Account(books, {"type": "http", "path": "/", "client": 5, "state": {}}, "id")
    account.fail(QueueFullError("full", retry_after_s=1))
    account.finish()
    assert isinstance(asyncio.run(account.settle()), InvalidReceiptError)
    assert ledger.receipts == []
    assert len(caplog.records) == 1


def test_the_first_error_counts_and_times_come_from_the_clocks() -> None:
    ledger, books, _ = make()
    now = iter([100.0, 102.5])
    account = Account(books, scope(), "id", clock=lambda: next(now), wall_clock=lambda: 0.0)
    account.fail(QueueFullError("full", retry_after_s=1))
    account.leave()
    account.write()
    (receipt,) = ledger.receipts
    assert receipt.error_code == "queue_full"
    assert receipt.time == "1970-01-01T00:00:00.000000Z"
    assert receipt.outcome.total_s == 2.5
    assert receipt.client == "192.0.2.7"
