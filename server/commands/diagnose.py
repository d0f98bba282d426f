"""`vashista diagnose`: puts the theory of sparse attention to the test on queries and keys of a running model.

Checks everything that can be wrong before the model is loaded, runs `engine/diagnose.py` under a progress bar, prints
tables (`diagnosis_table.py`) and writes every number as JSON where asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from vashista.engine.config import EngineConfig
from vashista.engine.errors import MeasurementError
from vashista.engine.model_config import ModelConfig
from vashista.engine.sample_text import check_contexts, spread_positions
from vashista.engine.support_profile import Rule
from vashista.server.commands.lazy import SectionedCommand
from vashista.server.commands.measuring import (
    MODEL_SETTINGS,
    LoadingBar,
    MeasuringBar,
    check_writable,
    load_subject,
    parse_numbers,
    write_whole,
)
from vashista.server.commands.options import setting_options

if TYPE_CHECKING:
    from vashista.engine.diagnose import Diagnosis, DiagnosisPlan

CONTEXT = 2048
EPILOG = """\b
Examples:
  vashista diagnose deploy/models/reference-26m
  vashista diagnose deploy/models/reference-26m --context 16384 --layers 0,7 --token-budget 512
  vashista diagnose /srv/models/llama --text records.txt --positions 4 --json diagnosis.json

\b
Two statements, of which neither certifies the other:
  hull     the query's projection onto the convex hull of its keys, with the active face, the
           support gap Delta, and the entropic relaxation measured over a range of eps
           (arXiv 2602.13804); a query inside the hull has no gap
  softmax  what is dropped when the rule keeps the budget, and the bound that the gap proves
"""


@click.command("diagnose", cls=SectionedCommand, epilog=EPILOG)
@click.argument("model_dir", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--text", "text_path", metavar="FILE", type=click.Path(path_type=Path),
              help="UTF-8 text to read; unless given, a bundled one.")  # fmt: skip
@click.option("--context", metavar="N", type=click.IntRange(min=1), help="Tokens of text to read; unless given, 2048, "
              "or what model and text allow.")  # fmt: skip
@click.option("--layers", metavar="N,N,...", help="Layers to look at, counted from 0; unless given, all.")
@click.option("--positions", metavar="N", type=click.IntRange(1, 10_000), default=1, show_default=True,
              help="Queries to look at, spread over the last eighth of the text.")  # fmt: skip
@click.option("--rule", type=click.Choice([str(rule) for rule in Rule]), default=str(Rule.MEAN_VARIANCE),
              show_default=True, help="What ranks groups of tokens in the softmax part.")  # fmt: skip
@click.option("--token-budget", metavar="N", type=click.IntRange(1, 1 << 30), default=1024, show_default=True,
              help="Tokens kept in the softmax part.")  # fmt: skip
@click.option("--json", "json_path", metavar="FILE", type=click.Path(path_type=Path),
              help="Also write every number to this file.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Print neither progress nor tables.")
@setting_options(MODEL_SETTINGS)
def diagnose(
    *,
    model_dir: Path,
    text_path: Path | None,
    context: int | None,
    layers: str | None,
    positions: int,
    rule: str,
    token_budget: int,
    json_path: Path | None,
    quiet: bool,
    config: Path | None,
    **flags: Any,
) -> None:
    """Check the theory of sparse attention on queries and keys of MODEL, and how much of it holds there.

    The model reads a text; every query head at the chosen positions is taken apart.
    """
    settings, model_config, tokens = load_subject(model_dir, text_path, flags, config)
    limit = model_config.max_position_embeddings
    length = context or max(min(CONTEXT, limit, tokens.longest(1)), 1)
    check_contexts([length], limit)
    [passage] = tokens.passages(1, length)
    chosen = _layers(layers, model_config.num_layers)
    places = spread_positions(length, positions)
    if json_path is not None:
        check_writable(json_path)
    # Imported late: everything above is checked before torch, which takes seconds, comes in.
    from vashista.engine.diagnose import DiagnosisPlan
    from vashista.server.commands.diagnosis_table import diagnosis_text

    engine_config = msgspec.structs.replace(settings.engine_config(), attention="dense", max_context=length)
    plan = DiagnosisPlan(chosen, places, Rule(rule), token_budget)
    found = _measure(engine_config, model_config, plan, passage, quiet)
    if json_path is not None:
        write_whole(json_path, msgspec.json.format(msgspec.json.encode(found), indent=1).decode() + "\n")
    if not quiet:
        click.echo(diagnosis_text(found))
        if json_path is not None:
            click.echo(f"\nWrote {json_path}.")


def _measure(
    config: EngineConfig, model_config: ModelConfig, plan: DiagnosisPlan, passage: list[int], quiet: bool
) -> Diagnosis:
    """The work itself, under progress bars."""
    from vashista.engine.diagnose import diagnose

    num_heads = len(plan.layers) * len(plan.positions) * model_config.num_heads
    with LoadingBar(quiet) as loading, MeasuringBar(num_heads, "head", quiet) as measuring:
        return diagnose(config, model_config, plan, passage, on_loaded=loading.update, on_head=measuring.advance)


def _layers(text: str | None, num_layers: int) -> list[int]:
    """The layers asked for. Raises MeasurementError."""
    if text is None:
        return list(range(num_layers))
    chosen = parse_numbers("layers", text)
    for layer in chosen:
        if not 0 <= layer < num_layers:
            raise MeasurementError(f"--layers names layer {layer}; this model has layers 0 to {num_layers - 1}.")
    return sorted(set(chosen))
