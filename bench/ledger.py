"""What the ledger costs and stands: speed of append and verify, and 200 kills.

    python bench/ledger.py speed --seconds 20 --rate 2000
    python bench/ledger.py verify --rows 1000000
    python bench/ledger.py kill --times 200

`speed` appends at a steady rate from an event loop, as the server does, and measures what `append` costs its caller
and how long until the receipt is on disk; then it appends as fast as it can. `verify` fills a ledger (without syncing)
and times both verifiers. `write` is the process that `kill` kills: it prints a number for each receipt on disk.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

from ledger_load import SUPPORT, open_loop, percentiles_us, print_figures

from vashista.engine.messages import AttentionMode, FinishReason
from vashista.server.ledger.ledger import Ledger
from vashista.server.ledger.receipt import Outcome, Receipt, utc_text
from vashista.server.ledger.verify import verify

STANDALONE = Path(__file__).parents[1] / "deploy" / "verify_ledger.py"


def make_receipt(number: int) -> Receipt:
    """A receipt of a sparse request, with everything in it: about 1.5 KB."""
    prediction = {"ttft_s": [0.1, 0.2, 0.3], "time_per_token_s": [0.01, 0.02, 0.03], "total_s": [1.0, 2.0, 3.0]}
    return Receipt(
        time=utc_text(time.time()),
        request_id=f"{number:032x}",
        key_id="4f0c2a9be1d7",
        client="192.0.2.7",
        endpoint="/v1/chat/completions",
        model="reference-26m",
        model_digest="sha256:" + "ab" * 32,
        parameters={"max_tokens": 256, "temperature": 0.7, "top_p": 0.95, "seed": number, "stream": True},
        num_prompt_tokens=8000 + number % 100,
        num_cached_tokens=4096,
        num_output_tokens=256,
        attention=AttentionMode(token_budget=1024),
        support=SUPPORT,
        prediction={**prediction, "coverage": 0.9},
        outcome=Outcome(queue_s=0.01, ttft_s=0.2, total_s=2.0, busy_s=0.5, energy_j=12.5, cost_nano=15000),
        finish_reasons=(FinishReason.STOP,),
    )


async def steady(ledger: Ledger, rate: float, seconds: float) -> dict[str, float]:
    """What `append` costs its caller, and how long until a receipt is on disk."""
    costs: list[float] = []
    delays: list[float] = []

    async def one(number: int) -> None:
        receipt = make_receipt(number)
        begin_s = time.perf_counter()
        future = ledger.append(receipt)
        costs.append(time.perf_counter() - begin_s)
        await asyncio.wrap_future(future)
        delays.append(time.perf_counter() - begin_s)

    took_s = await open_loop(one, rate, seconds)
    figures = {"asked_per_s": rate, "written_per_s": len(delays) / took_s}
    for name, values in (("append_us", costs), ("on_disk_us", delays)):
        figures |= {**percentiles_us(name, values), f"{name}_max": max(values) * 1e6}
    return figures


def burst(ledger: Ledger, seconds: float) -> float:
    """Receipts a second with 1000 of them always waiting."""
    begin_s = time.perf_counter()
    waiting: list[Future[int]] = []
    number = 0
    while time.perf_counter() - begin_s < seconds:
        waiting.append(ledger.append(make_receipt(number)))
        number += 1
        if len(waiting) > 1000:
            waiting.pop(0).result()
    for future in waiting:
        future.result()
    return number / (time.perf_counter() - begin_s)


def measure_speed(rate: float, seconds: float, folder: Path) -> dict[str, float]:
    with Ledger(folder) as ledger:
        cpu_s = time.process_time()
        figures = asyncio.run(steady(ledger, rate, seconds))
        figures["cpu_us_a_receipt"] = (time.process_time() - cpu_s) / (rate * seconds) * 1e6
        figures["receipts_a_batch"] = ledger.num_written_total / ledger.num_batches_total
        figures["burst_per_s"] = burst(ledger, min(seconds, 5.0))
    return figures


def measure_verify(num_rows: int, folder: Path) -> dict[str, float]:
    begin_s = time.perf_counter()
    with Ledger(folder, synchronous="OFF") as ledger:
        last: Future[int] | None = None
        for number in range(num_rows):
            if number % 1000 == 0 and last is not None:
                last.result()
            last = ledger.append(make_receipt(number))
    path = folder / "ledger.db"
    figures: dict[str, float] = {"rows": num_rows, "fill_s": time.perf_counter() - begin_s}
    figures["bytes_a_row"] = path.stat().st_size / num_rows
    begin_s = time.perf_counter()
    verdict = verify(path)
    figures["verify_s"] = time.perf_counter() - begin_s
    assert verdict.is_intact
    assert verdict.num_receipts == num_rows
    begin_s = time.perf_counter()
    subprocess.run([sys.executable, "-I", str(STANDALONE), str(path)], check=True, stdout=subprocess.DEVNULL)
    figures["standalone_s"] = time.perf_counter() - begin_s
    return figures


def kill_writers(times: int, folder: Path) -> dict[str, float]:
    """Kill a writing process again and again; stops at the first receipt that was acknowledged and is not there."""
    source = random.Random(7)
    acknowledged = 0
    for _ in range(times):
        with subprocess.Popen([sys.executable, __file__, "write", str(folder)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(source.randint(1, 300))]
            writer.kill()
            lines += writer.stdout.read().split(b"\n")[:-1]
        acknowledged = max(map(int, lines))
        verdict = verify(folder / "ledger.db")
        assert verdict.damage is None, verdict.damage
        assert verdict.num_receipts >= acknowledged, (verdict, acknowledged)
    return {"kills": times, "acknowledged": acknowledged, "written": verdict.num_receipts, "lost": 0}


def write_for_ever(folder: Path) -> None:
    """Append without pause, in small batches, and print the number of each receipt that is on disk."""
    ledger = Ledger(folder, checkpoint_rows=16)
    waiting: list[Future[int]] = []
    number = 0
    while True:
        waiting.append(ledger.append(make_receipt(number)))
        number += 1
        if len(waiting) > 8:
            os.write(1, b"%d\n" % waiting.pop(0).result())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "verify", "kill", "write"])
    parser.add_argument(
        "folder", type=Path, nargs="?", help="where the ledger is made; a temporary folder unless given"
    )
    parser.add_argument("--rate", type=float, default=2000.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=200)
    options = parser.parse_args()
    if options.what == "write":
        write_for_ever(options.folder)
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or Path(made)
        if options.what == "speed":
            figures = measure_speed(options.rate, options.seconds, folder)
        elif options.what == "verify":
            figures = measure_verify(options.rows, folder)
        else:
            figures = kill_writers(options.times, folder)
    print_figures(figures)


if __name__ == "__main__":
    main()
