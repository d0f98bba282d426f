"""`vashista calibrate`: measures a model's support profile and writes it for `vashista serve`.

Checks everything that can be wrong before the model is loaded, runs `engine/calibrate.py` under a progress bar, and
writes the profile and its picture at the end, each as a whole or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from vashista.engine.config import EngineConfig
from vashista.engine.errors import ReportFileError, SampleTextError
from vashista.engine.model_config import ModelConfig
from vashista.engine.sample_text import check_contexts, spread_positions
from vashista.engine.support_profile import FILE_NAME, Rule, SupportProfile
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
from vashista.server.commands.support_svg import support_svg
from vashista.server.commands.support_table import profile_text

FIRST_CONTEXT = 2048
EPILOG = """\b
Examples:
  vashista calibrate deploy/models/reference-26m
  vashista calibrate /srv/models/llama --text records.txt --contexts 4096,16384,65536
  vashista calibrate /srv/models/llama --out /etc/vashista/llama.json --passages 4

\b
The profile says how many tokens each KV head needs for a given dropped mass, on this
text. Take text like that which you will serve, as long as the contexts you will serve.
"""


@click.command("calibrate", cls=SectionedCommand, epilog=EPILOG)
@click.argument("model_dir", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--text", "text_path", metavar="FILE", type=click.Path(path_type=Path), help="UTF-8 text to read; unless "
              "given, a bundled one of 320 KB.")  # fmt: skip
@click.option("--contexts", metavar="N,N,...", help="Context lengths to measure; unless given, powers of two from 2048 "
              "to what model and text allow.")  # fmt: skip
@click.option("--passages", metavar="N", type=click.IntRange(1, 1000), default=2, show_default=True,
              help="Passages of the text to read, each as long as the longest context.")  # fmt: skip
@click.option("--positions", metavar="N", type=click.IntRange(1, 10_000), default=16, show_default=True,
              help="Queries to measure at each context in each passage.")  # fmt: skip
@click.option("--rule", type=click.Choice([str(rule) for rule in Rule]), default=str(Rule.MEAN_VARIANCE),
              show_default=True, help="What ranks groups of tokens; that of the server.")  # fmt: skip
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path),
              help=f"Where the profile goes; unless given, {FILE_NAME} in the model's folder.")  # fmt: skip
@click.option("--plot", "plot_path", metavar="FILE", type=click.Path(path_type=Path),
              help="Where the picture of it goes, as SVG; unless given, beside the profile.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Print neither progress nor tables.")
@setting_options(MODEL_SETTINGS)
def calibrate(
    *,
    model_dir: Path,
    text_path: Path | None,
    contexts: str | None,
    passages: int,
    positions: int,
    rule: str,
    out: Path | None,
    plot_path: Path | None,
    quiet: bool,
    config: Path | None,
    **flags: Any,
) -> None:
    """Measure how many tokens each KV head of MODEL attends to, by context length, and write its support profile.

    The model reads passages of text; the exact attention at many positions gives the tokens that a head must keep for
    a dropped mass of 0.5 to 0.005, for requests with max_dropped_mass. A repeated stretch of text shows which heads
    retrieve: those attend to everything in every sparse mode of `vashista serve`.
    """
    settings, model_config, tokens = load_subject(model_dir, text_path, flags, config)
    lengths = _contexts(contexts, model_config, tokens.longest(passages))
    spread_positions(lengths[0], positions)  # raises for more positions than there are
    chosen = tokens.passages(passages, lengths[-1])
    out = out or model_dir / FILE_NAME
    plot_path = plot_path or out.with_suffix(".svg")
    check_writable(out)
    check_writable(plot_path)
    if plot_path.resolve() == out.resolve():
        raise ReportFileError(f"{out} cannot be both the profile and its picture: give another --out or --plot.")
    engine_config = msgspec.structs.replace(settings.engine_config(), attention="auto", max_context=lengths[-1])
    profile = _measure(engine_config, model_config, (lengths, positions, Rule(rule)), chosen, quiet)
    profile.save(out)
    write_whole(plot_path, support_svg(profile, f"{model_dir.resolve().name}: support"))
    if not quiet:
        click.echo(profile_text(profile))
        limit = model_config.max_position_embeddings
        if lengths[-1] < limit:
            click.echo(
                f"\nMeasured up to {lengths[-1]} of the model's {limit} tokens; beyond, budgets follow the trend. "
                "A longer --text or fewer --passages allow longer --contexts."
            )
        click.echo(f"\nWrote {out} and {plot_path}.")


def _contexts(text: str | None, model_config: ModelConfig, longest: int) -> list[int]:
    """The contexts asked for, or powers of two that model and text allow. Raises MeasurementError, SampleTextError."""
    limit = model_config.max_position_embeddings
    if text is not None:
        lengths = parse_numbers("contexts", text)
        check_contexts(lengths, limit)
        return lengths
    most = min(limit, longest)
    if most < min(limit, FIRST_CONTEXT):
        raise SampleTextError(f"The sample text gives passages of {longest} tokens; {FIRST_CONTEXT} are needed.")
    lengths = [FIRST_CONTEXT << i for i in range(64) if FIRST_CONTEXT << i <= most]
    return lengths or [most]


def _measure(
    config: EngineConfig,
    model_config: ModelConfig,
    plan: tuple[list[int], int, Rule],
    passages: list[list[int]],
    quiet: bool,
) -> SupportProfile:
    """The work itself, under progress bars."""
    # Imported late: everything above is checked before torch, which takes seconds, comes in.
    from vashista.engine.calibrate import CalibrationPlan, calibrate

    contexts, num_positions, rule = plan
    asked = CalibrationPlan(contexts, num_positions, rule)
    with LoadingBar(quiet) as loading, MeasuringBar(asked.num_tokens(passages), "token", quiet) as measuring:
        return calibrate(
            config,
            model_config,
            asked,
            passages,
            on_loaded=loading.update,
            on_tokens=measuring.advance,
        )
