"""What its receipt adds to a request of the server.

    python bench/ledger_request.py --seconds 20 --rate 200

Requests end at a steady rate, as those of a server do. Measured is the time on the event loop (usage, cost, receipt,
canonical form, queue), which other requests wait for too, and the time until the receipt is on disk, which the last
byte of the reply waits for; with and without syncing the disk at each commit.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ledger_load import SUPPORT, open_loop, percentiles_us, print_figures

from vashista.engine.messages import AttentionMode, FinishReason, SamplingParams, Submit, TokenEvent
from vashista.server.account import Account
from vashista.server.admission import Admitted, Prompt
from vashista.server.books import Books
from vashista.server.generation import Generation
from vashista.server.ledger.ledger import Ledger
from vashista.server.metrics import Metrics
from vashista.server.prices import Prices
from vashista.server.request_stream import RequestStream
from vashista.server.schemas.completions import CompletionRequest
from vashista.server.waiting_room import WaitingRoom


class SilentEngine:
    """Takes requests and says nothing of its own."""

    def submit(self, submits: list[Submit], num_cached: Sequence[int] = ()) -> RequestStream:
        self.stream = RequestStream([submit.request_id for submit in submits], lambda request_id: None)
        return self.stream


async def finished_account(books: Books, metrics: Metrics, room: WaitingRoom, number: int) -> Account:
    """A sparse request that ran and ended; its receipt is due."""
    engine, request_id = SilentEngine(), f"{number:032x}"
    params = SamplingParams(seed=number, max_tokens=256)
    attention = AttentionMode(token_budget=1024)
    submit = Submit(request_id, [1] * 100, params, time.monotonic(), attention=attention)
    admitted = Admitted([Prompt("x", submit.prompt_token_ids)], [submit], room.enter([100]), 1)
    generation = Generation(admitted, engine, metrics, Prices(per_machine_hour=3.0), None)  # type: ignore[arg-type]
    engine.stream.spending.add(0.1, 300.0, "nvml")
    last = {"finish_reason": FinishReason.LENGTH, "support": SUPPORT}
    engine.stream.push(TokenEvent(request_id, [1], "x", scheduled_s=time.monotonic(), num_cached_tokens=64, **last))
    await generation.next_events()
    scope = {"client": ("192.0.2.7", 5), "state": {"route": "/v1/completions"}}
    account = Account(books, scope, request_id)
    await account.ask(CompletionRequest(model="m", prompt=["x"], max_tokens=256, stream=True), b"")
    account.run(generation)
    generation.close()
    return account


async def request_costs(ledger: Ledger, rate: float, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds on the event loop, and until the receipt is on disk, of each request; open loop."""
    metrics = Metrics()
    books = Books(ledger, metrics, model="m", model_digest="ab" * 32)
    room = WaitingRoom(max_running_requests=1 << 20, max_waiting_requests=1 << 20, max_waiting_tokens=1 << 40)
    costs: list[float] = []
    delays: list[float] = []

    async def one(number: int) -> None:
        account = await finished_account(books, metrics, room, number)
        begin_s = time.perf_counter()
        account.write()
        costs.append(time.perf_counter() - begin_s)
        await account.settle()
        delays.append(time.perf_counter() - begin_s)

    await open_loop(one, rate, seconds)
    return costs, delays


def measure_request(rate: float, seconds: float, folder: Path) -> dict[str, float]:
    figures = {"asked_per_s": rate}
    for sync in ("FULL", "NORMAL"):
        with Ledger(folder / sync, synchronous=sync) as ledger:
            costs, delays = asyncio.run(request_costs(ledger, rate, seconds))
            figures[f"{sync.lower()}_receipts_a_batch"] = ledger.num_written_total / ledger.num_batches_total
        for name, values in (("loop_us", costs), ("on_disk_us", delays)):
            figures |= percentiles_us(f"{sync.lower()}_{name}", values)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the ledgers are made; a temporary one unless given")
    parser.add_argument("--rate", type=float, default=200.0, help="requests that end in a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        figures = measure_request(options.rate, options.seconds, options.folder or Path(made))
    print_figures(figures)


if __name__ == "__main__":
    main()
