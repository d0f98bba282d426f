"""The parts of the comparison: each measures, adds its figures to the contest's results, and gives the rows of a table.

Called by `run.py`, after the contestants were found to agree.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

from contest import RIVALS, Contest, interleave, ratio, spread
from protocol import Worker, context_ids
from server_part import HttpClient, Server
from tqdm import tqdm


def measure_decode(contest: Contest) -> list[list[str]]:
    """Tokens/s at batch 1."""
    rows = [["decode, batch 1", "context", "tokens/s (range)", "ours / theirs"]]
    figures: list[dict[str, Any]] = []
    for dtype, rivals in RIVALS.items():
        ours = f"vashista {dtype}"
        names = [ours, *(name for name in rivals if contest.options.llama_python or "llama.cpp" not in name)]
        for context in contest.options.contexts:
            measures = {
                name: _decode_of(contest.worker(name), context, contest.options.decode_tokens) for name in names
            }
            values = interleave(contest, f"{dtype} at {context}", measures)
            for name in names:
                share = None if name == ours else ratio(values[ours], values[name])
                rows.append([name, str(context), spread(values[name]), "" if share is None else f"{share:.2f}"])
                entry = {"dtype": dtype, "name": name, "context": context, "ours_over_theirs": share}
                figures.append(entry | {"tokens_per_s": values[name]})
        for name in names:
            if name not in {"vashista f32", "transformers f32"}:
                contest.release(name)
    contest.results["decode"] = figures
    return rows


def _decode_of(worker: Worker, context: int, num_tokens: int) -> Callable[[], float]:
    def measure() -> float:
        return num_tokens / sum(worker.ask("decode", context=context, num_tokens=num_tokens)["step_s"])

    return measure


def batches(contest: Contest) -> dict[str, list[tuple[list[int], int]]]:
    """Requests (prompt, number of tokens) of each load."""
    rng = random.Random(1)
    even = [(context_ids(128, contest.vocab_size, seed), 128) for seed in range(16)]
    mixed = [(context_ids(rng.randint(16, 512), contest.vocab_size, seed), rng.randint(16, 256)) for seed in range(16)]
    return {"16 x (128 + 128)": even, "16 mixed (16..512 + 16..256)": mixed}


def measure_batch(contest: Contest) -> list[list[str]]:
    """Output tokens/s of 16 requests that come at once."""
    rows = [["16 at once, f32", "load", "out tokens/s (range)", "ours / theirs"]]
    contest.results["batch"] = []
    names = ["vashista f32", "transformers f32"]
    for load, requests in batches(contest).items():
        measures = {name: _batch_of(contest.worker(name), requests) for name in names}
        values = interleave(contest, load, measures)
        share = ratio(values[names[0]], values[names[1]])
        for name in names:
            rows.append([name, load, spread(values[name]), "" if name == names[0] else f"{share:.2f}"])
        contest.results["batch"].append({"load": load, "tokens_per_s": values, "ours_over_theirs": share})
    return rows


def _batch_of(worker: Worker, requests: list[tuple[list[int], int]]) -> Callable[[], float]:
    num_expected = sum(num for _, num in requests)

    def measure() -> float:
        answer = worker.ask("batch", requests=requests)
        assert answer["num_tokens"] == num_expected, f"{worker.name} gave {answer['num_tokens']} of {num_expected}"
        return num_expected / float(answer["seconds"])

    return measure


def measure_http(contest: Contest) -> list[list[str]]:
    """A completion of 128 tokens behind 128: the engine alone, and through the server; then 64 streams."""
    with Server(contest.options.model_dir, contest.options.threads) as server:
        return _added_by_http(contest, server) + _streams(contest, server)


def _added_by_http(contest: Contest, server: Server) -> list[list[str]]:
    client = HttpClient(server.url)
    prompt = context_ids(128, contest.vocab_size)
    salts = iter(range(1_000_000))
    engine = contest.worker("vashista f32")

    def through(is_streaming: bool) -> Callable[[], float]:
        return lambda: client.complete(prompt, 128, salt=str(next(salts)), is_streaming=is_streaming)

    measures = {
        "engine alone": lambda: engine.ask("greedy", prompt=prompt, num_tokens=128, salt=str(next(salts)))["seconds"],
        "HTTP, whole": through(False),
        "HTTP, stream": through(True),
    }
    values = interleave(contest, "HTTP", measures)
    rows = [["128 + 128 tokens, f32", "seconds (range)", "added"]]
    added = {name: ratio(values[name], values["engine alone"]) - 1 for name in measures}
    rows += [[name, spread(values[name], ".3f"), f"{added[name]:+.1%}"] for name in measures]
    contest.results["http"] = {"seconds": values, "added": added}
    return rows


def _streams(contest: Contest, server: Server) -> list[list[str]]:
    summary = HttpClient(server.url).sustain(64, 128, 64, 64).summary
    text = f"{summary.output_tokens_per_s:.0f} tokens/s, {summary.num_failed} of {summary.num_requests} failed"
    contest.results["streams"] = {
        "num_streams": 64,
        "num_requests": summary.num_requests,
        "num_failed": summary.num_failed,
        "errors": summary.errors,
        "output_tokens_per_s": summary.output_tokens_per_s,
        "itl_p99_s": summary.itl.p99 if summary.itl else None,
        "ttft_p99_s": summary.ttft.p99 if summary.ttft else None,
    }
    return [["64 streams at once", text, ""]]


def measure_ready(contest: Contest) -> list[list[str]]:
    """Seconds from the start of the command to readiness."""
    values = []
    for _ in tqdm(range(max(3, contest.options.rounds)), desc="ready", leave=False, file=sys.stderr):
        with Server(contest.options.model_dir, contest.options.threads) as server:
            values.append(server.ready_s)
    contest.results["ready_s"] = values
    return [["start", "seconds (range)"], ["ready after", spread(values, ".2f")]]
