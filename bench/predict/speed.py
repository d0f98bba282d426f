"""What one prediction costs in process: the queue run forward, intervals, support, price, as admission makes them.

    python bench/predict/speed.py

Queues of several sizes, half of the requests sparse, two newcomers a second. Before each prediction the queue takes in
a step's report of all that run, which is timed by itself (of 64 requests, at the end); each 24th prediction begins with
new coefficients, as the engine says them, and that is timed with it. Says the median and 99th percentile of single
predictions in milliseconds, the latter also of the processor's time alone, without that of neighbours, and of the
machine itself: of a computation in C that is always the same, takes as long as the median prediction, needs no memory
and comes after each prediction. Last come the events that the simulation went through. The first 50 are not counted.
With --plain the same in Python alone, as where there is no C compiler.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from vashista.engine.messages import (
    AttentionMode,
    EngineStats,
    SamplingParams,
    SchedulerRules,
    StepReport,
    Submit,
    TokenEvent,
)
from vashista.engine.model_config import load_model_config
from vashista.engine.predict.conformal import Conformal
from vashista.engine.predict.expected_support import SupportForecast
from vashista.engine.predict.predictor import Predictor
from vashista.engine.predict.queue import Entry, QueueMirror
from vashista.engine.predict.step_time import SOLVE_STEPS, guess_of
from vashista.engine.support_profile import FILE_NAME, SupportProfile
from vashista.engine.work import WorkModel
from vashista.server.foresight import QUANTITIES, Rates, look_ahead
from vashista.server.prices import Prices

MODEL = Path(__file__).parents[2] / "deploy" / "models" / "reference-26m"
QUEUES = ((0, 0), (1, 0), (8, 0), (64, 0), (64, 32), (64, 256), (64, 512))
"""(running, waiting) requests; the last are as many as the default settings let in."""
WARM_UP = 50
NEWCOMERS_S = 0.5


def main() -> None:
    """Measure each queue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    source = random.Random(1)
    is_compiled = predictor_of(options.model, is_plain=options.plain).is_compiled
    how = "compiled" if is_compiled else "in Python"
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {how}")
    print(
        "| running | waiting | median, ms | 99th percentile, ms | of the processor's time | of the machine | events |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for num_running, num_waiting in QUEUES:
        predictor = predictor_of(options.model, is_plain=options.plain)
        for second in range(200):
            predictor.arrivals.observe(second * NEWCOMERS_S, [(200, 100)], is_met=True)
        queue = queue_of(source, num_running, num_waiting)
        predict = prediction(predictor, queue, source)
        report, takes_s = report_of(queue, num_running, num_tokens=0), []
        times_s, cpu_s, machine_s, num_events = [], [], [], 0
        same_work = work_of(1e-4)
        for index in range(WARM_UP + options.times):
            begin_s = time.perf_counter()
            queue.take(report)
            taken_s, cpu_begin_s = time.perf_counter(), time.thread_time()
            if index % SOLVE_STEPS == 0:
                predictor.set_coefficients(msgspec.structs.replace(predictor.coefficients, num_steps=index))
            num_events += predict()
            ended_s, cpu_ended_s = time.perf_counter(), time.thread_time()
            same_work()
            worked_s = time.perf_counter()
            takes_s.append(taken_s - begin_s), times_s.append(ended_s - taken_s)
            cpu_s.append(cpu_ended_s - cpu_begin_s), machine_s.append(worked_s - ended_s)
            if index + 1 == WARM_UP:
                same_work = work_of(statistics.median(times_s))
                for each in (takes_s, times_s, cpu_s, machine_s):
                    each.clear()
        p99_s, p99_cpu_s, p99_machine_s = (sorted(each)[int(0.99 * len(each))] for each in (times_s, cpu_s, machine_s))
        mean_events = num_events / (WARM_UP + options.times)
        print(
            f"| {num_running} | {num_waiting} | {1e3 * statistics.median(times_s):.3f} | {1e3 * p99_s:.3f} "
            f"| {1e3 * p99_cpu_s:.3f} | {1e3 * p99_machine_s:.3f} | {mean_events:.0f} |"
        )
        if (num_running, num_waiting) == QUEUES[-1]:
            print(f"\na report of {num_running} requests is taken in within {1e3 * statistics.median(takes_s):.3f} ms")


def work_of(seconds: float) -> Callable[[], object]:
    """A computation without memory that takes so long, in the middle."""
    num_rounds, times_s = 200, []
    for _ in range(100):
        begin_s = time.perf_counter()
        hashlib.pbkdf2_hmac("sha256", b"", b"", num_rounds)
        times_s.append(time.perf_counter() - begin_s)
    each_s = statistics.median(times_s) / num_rounds
    return functools.partial(hashlib.pbkdf2_hmac, "sha256", b"", b"", max(1, round(seconds / each_s)))


def predictor_of(model_dir: Path, *, is_plain: bool = False) -> Predictor:
    """For the model on a CPU, with outcomes of none."""
    config = load_model_config(str(model_dir))
    work = WorkModel.of(config)
    rules = SchedulerRules(
        page_size=64, num_pages=8192, max_running_requests=64, max_batch_tokens=512, prefix_caching=True
    )
    profile = SupportProfile.load(model_dir / FILE_NAME, str(model_dir)) if (model_dir / FILE_NAME).exists() else None
    support = SupportForecast(config.layer_windows, profile, 256)
    return Predictor(work, rules, guess_of(work, device="cpu", dtype="float32", times=None), support, is_plain=is_plain)


def queue_of(source: random.Random, num_running: int, num_waiting: int) -> QueueMirror:
    """Requests of mixed sizes, as the engine's last report left them."""
    queue = QueueMirror()
    for number in range(num_running + num_waiting):
        queue.submit(Entry(submit_of(source, f"r{number}", arrival_s=number * 1e-3), number * 1e-3))
    queue.take(report_of(queue, num_running, num_tokens=20))
    return queue


def report_of(queue: QueueMirror, num_running: int, num_tokens: int) -> StepReport:
    """A step of the first requests."""
    running = [entry.id for entry in queue.ordered[:num_running]]
    events = [TokenEvent(name, token_ids=[1] * num_tokens) for name in running]
    stats = EngineStats(num_pages_used=4 * num_running, step_ended_s=99.99)
    return StepReport(events, stats, dict.fromkeys(running, 1e-3))


def submit_of(source: random.Random, name: str, arrival_s: float) -> Submit:
    """A chat that may stop before its limit."""
    mode = AttentionMode(token_budget=512) if source.random() < 0.5 else AttentionMode()
    sampling = SamplingParams(seed=0, max_tokens=source.randint(60, 300), temperature=1.0)
    return Submit(name, [7] * source.randint(20, 600), sampling, arrival_s, attention=mode)


def prediction(predictor: Predictor, queue: QueueMirror, source: random.Random) -> Callable[[], int]:
    """A function that predicts a new request and returns the events it took."""
    conformal = {name: Conformal() for name in QUANTITIES}
    for own in conformal.values():
        for _ in range(300):
            own.observe(1.0, own.bounds("queued dense"), source.lognormvariate(0, 0.2), ["queued dense"])

    def predict() -> int:
        submit = submit_of(source, "own", arrival_s=100.0)
        ahead = look_ahead(
            predictor,
            queue,
            [submit],
            [0],
            now_s=100.0,
            before_s=1e-3,
            conformal=conformal,
            rates=Rates(Prices(per_machine_hour=1.0)),
        )
        return ahead.forecast.timeline.num_events

    return predict


if __name__ == "__main__":
    main()
