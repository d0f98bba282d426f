"""The sampling flags of `vashista complete`, and the engine's `SamplingParams` made from them.

Names and ranges are those of the HTTP fields (`server/schemas/sampling.py`). What is not given comes from the model's
generation_config.json where that has one, and else from the OpenAI default, as on the server.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from vashista.engine.errors import GrammarError, TokenOutOfVocabularyError
from vashista.engine.messages import SamplingParams
from vashista.engine.model_config import MIN_REPETITION_PENALTY, GenerationDefaults
from vashista.server.commands.lazy import SectionedOption

Command = TypeVar("Command", bound=Callable[..., Any])
DEFAULT_MAX_TOKENS = 128


class FiniteRange(click.FloatRange):
    """A number in a range; unlike click's own, it refuses NaN, which compares as neither too small nor too large."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or a usage error."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def parse_bias(text: str) -> tuple[int, float]:
    """(token id, bias) of `42=-100`; a usage error for anything else."""
    token_id, separator, bias = text.partition("=")
    if not separator or not token_id.isascii() or not token_id.isdigit():
        raise click.BadParameter(f"{text!r} should look like 42=-100: a token id and a number from -100 to 100.")
    return int(token_id), FiniteRange(-100, 100).convert(bias, None, None)


def _flag(name: str, kind: Any, text: str, **more: Any) -> Callable[[Command], Command]:
    if isinstance(kind, click.IntRange):
        more.setdefault("metavar", "INTEGER")
    return click.option(name, type=kind, help=text, cls=SectionedOption, section="Sampling", **more)


_INT64 = (1 << 63) - 1
_OPTIONS = [
    _flag(
        "--max-tokens", click.IntRange(1), "End after so many tokens.", default=DEFAULT_MAX_TOKENS, show_default=True
    ),
    _flag("--min-tokens", click.IntRange(0), "No end before so many tokens.", default=0),
    _flag("--temperature", FiniteRange(0, 2), "0 is greedy.  [default: the model's, else 1]"),
    _flag("--top-p", FiniteRange(0, 1, min_open=True), "Least probability mass to draw from.  [default: the model's]"),
    _flag("--top-k", click.IntRange(0), "Number of tokens to draw from; 0 is off.  [default: the model's]"),
    _flag("--min-p", FiniteRange(0, 1), "Least probability, as a share of the greatest.  [default: the model's]"),
    _flag("--seed", click.IntRange(-_INT64 - 1, _INT64), "The same seed gives the same text.  [default: random]"),
    _flag("--presence-penalty", FiniteRange(-2, 2), "Taken from tokens that were said.", default=0.0),
    _flag("--frequency-penalty", FiniteRange(-2, 2), "The same for each time they were said.", default=0.0),
    _flag("--repetition-penalty", FiniteRange(MIN_REPETITION_PENALTY, 10), "1 is off; counts the prompt too."),
    _flag(
        "--logit-bias",
        parse_bias,
        "Add BIAS to the logit of a token; may be repeated.",
        multiple=True,
        metavar="ID=BIAS",
    ),
    _flag("--stop", click.STRING, "End before this text; may be repeated.", multiple=True),
    _flag("--stop-token-id", click.IntRange(0), "End at this token; may be repeated.", multiple=True),
    click.option(
        "--ignore-eos", is_flag=True, help="Go on after end of sequence.", cls=SectionedOption, section="Sampling"
    ),
    click.option(
        "--json-object", is_flag=True, help="The text is a JSON object.", cls=SectionedOption, section="Sampling"
    ),
    _flag(
        "--json-schema",
        click.Path(path_type=Path),
        "The text is JSON that matches the schema in FILE.",
        metavar="FILE",
    ),
]


def sampling_options(function: Command) -> Command:
    """Add the sampling flags to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def make_sampling(
    flags: Mapping[str, Any], defaults: GenerationDefaults, vocab_size: int, grammar: str | None
) -> SamplingParams:
    """The engine's parameters; TokenOutOfVocabularyError for an id that the model does not have."""
    logit_bias = dict(flags["logit_bias"])
    for token_id in (*logit_bias, *flags["stop_token_id"]):
        if token_id >= vocab_size:
            raise TokenOutOfVocabularyError(f"The token id {token_id} is not in the vocabulary of {vocab_size} tokens.")
    if "" in flags["stop"]:
        raise click.BadParameter("a stop string must have a character", param_hint="--stop")

    def chosen(name: str, otherwise: float) -> float:
        given, suggested = flags[name], getattr(defaults, name)
        return float(given if given is not None else suggested if suggested is not None else otherwise)

    return SamplingParams(
        seed=flags["seed"] if flags["seed"] is not None else secrets.randbits(63),
        max_tokens=flags["max_tokens"],
        temperature=chosen("temperature", 1.0),
        top_p=chosen("top_p", 1.0),
        top_k=int(chosen("top_k", 0)),
        min_p=chosen("min_p", 0.0),
        presence_penalty=flags["presence_penalty"],
        frequency_penalty=flags["frequency_penalty"],
        repetition_penalty=chosen("repetition_penalty", 1.0),
        logit_bias=logit_bias,
        stop=tuple(flags["stop"]),
        stop_token_ids=tuple(flags["stop_token_id"]),
        min_tokens=flags["min_tokens"],
        ignore_eos=flags["ignore_eos"],
        grammar=grammar,
    )


def read_response_format(flags: Mapping[str, Any]) -> dict[str, Any] | None:
    """OpenAI's `response_format` for --json-object and --json-schema; GrammarError when the file is no JSON object."""
    import json

    path = flags["json_schema"]
    if path is None:
        return {"type": "json_object"} if flags["json_object"] else None
    if flags["json_object"]:
        raise click.UsageError("--json-object and --json-schema are both given: choose one.")
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GrammarError(f"The schema file {path} cannot be read: {error}.") from error
    if not isinstance(schema, dict):
        raise GrammarError(f"The schema file {path} holds a JSON {type(schema).__name__}, not an object.")
    return {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}
