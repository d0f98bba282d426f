"""`vashista models list|inspect`: what model folders are and the memory they need, without loading a weight.

`server/commands/inspection.py` reads the folder; this file prints the result as text or JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import msgspec

from vashista.engine.errors import ModelFolderError, VashistaError
from vashista.server.commands.inspection import Inspection, digest_files, find_models, inspect_model
from vashista.server.commands.options import given, setting_options
from vashista.server.model_store.startup import describe
from vashista.server.model_store.store import MODELS_DIR
from vashista.server.settings import load_settings

ROW = "{:<28} {:<20} {:>10} {:>9} {:>9} {:>9}  {}"


@click.command("list", epilog="\b\nExamples:\n  vashista models list /srv/models\n  vashista models list . --json\n")
@click.argument("directory", type=click.Path(path_type=Path), default=MODELS_DIR)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@setting_options(["model_trust"])
def list_models(directory: Path, as_json: bool, config: Path | None, **flags: object) -> None:
    """List every model folder under DIRECTORY (/srv/vashista/models), at any depth, and who signed it.

    A folder that cannot be served shows why. Signatures are checked, files are not read: `vashista models verify` does.
    """
    trust = load_settings(given(flags), os.environ, config=config, defaults={"model": "."}).model_trust
    if not directory.is_dir():
        raise ModelFolderError(f"{directory} is not a folder.")
    entries: list[tuple[Path, Inspection | VashistaError]] = []
    for folder in find_models(directory):
        try:
            entries.append((folder, inspect_model(folder)))
        except VashistaError as error:
            entries.append((folder, error))
    if as_json:
        click.echo(
            json.dumps(
                [_json_entry(folder, found) | {"signature": describe(folder, trust)} for folder, found in entries],
                indent=2,
            )
        )
        return
    if not entries:
        click.echo(f"No model folder, that is one with a config.json, is under {directory}.")
        return
    click.echo(ROW.format("folder", "architecture", "parameters", "dtype", "size", "context", "signature"))
    for folder, found in entries:
        name = str(folder.relative_to(directory)) if folder != directory else str(folder)
        if isinstance(found, VashistaError):
            click.echo(f"{name:<28} error[{found.code}]: {found.message}")
        else:
            size = bytes_text(found.num_bytes)
            click.echo(
                ROW.format(
                    name,
                    found.architecture,
                    count_text(found.num_parameters),
                    found.dtype,
                    size,
                    found.context,
                    describe(folder, trust),
                )
            )


@click.command(
    "inspect",
    epilog="\b\nExamples:\n  vashista models inspect deploy/models/reference-26m\n"
    "  vashista models inspect /srv/models/llama --digest --json\n",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--digest", is_flag=True, help="Also compute the SHA-256 of every file; reads all of them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, digest: bool, as_json: bool) -> None:
    """Show the model in the folder PATH: shape, context, memory per dtype, tokenizer, chat template."""
    found = inspect_model(path)
    digests = digest_files(path) if digest else None
    if as_json:
        entry = _json_entry(path, found)
        click.echo(json.dumps(entry if digests is None else entry | {"sha256": digests}, indent=2))
        return
    for name, value in _lines(found):
        click.echo(f"{name:<16} {value}")
    for name, value in (digests or {}).items():
        click.echo(f"{'sha256':<16} {value}  {name}")


def count_text(number: int) -> str:
    """26745344 as 26.7M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def bytes_text(num_bytes: int) -> str:
    """53477376 as 51.0 MiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"


def _json_entry(folder: Path, found: Inspection | VashistaError) -> dict[str, object]:
    if isinstance(found, VashistaError):
        return {"folder": str(folder), "error": {"code": found.code, "message": found.message}}
    entry: dict[str, object] = msgspec.to_builtins(found)
    return {"folder": str(folder), **entry}


def _lines(found: Inspection) -> list[tuple[str, str]]:
    shape = (
        f"{found.num_layers} layers, width {found.hidden_size}, {found.num_heads} query and {found.num_kv_heads} KV "
        f"heads of {found.head_dim}, MLP {found.intermediate_size}, vocabulary {found.vocab_size}"
    )
    window = "none" if found.sliding_window is None else f"{found.sliding_window} tokens"
    lines = [
        ("architecture", found.architecture),
        ("shape", shape),
        ("parameters", f"{count_text(found.num_parameters)} ({found.num_parameters})"),
        ("stored as", f"{found.dtype}, {bytes_text(found.num_bytes)} in {found.num_files} file(s)"),
        ("context", f"{found.context} tokens"),
        ("rope", found.rope),
        ("sliding window", window),
    ]
    for need in found.memory:
        lines.append(
            (
                "memory" if need is found.memory[0] else "",
                f"{need.dtype:<9} {bytes_text(need.weight_bytes)} of weights, {bytes_text(need.kv_bytes_per_token)} of "
                f"KV cache a token, {bytes_text(need.full_context_bytes)} with one request of full context",
            )
        )
    lines.append(("tokenizer", f"{found.num_tokens} tokens; ends with {found.eos_token_ids or 'nothing'}"))
    lines.append(("chat template", "yes" if found.has_chat_template else "no: use /v1/completions"))
    return lines
