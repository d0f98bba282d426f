"""What the first token of a prompt takes in an idle engine, expected and seen, and where the time goes.

    python bench/predict/first_token.py --model DIR [--device cuda]

The engine alone, in this process: a prompt is one step. Prompts of several lengths come in random order, with pauses
between them as between the requests of an idle server; what the step-time model has learnt of the ones before is what
is expected of the next. Of each length: the expected and the seen time of the step (medians, the seen one's 10th and
90th percentile), the median error without sign, how long the host took to launch it, and how long the device works on
it alone. The last is measured once the others are done: the device is kept busy while the host launches the step, so
that it then runs without waiting for the host; on a CPU there is no such time. Where launching takes as long as the
step and working much less, the step waits for the host. A last table repeats one length after several pauses.

The first --warm prompts of each length teach and are not counted. On a GPU a model of 8B shape comes from
`python bench/gpu_decode.py --make DIR`; the whole then takes about a minute.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from vashista.engine.config import EngineConfig
from vashista.engine.engine import Engine
from vashista.engine.messages import SamplingParams, Submit
from vashista.engine.model_config import load_model_config

BUNDLED = Path(__file__).parents[2] / "deploy" / "models" / "reference-26m"
LENGTHS = (16, 35, 64, 100, 128, 200, 256, 320, 512, 1000, 2000, 4000)
BLOCK_CYCLES = 400_000_000
"""Of the device's clock, about 0.2 s: longer than the launch of any step."""
PAUSED_LENGTH = 128


@dataclass
class Step:
    """One prompt's."""

    expected_s: float
    seen_s: float
    launch_s: float

    @property
    def error(self) -> float:
        """Relative, without sign."""
        return abs(self.expected_s / self.seen_s - 1.0)


class Watch:
    """Stands before the runner's `execute` and times its launch."""

    def __init__(self, engine: Engine) -> None:
        self._inner: Callable[..., Any] = engine._runner.execute
        self.launch_s = 0.0
        self.is_blocked = False
        self.device_s = 0.0
        engine._runner.execute = self  # type: ignore[method-assign,assignment]

    def __call__(self, *arguments: Any) -> Any:
        if self.is_blocked:
            return self._blocked(*arguments)
        begin_s = time.perf_counter()
        output = self._inner(*arguments)
        self.launch_s = time.perf_counter() - begin_s
        return output

    def _blocked(self, *arguments: Any) -> Any:
        """The device starts when all is launched."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(BLOCK_CYCLES)
        events[0].record()
        output = self._inner(*arguments)
        events[1].record()
        torch.cuda.synchronize()
        self.device_s = events[0].elapsed_time(events[1]) / 1e3
        return output


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=LENGTHS)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds before each prompt")
    parser.add_argument("--pauses", type=lambda text: [float(part) for part in text.split(",")], default=[0, 0.05, 0.5])
    options = parser.parse_args()
    most = load_model_config(str(options.model)).max_position_embeddings
    config = EngineConfig(
        model_dir=str(options.model), device=options.device, max_running_requests=8, max_context=min(8192, most),
        prefix_caching=False,
    )  # fmt: skip
    begin_s = time.perf_counter()
    engine = Engine(config)
    watch, source = Watch(engine), random.Random(1)
    ready = engine.ready
    print(
        f"{ready.device_name}, torch {torch.__version__}, {ready.num_parameters / 1e9:.2f} G parameters, {ready.dtype}"
    )
    print(f"ready after {time.perf_counter() - begin_s:.1f} s\n")
    lengths = [length for length in options.lengths if length + 8 <= ready.max_context]
    steps: dict[int, list[Step]] = {length: [] for length in lengths}
    for turn in range(options.warm + options.times):
        for length in source.sample(lengths, len(lengths)):
            step = prompt(engine, watch, source, length, options.pause)
            if turn >= options.warm:
                steps[length].append(step)
    rows = [row(str(length), of_length, device_s(engine, watch, source, length)) for length, of_length in steps.items()]
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
    everything = [step for of_length in steps.values() for step in of_length]
    print(f"\nall lengths: median error {statistics.median(step.error for step in everything):.1%}\n")
    rows = []
    for pause_s in options.pauses:
        paused = [prompt(engine, watch, source, PAUSED_LENGTH, pause_s) for _ in range(options.times)]
        rows.append(row(f"{PAUSED_LENGTH} after {pause_s:g} s", paused, None))
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))


def prompt(engine: Engine, watch: Watch, source: random.Random, length: int, pause_s: float) -> Step:
    """Read one prompt to its first token, and a few tokens more, as a request would."""
    time.sleep(pause_s)
    token_ids = [source.randrange(3, engine.ready.vocab_size) for _ in range(length)]
    engine.submit(Submit("one", token_ids, SamplingParams(seed=0, max_tokens=4, ignore_eos=True), time.monotonic()))
    step_times = engine.step_times
    coefficients, begin_s, events, launch_s = step_times.coefficients, time.perf_counter(), [], 0.0
    expected_s, seen_s = 0.0, 0.0
    while not events:  # a long prompt takes several steps
        events = engine.step()
        launch_s += watch.launch_s
        expected_s += coefficients.step_s(engine._busy.features)
    seen_s = time.perf_counter() - begin_s
    while engine.has_work:
        engine.step()
    return Step(expected_s, seen_s, launch_s)


def device_s(engine: Engine, watch: Watch, source: random.Random, length: int) -> float | None:
    """The least of three times that the device works on a prompt of one step; None where there is no telling."""
    if not engine.ready.device.startswith("cuda"):
        return None
    found = []
    for _ in range(3):
        token_ids = [source.randrange(3, engine.ready.vocab_size) for _ in range(length)]
        engine.submit(Submit("one", token_ids, SamplingParams(seed=0, max_tokens=1), time.monotonic()))
        watch.is_blocked = True
        engine.step()
        watch.is_blocked = False
        found.append(watch.device_s)
        if engine.has_work:  # it takes more than one step
            engine.abort("one")
            return None
    return min(found)


def row(name: str, steps: list[Step], device_s: float | None) -> dict[str, Any]:
    """Of one length, in ms."""
    seen = sorted(step.seen_s for step in steps)
    launches = sorted(step.launch_s for step in steps)

    def at(values: list[float], share: float) -> float:
        return 1e3 * values[min(len(values) - 1, int(share * len(values)))]

    return {
        "prompt": name,
        "expected, ms": 1e3 * statistics.median(step.expected_s for step in steps),
        "seen": at(seen, 0.5),
        "10 %": at(seen, 0.1),
        "90 %": at(seen, 0.9),
        "error, %": 100 * statistics.median(step.error for step in steps),
        "launch": at(launches, 0.5),
        "launch 90 %": at(launches, 0.9),
        "device": "-" if device_s is None else f"{1e3 * device_s:.2f}",
    }


if __name__ == "__main__":
    main()
