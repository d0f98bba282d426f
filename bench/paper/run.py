"""The paper's claims put to the test: `python bench/paper/run.py measure`, then `python bench/paper/run.py write`.

measure  runs a model and writes what was seen to bench/paper/results/measured.json
write    makes docs/paper.md and its pictures from that and from the results of other benchmarks, without a model:
         bench/quality/suite.py --json, bench/attention/run.py --json, bench/sparse_cpu.py --json. What is not there
         is said to be not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
PARTS = ("support", "heads", "tokens", "times")
"""What can be measured by itself: constant support, hull and leakage, the criterion on tokens, step times."""
LEAST_CONTEXT = 64
sys.path.insert(0, str(ROOT / "bench" / "quality"))  # argument_kinds, suite_player, suite_report, suite_chart


def main(arguments: list[str] | None = None) -> int:
    from vashista.engine.errors import VashistaError

    options = parse(arguments)
    try:
        return measured(options) if options.command == "measure" else written(options)
    except VashistaError as error:
        raise SystemExit(f"error[{error.code}]: {error.message}\n  remedy: {error.remedy}") from error


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from argument_kinds import DTYPES, listed, one_of, token_budget, whole

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure", help="run the model")
    measure.add_argument("--model", default=str(ROOT / "deploy/models/reference-26m"))
    measure.add_argument("--device", default="auto")
    measure.add_argument("--dtype", choices=DTYPES, default="auto")
    measure.add_argument("--threads", type=whole(1))
    measure.add_argument("--text", type=Path, help="UTF-8 text to read; unless given, the bundled one")
    measure.add_argument("--parts", type=listed(one_of(PARTS)), default=list(PARTS),
                         help="measure these anew and keep the others of --out as they are")  # fmt: skip
    measure.add_argument("--contexts", type=listed(whole(LEAST_CONTEXT)), default=[2048, 4096, 8192, 16384])
    measure.add_argument(
        "--hull-context", type=whole(LEAST_CONTEXT), default=2048, help="tokens before the captured heads"
    )
    measure.add_argument("--passages", type=whole(1), default=2)
    measure.add_argument("--positions", type=whole(1), default=16)
    measure.add_argument("--hull-positions", type=whole(1), default=2)
    measure.add_argument("--tokens", type=whole(1), default=256)
    measure.add_argument("--steps", type=whole(1), default=100)
    measure.add_argument("--token-budget", type=token_budget, default=1024)
    measure.add_argument("--note", default="", help="a sentence on the conditions, for the document")
    measure.add_argument("--out", type=Path, default=RESULTS / "measured.json")
    write = commands.add_parser("write", help="make the document")
    write.add_argument("--measured", type=Path, default=RESULTS / "measured.json")
    write.add_argument("--suite", type=Path, default=RESULTS / "suite.json")
    write.add_argument("--attention", type=Path, default=RESULTS / "attention.json")
    write.add_argument("--sparse-cpu", type=Path, default=RESULTS / "sparse_cpu.json")
    write.add_argument("--out", type=Path, default=ROOT / "docs" / "paper.md")
    options = parser.parse_args(arguments)
    if not is_writable(options.out):
        parser.error(f"--out: {options.out} is a folder, or lies in none that may be written to")
    if options.command == "measure":
        options.refuse = measure.error
        if options.contexts != sorted(options.contexts):
            measure.error("--contexts have to ascend")
        if options.tokens < options.passages:
            measure.error(f"--tokens is {options.tokens}: each of {options.passages} passages needs one at least")
    options.line = command_line(sys.argv[1:] if arguments is None else arguments)
    return options


def command_line(arguments: list[str]) -> str:
    """As it may be published: without the note, which stands by itself, and without the folders of this machine."""
    words = [word.rsplit("/", 1)[-1] if word.startswith("/") else word for word in arguments]
    if "--note" in words:
        at = words.index("--note")
        del words[at : at + 2]
    return shlex.join(["python", "bench/paper/run.py", *words])


def is_writable(path: Path) -> bool:
    """Whether the file can be written, its folder made for it where there is none."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    return not path.is_dir() and above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def measured(options: argparse.Namespace) -> int:
    """Run the model."""
    import torch
    from measure import Plan, measure

    from vashista.engine.config import EngineConfig
    from vashista.engine.model_config import load_model_config
    from vashista.engine.runner import resolve_device

    kept = read(options.out) or {}
    device = resolve_device(options.device)
    most = load_model_config(options.model).max_position_embeddings
    outside = [context for context in (*options.contexts, options.hull_context) if context > most]
    if outside:
        options.refuse(f"contexts of {outside} tokens were asked for; the model takes {most} at most")
    config = EngineConfig(
        model_dir=options.model, device=options.device, dtype=options.dtype, num_threads=options.threads
    )
    plan = Plan(
        contexts=options.contexts, hull_context=options.hull_context,
        passages=options.passages, positions=options.positions, hull_positions=options.hull_positions,
        tokens=options.tokens, steps=options.steps, token_budget=options.token_budget,
    )  # fmt: skip
    found = measure(config, plan, options.text, options.parts)
    is_gpu = device.type == "cuda"
    conditions = {
        "command": options.line,
        "model": Path(options.model).name,
        "device": torch.cuda.get_device_name(device) if is_gpu else f"CPU ({platform.machine()})",
        "dtype": options.dtype if options.dtype != "auto" else "bfloat16" if is_gpu else "float32",
        "torch": torch.__version__,
        "note": options.note,
        "text": options.text.name if options.text else "the bundled sample text",
    }
    found = kept | {part: {"conditions": conditions} | values for part, values in found.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(f"wrote {options.out}")
    return 0


def written(options: argparse.Namespace) -> int:
    """Make the document."""
    from document import document

    data = {name: read(getattr(options, name)) for name in ("measured", "suite", "attention", "sparse_cpu")}
    missing = [part for part in PARTS if part not in (data["measured"] or {})]
    if missing:
        raise SystemExit(
            f"{options.measured} lacks {', '.join(missing)}: run `python bench/paper/run.py measure` first"
        )
    text, pictures = document(data)
    folder = options.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name in pictures_of(options.out):
        (folder / name).unlink(missing_ok=True)
    for name, svg in pictures.items():
        (folder / name).write_text(svg)
    options.out.write_text(text)
    print(f"wrote {options.out} and {len(pictures)} pictures")
    return 0


def pictures_of(path: Path) -> list[str]:
    """The pictures of a document that was written before; others in their folder are not ours."""
    text = path.read_text() if path.is_file() else ""
    return re.findall(rf"]\({re.escape(path.stem)}/([\w-]+\.svg)\)", text)


def read(path: Path) -> Any:
    """The JSON of a file, or None where there is no file. SystemExit for a file that holds none."""
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} does not hold the results of a benchmark: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
