"""One HTTP request's entry in the books: what is learnt of it on its way, and the receipt in the end.

The gate opens an `Account` for each request; routes tell it what was asked and what runs, and whoever answers with an
error tells it which. A receipt is due for every request that was admitted or refused: not for the routes that answer
without the engine, such as a list of models, and none at all for health, metrics and documentation.

There is one receipt for an HTTP request, whatever the number of its choices: it is what a client is answered and
billed for, its prompt counts once, and one commit is waited for. `ReceiptFirst` holds a reply back until the receipt
is on disk; a stream waits with its end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from vashista.engine.errors import ClientGoneError, ClientStalledError, InvalidReceiptError, LedgerError, VashistaError
from vashista.engine.messages import DENSE, AttentionMode
from vashista.server.books import Books
from vashista.server.generation import Generation
from vashista.server.http_protocol import STALLED
from vashista.server.keys import Key
from vashista.server.ledger.receipt import Outcome, Receipt, utc_text
from vashista.server.ledger.sealing import box_hash
from vashista.server.openai_errors import error_response
from vashista.server.receipt_parameters import asked_attention, asked_parameters, used_parameters
from vashista.server.schemas.sampling import CommonFields

logger = logging.getLogger(__name__)
BIG_BODY_BYTES = 256 << 10
"""Larger bodies are sealed in a thread, so that other streams do not halt."""


class Account:
    """What is known of one request. For use on the event loop."""

    def __init__(
        self,
        books: Books,
        scope: Scope,
        request_id: str,
        *,
        is_kept: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._books = books
        self._scope = scope
        self._request_id = request_id
        self._is_kept = is_kept
        self._clock = clock
        self._arrival_s = clock()
        self._time = utc_text(wall_clock())
        self._asked: CommonFields | None = None
        self._generation: Generation | None = None
        self._error: VashistaError | None = None
        self._future: Future[int] | None = None
        self._body = b""
        self._box: bytes | None = None
        self.key: Key | None = None
        self.is_streamed = False
        """Whether the reply is a stream that has begun: then its end waits for the receipt, not its begin."""

    async def ask(self, body: CommonFields, raw: bytes | bytearray) -> None:
        """The valid body; `raw` are its bytes, which are sealed where prompts are kept."""
        self._asked = body
        if self._books.sealer is not None and self._is_kept:
            seal = self._books.sealer.seal
            data = bytes(raw)
            self._box = await asyncio.to_thread(seal, data) if len(data) > BIG_BODY_BYTES else seal(data)

    def run(self, generation: Generation) -> None:
        """Admission let it in, and the engine has it."""
        self._generation = generation

    def fail(self, error: VashistaError) -> None:
        """It ends with this error; the first one counts."""
        self._error = self._error or error

    def leave(self) -> None:
        """The client has gone, or was cut off."""
        stalled_s = self._scope["state"].get(STALLED)
        if stalled_s is None:
            self.fail(ClientGoneError("The client closed the connection before its reply was complete."))
        else:
            self.fail(ClientStalledError(f"The client read nothing for {stalled_s:g} s and was cut off."))

    def write(self) -> Future[int] | None:
        """Queue the receipt, once; None if none is due. The generation must be closed."""
        is_due = self._is_kept and (self._generation is not None or self._error is not None)
        if is_due and self._future is None:
            hold, error = None if self._generation is None else self._generation.admitted.hold, self._error
            try:
                receipt = self._receipt()
            except Exception:
                # A bug must not let the request pass without a receipt, nor reach the engine's channel from here.
                logger.exception("no receipt can be made")
                if hold is not None:
                    hold.cancel()
                self._future = Future()
                self._future.set_exception(InvalidReceiptError("The receipt of this request cannot be made."))
                return self._future
            self._future = self._books.write(receipt, self._box)
            if hold is not None and error is not None and error.http_status >= 500:
                hold.cancel()  # the server failed, not the client
            elif hold is not None:
                hold.settle(
                    num_tokens=receipt.num_prompt_tokens + receipt.num_output_tokens,
                    money_nano=receipt.outcome.cost_nano or 0,
                )
        return self._future

    def finish(self) -> None:
        """Write the receipt as soon as it is complete: what an aborted request took is known a step later."""
        if self._generation is None:
            self.write()
        else:
            self._generation.when_settled(self.write)

    async def settle(self) -> LedgerError | None:
        """Return once the receipt is on disk. An error takes the place of the reply: it has no receipt."""
        if self._generation is not None:
            await self._generation.wait_settled()
        future = self.write()
        if future is None:
            return None
        try:
            await asyncio.wrap_future(future)
        except LedgerError as error:
            return self._books.after_failure(error)
        return None

    def _receipt(self) -> Receipt:
        client = self._scope.get("client")
        asked, generation, error = self._asked, self._generation, self._error
        facts: dict[str, Any] = {
            "time": self._time,
            "request_id": self._request_id,
            "key_id": None if self.key is None else self.key.id,
            "client": client[0] if client and client[0] else "unix",
            "endpoint": self._scope["state"].get("route", "other"),
            "model": self._books.model,
            "model_digest": self._books.model_digest,
            "prompt_hash": None if self._box is None else box_hash(self._box),
            "error_code": None if error is None else error.code,
        }
        if generation is None:
            return Receipt(
                **facts,
                parameters={} if asked is None else asked_parameters(asked),
                num_prompt_tokens=0,
                num_cached_tokens=0,
                num_output_tokens=0,
                attention=DENSE if asked is None else asked_attention(asked),
                prediction=None if error is None or error.prediction is None else error.prediction.record(),
                outcome=Outcome(total_s=self._clock() - self._arrival_s),
            )
        assert asked is not None
        usage = generation.usage()
        attention: AttentionMode = generation.admitted.submits[0].attention
        return Receipt(
            **facts,
            parameters=used_parameters(asked, generation.admitted),
            num_prompt_tokens=usage.prompt_tokens,
            num_cached_tokens=usage.prompt_tokens_details.cached_tokens,
            num_output_tokens=usage.completion_tokens,
            attention=attention,
            support=None if usage.vashista is None else usage.vashista.support,
            prediction=generation.predicted(),
            outcome=generation.outcome(),
            finish_reasons=generation.finish_reasons(),
        )


class ReceiptFirst:
    """An ASGI `send` that lets nothing out before the account is settled, but for a stream that has begun."""

    def __init__(self, account: Account, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self._account = account
        self._scope = scope
        self._receive = receive
        self._send = send
        self._request_id = request_id
        self._start: Message | None = None
        self._is_replaced = False

    async def __call__(self, message: Message) -> None:
        """Pass the message on, or hold it, or put the ledger's error in place of the reply."""
        if self._is_replaced:
            return
        if message["type"] == "http.response.start" and not self._account.is_streamed:
            self._start = message
            return
        if self._start is not None:
            error = await self._account.settle()
            if error is not None:
                self._is_replaced = True
                await error_response(error, self._request_id, self._scope["path"])(
                    self._scope, self._receive, self._send
                )
                return
            start, self._start = self._start, None
            await self._send(start)
        await self._send(message)


def account_of(request: Request) -> Account:
    """The account that the gate opened for the request."""
    account: Account = request.scope["state"]["account"]
    return account
