"""The model card: README.md beside the weights, made of the run's own files, so that no figure is typed by hand.

    python bench/train_reference/card.py --model MODEL --data PREPARED --scores FILE.json --device "one NVIDIA H200" \\
        --legs short=RUN1/log.jsonl long=RUN2/log.jsonl --again REPEATED ...

Says what the model was made of, how, what it can and cannot do, and the SHA-256 of each file of the folder but
itself. Write it again after `vashista selftest --write` and `vashista calibrate`, whose files lie there too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import suite_path  # noqa: F401
from arguments import existing_file, model_folder
from legs import Leg
from spread import Training, spread_section
from tasks import AGGREGATION_TASKS, TASKS
from words import EVALUATION_WORDS, HELD_OUT_WORDS, TRAINING_WORDS

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card.md")
WORDS = {
    "evaluation": "Names of the suite (words that lessons used too)",
    "held_out": "Held-out names (words that no lesson used)",
}


def score_table(entries: list[dict[str, Any]]) -> str:
    """Plain and chat score of each task at each context."""
    contexts = sorted({entry["context"] for entry in entries})
    lines = ["| task | chance | " + " | ".join(f"{context:,}" for context in contexts) + " |"]
    lines.append("|---" * (len(contexts) + 2) + "|")
    for task in TASKS:
        found = {entry["context"]: entry for entry in entries if entry["task"] == task}
        if not found:
            continue
        cells = [
            " / ".join(_share(found[context][form]) for form in ("plain", "chat")) if context in found else "-"
            for context in contexts
        ]
        kind = " (aggregation)" if task in AGGREGATION_TASKS else ""
        chance = max(entry["chance"] for entry in found.values())
        lines.append(f"| {task}{kind} | {chance:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _share(part: dict[str, Any]) -> str:
    return f"{part['score']:.3f}" if part["num_samples"] else "-"


def score_tables(results: list[dict[str, Any]]) -> str:
    """A table a run of the evaluation, each with what it was asked with and where."""
    parts = []
    for result in results:
        first = result["tasks"][0]
        parts.append(
            f"{WORDS[result['words']]}; {result['device']}; {first['plain']['num_samples']} samples a figure in plain "
            f"form, {first['chat']['num_samples']} in chat form{result.get('note', '')}:"
        )
        parts.append(score_table(result["tasks"]))
    return "\n\n".join(parts)


def loss_table(books: dict[str, dict[str, float]]) -> str:
    lines = ["| context | nats a token | bits a byte | nats a token, last 1,024 | books |", "|---|---|---|---|---|"]
    for context, losses in books.items():
        if losses:
            lines.append(
                f"| {int(context):,} | {losses['nats_per_token']:.3f} | {losses['bits_per_byte']:.3f} "
                f"| {losses['nats_per_token_in_last_1024']:.3f} | {losses['num_books']} |"
            )
    return "\n".join(lines)


def file_rows(folder: Path) -> str:
    """Every file but the card itself."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CARD)
    rows = []
    for name in names:
        content = (folder / name).read_bytes()
        rows.append(f"| {name} | {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |")
    return "\n".join(rows)


def write_card(
    model: Path,
    data: Path,
    legs: list[Leg],
    scores: list[Path],
    device: str,
    remarks: str = "",
    again: list[Training] | None = None,
) -> None:
    """Write the card into the model's folder; losses on books are those of the first scores that have some.

    The trainings `again` are compared with the first scores: ValueError where they were not asked the same.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    books = json.loads((data / "books.json").read_text(encoding="utf-8"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in scores]
    losses: list[dict[str, Any]] = [result["books"] for result in results if any(result["books"].values())]
    spread = spread_section(Training(model.name, device, legs, results[0]), again) if again else ""
    num_tokens = sum(book["num_tokens"] for book in books)
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads, layers = (config[f"num_{key}"] for key in ("attention_heads", "key_value_heads", "hidden_layers"))
    layer = hidden * head * 2 * (heads + kv_heads) + 3 * hidden * inner + 2 * hidden
    text = TEMPLATE.read_text(encoding="utf-8").format(
        name=model.name,
        num_parameters=config["vocab_size"] * hidden + layers * layer + hidden,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head,
        intermediate_size=inner,
        vocab_size=config["vocab_size"],
        rope_theta=config["rope_theta"],
        context=config["max_position_embeddings"],
        num_books=len(books),
        num_tokens=num_tokens,
        epochs=sum(leg.text_tokens() for leg in legs) / num_tokens,
        num_training_words=len(TRAINING_WORDS),
        num_evaluation_words=len(EVALUATION_WORDS),
        num_held_out_words=len(HELD_OUT_WORDS),
        presets=" and ".join(f"`{leg.preset.name}` (seed {leg.preset.seed}, {leg.seconds:.0f} s)" for leg in legs),
        device=device,
        seconds=sum(leg.seconds for leg in legs),
        num_seen=sum(leg.reports[-1]["num_tokens"] for leg in legs),
        weight_decay=legs[0].preset.weight_decay,
        stages="\n".join(row for number, leg in enumerate(legs, start=1) for row in leg.rows(number)),
        remarks=remarks.strip(),
        scores=score_tables(results),
        losses=loss_table(losses[0]) if losses else "not measured",
        spread=f"\n\n{spread}" if spread else "",
        files=file_rows(model),
    )
    (model / CARD).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_folder, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder written by corpus.py")
    parser.add_argument("--legs", type=Leg.read, nargs="+", required=True, metavar="PRESET=LOG", help="in their order")
    parser.add_argument("--scores", type=existing_file, nargs="+", required=True, help="written by evaluate.py")
    parser.add_argument("--device", required=True, help="what it was trained on, in words")
    parser.add_argument("--remarks", type=existing_file, help="text on this run, put behind the table of stages")
    parser.add_argument(
        "--again", type=Training.read, nargs="+", help="folders of repeated trainings (see spread.py): says the spread"
    )
    options = parser.parse_args()
    remarks = options.remarks.read_text(encoding="utf-8") if options.remarks else ""
    try:
        write_card(options.model, options.data, options.legs, options.scores, options.device, remarks, options.again)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
