"""Compares Vashista on a CPU with llama.cpp and transformers, on the same model, the same threads, in one run.

    python bench/engine_cpu/run.py --llama-python PATH/bin/python --json result.json

`--llama-python` is an interpreter with llama-cpp-python and gguf; without it llama.cpp is left out. Parts:

- decode:  tokens/s at batch 1 behind contexts of 128, 1k and 4k tokens, f32 to f32 and bf16 to bf16 and f16
- batch:   16 requests at once against transformers' padded `generate`; 128 + 128 tokens each, and mixed lengths
- http:    a 128-token completion through the server against the engine alone; 64 streams at once
- ready:   seconds from the start of `vashista serve` to the first 200 of /ready

First greedy tokens of all three must agree in f32; otherwise nothing is measured and the exit status is 1. Contestants
take turns in every round, so that a slow minute of the machine hits all; figures are medians over rounds with the least
and the greatest. Ratios are medians of the ratios of each round. Nothing else may run on the machine: the load average
at the start is part of the result. Do not set PYTHONSAFEPATH.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from contest import Contest
from parts import measure_batch, measure_decode, measure_http, measure_ready
from protocol import context_ids
from tokenizers import Tokenizer

from vashista.server.loadgen.report import table

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"decode": measure_decode, "batch": measure_batch, "http": measure_http, "ready": measure_ready}
CHECK_TOKENS = 64
CHECK_PROMPTS = (
    "It was a dark and stormy night, and the old captain",
    "The code of elephant is 48213. Question: what is the code of elephant? Answer: the code of elephant is ",
    "She opened the letter and read",
)


def check(contest: Contest) -> list[str]:
    """Greedy tokens of all contestants in f32; the disagreements, none when all agree."""
    tokenizer = Tokenizer.from_file(str(Path(contest.options.model_dir) / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in CHECK_PROMPTS] + [context_ids(300, contest.vocab_size)]
    names = ["transformers f32", "vashista f32"] + (["llama.cpp f32"] if contest.options.llama_python else [])
    problems = []
    for index, prompt in enumerate(prompts):
        answers = {
            name: contest.worker(name).ask("greedy", prompt=prompt, num_tokens=CHECK_TOKENS)["tokens"] for name in names
        }
        judge = answers.pop("transformers f32")
        for name, tokens in answers.items():
            if tokens != judge:
                first = next((at for at, pair in enumerate(zip(tokens, judge, strict=False)) if pair[0] != pair[1]), -1)
                problems.append(f"{name} differs from transformers f32 on prompt {index} from token {first} on")
    contest.results["check"] = {
        "prompts": len(prompts),
        "tokens": CHECK_TOKENS,
        "contestants": names,
        "problems": problems,
    }
    return problems


def main() -> int:
    """Check, measure, print, write."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(options, Path(folder))
        try:
            problems = check(contest)
            if problems:
                print("\n".join(["The contestants disagree; nothing is measured:", *problems]), file=sys.stderr)
                return 1
            print(f"Greedy tokens agree: {', '.join(contest.results['check']['contestants'])}.")
            print(", ".join(f"{key} {value}" for key, value in contest.results["machine"].items()), end="\n\n")
            for part in options.parts:
                print(table(PARTS[part](contest)), end="\n\n", flush=True)
        finally:
            contest.close()
    print("\n".join(verdicts(contest.results)))
    if options.json:
        options.json.write_text(json.dumps(contest.results, indent=1, default=str))
    return 0


def verdicts(results: dict[str, Any]) -> list[str]:
    """Each target of the project and whether the figures of this run meet it."""
    lines = []
    at_1k = [row for row in results.get("decode", []) if row["context"] == 1024 and "llama.cpp" in row["name"]]
    for dtype in sorted({row["dtype"] for row in at_1k}):
        best = min((row for row in at_1k if row["dtype"] == dtype), key=lambda row: row["ours_over_theirs"])
        share = best["ours_over_theirs"]
        lines.append((share >= 0.8, f"decode at 1k, {dtype} to {best['name']}: {share:.2f}, wanted 0.8, aim 1.0"))
    for entry in results.get("batch", []):
        share = entry["ours_over_theirs"]
        lines.append((share >= 2, f"{entry['load']} against transformers: {share:.2f}, wanted 2"))
    if "http" in results:
        for name, added in list(results["http"]["added"].items())[1:]:
            lines.append((added <= 0.05, f"{name} adds {added:.1%}, wanted at most 5.0%"))
        streams = results["streams"]
        lines.append((streams["num_failed"] == 0, f"64 streams: {streams['num_failed']} failed, wanted none"))
    if "ready_s" in results:
        slowest_s = max(results["ready_s"])
        lines.append((slowest_s <= 5, f"ready after {slowest_s:.2f} s at worst, wanted 5"))
    return [f"{'met   ' if is_met else 'MISSED'}  {text}" for is_met, text in lines]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, all of them usable. SystemExit with status 2 for others."""
    sys.path.append(str(ROOT / "bench" / "quality"))
    from argument_kinds import listed, new_file, one_of, whole
    from checks import check_model

    parser = argparse.ArgumentParser("run.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model-dir", default=str(ROOT / "deploy/models/reference-26m"))
    parser.add_argument(
        "--llama-python", help="interpreter with llama-cpp-python and gguf; llama.cpp is left out without"
    )
    parser.add_argument("--threads", type=whole(1), default=2)
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--decode-tokens", type=whole(1), default=64, help="tokens a round of the decode part")
    parser.add_argument("--contexts", type=listed(whole(1)), default=[128, 1024, 4096], help="comma-separated")
    parser.add_argument("--parts", type=listed(one_of(tuple(PARTS))), default=list(PARTS),
                        help=f"comma-separated, of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--json", type=new_file, help="write all figures here")
    options = parser.parse_args(arguments)
    if options.llama_python and shutil.which(options.llama_python) is None:
        parser.error(f"--llama-python: {options.llama_python} is no program that can be run")
    contexts = [context + options.decode_tokens for context in options.contexts]
    check_model(parser, options.model_dir, "cpu", contexts, 1)
    return options


if __name__ == "__main__":
    sys.exit(main())
