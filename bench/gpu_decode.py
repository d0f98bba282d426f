"""What a decode step of a whole model takes on a GPU: `python bench/gpu_decode.py [--model DIR] [--contexts 1024,...]`.

Without --model a model of Llama-3.1-8B's shape is made of random weights (bfloat16, with the bundled tokenizer's
vocabulary of 8,192; --layers for a smaller one). For each batch and context a step is timed three ways in one run, on
the same pages: dense, layer by layer, as it ran before decode steps were captured; dense, as a CUDA graph; sparse, with
--budget tokens a KV head, as a CUDA graph. First the graphs must give the hidden states of the layers, else nothing is
reported. A time is the median of 20 steps, from the scheduler's batch to the chosen tokens and what was left out on the
host. Beside it the least time that reading weights and what is attended to takes at the given bandwidth.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tabulate import tabulate

from vashista.engine.config import EngineConfig
from vashista.engine.errors import VashistaError
from vashista.engine.messages import SamplingParams, Submit
from vashista.engine.model_config import load_model_config
from vashista.engine.pages import root_hash
from vashista.engine.request import Request
from vashista.engine.runner import Runner, StepOutput
from vashista.engine.scheduler import Batch, BatchItem
from vashista.engine.step import Selection

BUNDLED = Path(__file__).resolve().parents[1] / "deploy" / "models" / "reference-26m"
SHAPE_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
}  # fmt: skip
NUM_WARM, NUM_TIMED = 5, 20
ROOM = 64
"""Tokens of the context that are kept for what is generated."""
TOLERANCE = 2e-2
"""Relative, of hidden states in bfloat16: a padded batch takes other matrix kernels."""


def main() -> int:
    """Print a table; 1 if a graph computes something else than the layers."""
    options = parse()
    if options.make:
        options.make.mkdir(parents=True, exist_ok=True)
        print(make_model(options.make, SHAPE_8B | {"num_hidden_layers": options.layers}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(Path(folder), SHAPE_8B | {"num_hidden_layers": options.layers})
        config = EngineConfig(model_dir=str(model), device="cuda", max_context=max(options.contexts) + ROOM,
                              max_running_requests=max(options.batches))  # fmt: skip
        runner = Runner(config, load_model_config(model))
    print(f"{runner.device_name}, torch {torch.__version__}, {runner.num_parameters / 1e9:.2f} G parameters, "
          f"{runner.dtype}, {options.budget} tokens kept")  # fmt: skip
    rows = [measure(runner, batch, context, options) for context in options.contexts for batch in options.batches]
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, all of them usable. SystemExit with status 2 for others."""
    sys.path.append(str(Path(__file__).with_name("quality")))
    from argument_kinds import listed, new_file, real, token_budget, whole

    parser = argparse.ArgumentParser("gpu_decode.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=whole(1), default=32)
    parser.add_argument("--make", type=Path, help="only write the random model into this folder, for other benchmarks")
    parser.add_argument("--batches", type=listed(whole(1)), default=[1, 8, 32])
    parser.add_argument("--contexts", type=listed(whole(1)), default=[1024, 32000])
    parser.add_argument("--budget", type=token_budget, default=1024)
    parser.add_argument("--read-tbs", type=real(0.01, 100.0), default=3.08,
                        help="read bandwidth, TB/s; an H100's unless given")  # fmt: skip
    parser.add_argument("--json", type=new_file)
    options = parser.parse_args(arguments)
    if options.make:
        return options
    try:
        shape = load_model_config(options.model).max_position_embeddings if options.model else None
    except VashistaError as error:
        parser.error(f"{error.message} {error.remedy}")
    most = (shape or int(SHAPE_8B["max_position_embeddings"])) - ROOM
    if max(options.contexts) > most:
        parser.error(f"a context of {max(options.contexts)} tokens was asked for; the model takes {most} at most")
    if not torch.cuda.is_available():
        parser.error(f"decoding is timed on a GPU, but torch {torch.__version__} sees none; --make needs none")
    return options


def make_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A Llama of the shape with random weights."""
    config = json.loads((BUNDLED / "config.json").read_text()) | shape
    (folder / "config.json").write_text(json.dumps(config))
    for path in BUNDLED.glob("*token*.json"):
        shutil.copy(path, folder)
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return (0.02 * torch.randn(size, generator=generator, device=device)).bfloat16().cpu()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": draw(config["vocab_size"], hidden), "model.norm.weight": ones}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        tensors |= {f"{prefix}.{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
        tensors |= {f"{prefix}.self_attn.{name}_proj.weight": draw(size, hidden)
                    for name, size in (("q", queries), ("k", keys), ("v", keys))}  # fmt: skip
        tensors[f"{prefix}.self_attn.o_proj.weight"] = draw(hidden, queries)
        tensors |= {f"{prefix}.mlp.{name}_proj.weight": draw(inner, hidden) for name in ("gate", "up")}
        tensors[f"{prefix}.mlp.down_proj.weight"] = draw(hidden, inner)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def measure(runner: Runner, batch: int, context: int, options: argparse.Namespace) -> dict[str, Any]:
    """One batch at one context; all requests share the pages of one prompt, which is read first."""
    generator = torch.Generator().manual_seed(context)
    token_ids = torch.randint(3, runner.model_config.vocab_size, (context,), generator=generator).tolist()
    requests = [make_request(runner, str(index), token_ids) for index in range(batch)]
    for start in range(0, context - 1, 4096):
        num_tokens = min(4096, context - 1 - start)
        runner.execute(Batch([BatchItem(requests[0], start, num_tokens)]), lambda item: False)
    items = [BatchItem(request, context - 1, 1) for request in requests]
    shape = runner.attention_shape
    selection = Selection(torch.full((shape.num_layers, shape.num_kv_heads), options.budget, dtype=torch.int32), [])
    graphs, runner.model._graphs = runner.model._graphs, None
    assert graphs is not None
    slow = {name: execute(runner, items, chosen).hidden for name, chosen in (("dense", None), ("sparse", selection))}
    eager_s = time_steps(runner, items, None)
    runner.model._graphs = graphs
    fast = {}
    for name, chosen in (("dense", None), ("sparse", selection)):
        for _ in range(4):
            fast[name] = execute(runner, items, chosen).hidden
        error = float((fast[name].float() - slow[name].float()).norm() / slow[name].float().norm())
        if not error <= TOLERANCE:
            raise SystemExit(f"batch {batch}, context {context}: {name} graphs are off by {error:.1e}")
    kept = min(options.budget, context)
    weights = 2 * runner.num_parameters
    token_bytes = 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    return {
        "batch": batch,
        "context": context,
        "dense, layers, ms": 1e3 * eager_s,
        "dense, graph, ms": 1e3 * time_steps(runner, items, None),
        "sparse, graph, ms": 1e3 * time_steps(runner, items, selection if kept < context else None),
        "least dense, ms": 1e3 * (weights + batch * context * token_bytes) / (options.read_tbs * 1e12),
        "least sparse, ms": 1e3 * (weights + batch * (kept + context / 39) * token_bytes) / (options.read_tbs * 1e12),
    }


def make_request(runner: Runner, name: str, token_ids: list[int]) -> Request:
    request = Request(Submit(name, token_ids, SamplingParams(seed=0, max_tokens=1), arrival_s=0.0), root_hash("bench"))
    request.pages = list(range(-(-len(token_ids) // runner.config.page_size)))
    return request


def execute(runner: Runner, items: list[BatchItem], selection: Selection | None) -> StepOutput:
    return runner.execute(Batch(items), lambda item: True, lambda item: selection)


def time_steps(runner: Runner, items: list[BatchItem], selection: Selection | None) -> float:
    """Median seconds of a step."""
    times = []
    for _ in range(NUM_WARM + NUM_TIMED):
        began_s = time.perf_counter()
        output = execute(runner, items, selection)
        best = runner.logits(output.hidden).argmax(-1)
        output.take_support()
        best.tolist()
        times.append(time.perf_counter() - began_s)
    return statistics.median(times[NUM_WARM:])


if __name__ == "__main__":
    sys.exit(main())
