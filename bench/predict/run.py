"""How far predictions lie from what came: three mixes, idle and at 30, 60 and 90 % of capacity, through a real server.

    python bench/predict/run.py fit --state DIR                    what the server learns from; once
    python bench/predict/run.py cell --state DIR --mix chat --load 60 --seconds 120 --out FILE
    python bench/predict/run.py report FILE ...

`fit` serves requests of lengths that no mix has, for `--seconds`, so that a server that has been running is measured;
each cell starts a server on a copy of that state. A cell measures capacity first (12 clients that never pause), then
sends Poisson arrivals at the load's share of it, or one request after the other where the load is 0. Nothing of that is
left out: the first requests count as the last. The server, its engine and the client share the machine; how much of it
others used meanwhile stands beside the figures. A cell in which a request fails reports nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from figures import conditions, figures, table
from machine import shares, usage
from served import Server, one_by_one, open_loop, throughput
from workload import MIXES, draw

MODEL = Path(__file__).parents[2] / "deploy" / "models" / "reference-26m"
VOCAB_SIZE = 8192
CLIENTS = 12
CAPACITY_REQUESTS = {"chat": 60, "documents": 14, "both": 36}


def main() -> None:
    """Run a part."""
    options = parse()
    if options.part == "report":
        results = options.files
        print(table((result["cell"], figures(result["usages"])) for result in results))
        print(f"\n{conditions(results)}")
    elif options.part == "fit":
        asyncio.run(_fit(options))
    else:
        result = asyncio.run(_cell(options))
        options.out.write_text(json.dumps(result))
        print(result["machine"])
        print(table([(result["cell"], figures(result["usages"]))]))
        print(f"\n{conditions([result])}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, all of them usable. SystemExit with status 2 for others."""
    sys.path.append(str(Path(__file__).parents[1] / "quality"))
    from argument_kinds import new_file, real, whole

    parser = argparse.ArgumentParser(
        "run.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    fit = parts.add_parser("fit", allow_abbrev=False)
    cell = parts.add_parser("cell", allow_abbrev=False)
    for part in (fit, cell):
        part.add_argument("--state", type=Path, required=True, help="state folder of the server")
        part.add_argument("--seconds", type=real(1.0, 86400.0), default=120.0)
        part.add_argument("--model", default=str(MODEL))
        part.add_argument("--flag", action="append", default=[], help="further flag of vashista serve")
        part.add_argument("--vocab-size", type=whole(301), default=VOCAB_SIZE, help="token ids from 300 on are drawn")
    cell.add_argument("--mix", choices=MIXES, required=True)
    cell.add_argument("--load", type=real(0.0, 200.0), required=True, help="per cent of capacity; 0 is one by one")
    cell.add_argument("--seed", type=int, default=1)
    cell.add_argument("--rate", type=real(0.001, 1e5), help="requests a second, instead of measuring capacity")
    cell.add_argument("--out", type=new_file, required=True)
    report = parts.add_parser("report", allow_abbrev=False)
    report.add_argument("files", type=_result, nargs="+", help="of cells")
    options = parser.parse_args(arguments)
    if options.part == "cell" and not options.state.is_dir():
        cell.error(f"there is no state folder {options.state}; `run.py fit --state {options.state}` makes it")
    if options.part == "cell" and options.rate and not options.load:
        cell.error("--rate is a load's; with --load 0 one request follows the other")
    return options


def _result(name: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be read: {error}") from None
    if not isinstance(found, dict) or not {"cell", "usages", "cpu", "capacity", "drifting"} <= found.keys():
        raise argparse.ArgumentTypeError(f"{name} is no cell's; `run.py cell --out FILE` writes such files")
    return found


async def _fit(options: argparse.Namespace) -> None:
    """Uniform lengths, at two rates and one by one."""
    source = random.Random("fit")
    loop = asyncio.get_running_loop()
    with Server(options.model, options.state, options.flag) as server:
        end_s = loop.time() + options.seconds
        while loop.time() < end_s:
            await one_by_one(server.port, [_odd(source, options.vocab_size) for _ in range(6)])
            bodies = [_odd(source, options.vocab_size) for _ in range(12)]
            await open_loop(server.port, bodies, source.choice([0.5, 1.0, 2.0, 4.0]), source)


def _odd(source: random.Random, vocab_size: int) -> dict[str, Any]:
    num_prompt = source.choice([source.randint(1, 900), source.randint(1, 900), source.randint(900, 8000)])
    body: dict[str, Any] = {
        "prompt": [source.randrange(300, vocab_size) for _ in range(num_prompt)],
        "max_tokens": source.randint(1, 120),
        "ignore_eos": source.random() < 0.5,
        "seed": source.randrange(1 << 31),
    }
    if source.random() < 0.5:
        body["vashista"] = {"attention": {"token_budget": source.choice([256, 1024, 2048])}}
    return body


async def _cell(options: argparse.Namespace) -> dict[str, Any]:
    source = random.Random(f"{options.mix}/{options.load}/{options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        shutil.copytree(options.state, state)
        with Server(options.model, state, options.flag) as server:
            port = server.port

            def bodies(count: int) -> list[dict[str, Any]]:
                return [draw(options.mix, source, options.vocab_size) for _ in range(count)]

            ready = server.get("/ready")
            capacity = None
            if options.load:
                capacity = options.rate and options.rate / options.load * 100
                if capacity is None:
                    capacity = await throughput(port, bodies(CAPACITY_REQUESTS[options.mix]), CLIENTS)
            before = usage([os.getpid()])
            if capacity is not None:
                rate = capacity * options.load / 100
                usages = await open_loop(port, bodies(max(8, round(rate * options.seconds))), rate, source)
            else:
                usages, loop = [], asyncio.get_running_loop()
                end_s = loop.time() + options.seconds
                while loop.time() < end_s:
                    usages += await one_by_one(port, bodies(4))
            drifting = "vashista_prediction_drifting 1.0" in server.text("/metrics")
            cpu = shares(before, usage([os.getpid()]))
    return {
        "cell": f"{options.mix}, {f'{options.load:g} %' if options.load else 'idle'}",
        "capacity": capacity,
        "machine": f"{ready['device_name']}, {os.cpu_count()} cores, {platform.machine()}",
        "cpu": cpu,
        "drifting": drifting,
        "usages": usages,
    }


if __name__ == "__main__":
    main()
