"""What a step takes in which a prompt is read beside running streams, expected and seen.

    python bench/predict/beside.py --model DIR [--device cuda] [--streams 1,8,32] [--lengths 64,...] [--budget N]

The engine alone, in this process: so many streams run, a prompt comes every few steps, and the step that reads it is
timed. Prompts of several lengths come in random order; what the step-time model has learnt of the steps before is what
is expected of the next. On a GPU such steps are two CUDA graphs (`engine/models/decode_graph.py`), and everything is
measured twice in one run: first with these steps launched layer by layer, as they were before, then as they are.
Milliseconds, medians and 90th percentiles; the error is the median one without sign.

First the hidden states of such steps are compared: the rows of the streams and those of the prompt must be, bit for
bit, what each part gives alone, and near what the layers give; else nothing is reported. With --budget the streams are
sparse where they are long enough. The first --warm prompts of each length teach and are not counted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from first_token import BUNDLED, Step, Watch
from tabulate import tabulate

from vashista.engine.config import EngineConfig
from vashista.engine.engine import Engine
from vashista.engine.messages import DENSE, AttentionMode, SamplingParams, Submit
from vashista.engine.model_config import load_model_config
from vashista.engine.pages import root_hash
from vashista.engine.predict.step_time import StepTimeModel
from vashista.engine.request import Request
from vashista.engine.runner import Runner
from vashista.engine.scheduler import Batch, BatchItem
from vashista.engine.step import Selection, Span

LENGTHS = (16, 64, 200, 500, 1000, 2000)
TOLERANCE = 0.2
"""Relative, of each token's hidden state. Padded rows take other matrix kernels, and rounding to bfloat16 through 32
layers of random weights then makes 0.04 of the whole (H200); another token's state is off by 1.4."""
STEPS_BETWEEN = 4


def main() -> int:
    """Measure and print; 1 if a step of both gives something else than its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--streams", type=numbers, default=[1, 8, 32])
    parser.add_argument("--lengths", type=numbers, default=LENGTHS)
    parser.add_argument("--context", type=int, default=300, help="prompt tokens of each stream")
    parser.add_argument("--budget", type=int, help="tokens a KV head of the streams keeps; all unless given")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--warm", type=int, default=4)
    options = parser.parse_args()
    num_steps = (options.warm + options.times) * len(options.lengths) * (1 + STEPS_BETWEEN)
    most = load_model_config(str(options.model)).max_position_embeddings
    context = max(options.context + num_steps, *options.lengths) + 64
    if context > most:
        parser.error(
            f"so many steps take {context} tokens of context, the model has {most}: lower --times or --lengths"
        )
    config = EngineConfig(
        model_dir=str(options.model), device=options.device, max_running_requests=max(options.streams) + 1,
        max_context=context, prefix_caching=False,
    )  # fmt: skip
    engine = Engine(config)
    ready, watch = engine.ready, Watch(engine)
    print(
        f"{ready.device_name}, torch {torch.__version__}, {ready.num_parameters / 1e9:.2f} G parameters, {ready.dtype}"
    )
    if max(options.lengths) + max(options.streams) > ready.rules.max_batch_tokens:
        parser.error(f"a step has {ready.rules.max_batch_tokens} tokens at most: lower --lengths or --streams")
    is_captured = engine._runner.model.is_captured
    if is_captured and not all(is_same(engine._runner, count, options) for count in options.streams):
        return 1
    kinds = ("layers", "graphs") if is_captured else ("layers",)
    found = {}
    for kind in kinds:
        with_graphs(engine, is_whole=kind == "graphs")
        engine.step_times = StepTimeModel(ready.coefficients, engine.step_times._work)
        for count in options.streams:
            found[kind, count] = measure(engine, watch, count, options)
    rows = []
    for count in options.streams:
        for length in options.lengths:
            row: dict[str, Any] = {"streams": count, "prompt": length}
            for kind in kinds:
                row |= {f"{kind}: {name}": value for name, value in figures(found[kind, count][length]).items()}
            rows.append(row)
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
    for kind in kinds:
        steps = [step for count in options.streams for of_length in found[kind, count].values() for step in of_length]
        print(f"{kind}: median error {statistics.median(step.error for step in steps):.1%} of {len(steps)} steps")
    return 0


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def with_graphs(engine: Engine, *, is_whole: bool) -> None:
    """Let steps of streams and prompts be graphs, or launch them layer by layer."""
    graphs = engine._runner.model._graphs
    if graphs is None:
        return
    parts: Callable[[list[Span]], list[Any]] = type(graphs)._parts.__get__(graphs)

    def alike(spans: list[Span]) -> list[Any]:
        return parts(spans) if len({span.num_queries > 1 for span in spans}) == 1 else []

    graphs._parts = parts if is_whole else alike  # type: ignore[method-assign]


def measure(engine: Engine, watch: Watch, count: int, options: argparse.Namespace) -> dict[int, list[Step]]:
    """Steps of each length beside so many streams."""
    source = random.Random(count)
    mode = DENSE if options.budget is None else AttentionMode(token_budget=options.budget)
    num_tokens = engine.ready.max_context - options.context
    for index in range(count):
        submit(engine, source, f"stream {index}", options.context, num_tokens, mode)
    while engine.progress or engine.stats.num_waiting:  # until all prompts are read
        engine.step()
    steps: dict[int, list[Step]] = {length: [] for length in options.lengths}
    for turn in range(options.warm + options.times):
        for length in source.sample(options.lengths, len(options.lengths)):
            submit(engine, source, "prompt", length, 1, DENSE)
            coefficients, begin_s = engine.step_times.coefficients, time.perf_counter()
            events = engine.step()
            seen_s = time.perf_counter() - begin_s
            assert len(events) == count + 1, "the prompt took more than a step, or a stream ended"
            if turn >= options.warm:
                steps[length].append(Step(coefficients.step_s(engine._busy.features), seen_s, watch.launch_s))
            for _ in range(STEPS_BETWEEN):
                engine.step()
    for index in range(count):
        engine.abort(f"stream {index}")
    return steps


def submit(
    engine: Engine, source: random.Random, name: str, length: int, max_tokens: int, attention: AttentionMode
) -> None:
    token_ids = [source.randrange(3, engine.ready.vocab_size) for _ in range(length)]
    sampling = SamplingParams(seed=0, max_tokens=max_tokens, ignore_eos=True)
    engine.submit(Submit(name, token_ids, sampling, time.monotonic(), attention=attention))


def figures(steps: list[Step]) -> dict[str, float]:
    """Of one length, ms."""

    def at(values: list[float], share: float) -> float:
        return 1e3 * sorted(values)[min(len(values) - 1, int(share * len(values)))]

    seen = [step.seen_s for step in steps]
    return {
        "expected": 1e3 * statistics.median(step.expected_s for step in steps),
        "seen": at(seen, 0.5),
        "90 %": at(seen, 0.9),
        "error, %": 100 * statistics.median(step.error for step in steps),
        "launch": at([step.launch_s for step in steps], 0.5),
    }


def is_same(runner: Runner, count: int, options: argparse.Namespace) -> bool:
    """Whether steps of both give what their parts give, and nearly what the layers give. Writes into free pages."""
    source, size = random.Random(count), runner.config.page_size
    num_pages = -(-max(options.context, *options.lengths) // size)
    lengths = [length for length in options.lengths if length <= 1024]
    requests = []
    for index in range(count + 1):
        token_ids = [source.randrange(3, runner.model_config.vocab_size) for _ in range(max(options.context, *lengths))]
        sampling = SamplingParams(seed=0, max_tokens=1)
        requests.append(Request(Submit(str(index), token_ids, sampling, arrival_s=0.0), root_hash("bench")))
        requests[-1].pages = list(range(index * num_pages, (index + 1) * num_pages))
    *streams, prompt = requests
    if options.context > 1:
        for request in streams:
            execute(runner, [BatchItem(request, 0, options.context - 1)], None)
    shape, selection = runner.attention_shape, None
    if options.budget is not None and options.budget < options.context:
        selection = Selection(
            torch.full((shape.num_layers, shape.num_kv_heads), options.budget, dtype=torch.int32), [(0, 0)]
        )
    items = [BatchItem(request, options.context - 1, 1) for request in streams]
    for length in lengths:
        own = [BatchItem(prompt, 0, length)]
        graphs, runner.model._graphs = runner.model._graphs, None
        by_layers = execute(runner, items + own, selection)
        runner.model._graphs = graphs
        for _ in range(3):  # captured by then
            parts = torch.cat([execute(runner, items, selection), execute(runner, own, None)])
        both = execute(runner, items + own, selection)
        error = float(((both.float() - by_layers.float()).norm(dim=1) / by_layers.float().norm(dim=1)).max())
        if not torch.equal(both, parts) or not error <= TOLERANCE:
            print(
                f"{count} streams and {length} tokens: equal to its parts: {torch.equal(both, parts)}, off {error:.1e}"
            )
            return False
    return True


def execute(runner: Runner, items: list[BatchItem], selection: Selection | None) -> torch.Tensor:
    """Hidden states of all tokens of a step."""
    output = runner.execute(Batch(items), lambda item: True, lambda item: selection if item.num_tokens == 1 else None)
    return output.hidden


if __name__ == "__main__":
    sys.exit(main())
