"""Command line options made from the settings: one declaration in `server/settings.py` serves flags, file and table.

`setting_options` decorates a click command; the values arrive as the user's text, `given` drops what was not given,
and `load_settings` checks everything, so that a flag is refused with the same words as a variable or a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from vashista.server.commands.lazy import SectionedOption
from vashista.server.settings import Settings
from vashista.server.settings_sources import flag_name, off_flag_name
from vashista.server.settings_table import describe_default, describe_range, is_size

Command = TypeVar("Command", bound=Callable[..., Any])


def setting_options(names: Iterable[str]) -> Callable[[Command], Command]:
    """A decorator that adds the flags of these settings, in their order, and `--config`."""
    options = [_option(name, Settings.model_fields[name]) for name in names]

    def decorate(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return config_option(function)

    return decorate


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML file of settings, such as `port = 8080`; also VASHISTA_CONFIG. Flags and VASHISTA_* come first.",
)


def given(flags: Mapping[str, object]) -> dict[str, object]:
    """The flags that the user gave; click passes None for the others."""
    return {name: value for name, value in flags.items() if value is not None}


def _option(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    flag = flag_name(name)
    facts = [f"default: {describe_default(field)}"] if describe_default(field) else []
    values = describe_range(field)
    if values and field.annotation is not bool and get_origin(field.annotation) is not Literal:
        facts.append(values)
    text = (field.description or "").replace("`", "") + (f"  [{'; '.join(facts)}]" if facts else "")
    extra = field.json_schema_extra
    section = str(extra["group"]) if isinstance(extra, dict) else "Options"
    if field.annotation is bool:
        declaration = f"{flag}/{off_flag_name(name)}"
        return click.option(declaration, name, default=None, help=text, cls=SectionedOption, section=section)
    return click.option(flag, name, metavar=_metavar(field), help=text, cls=SectionedOption, section=section)


def _metavar(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "|".join(str(value) for value in get_args(field.annotation))
    if is_size(field):
        return "SIZE"
    kinds = set(_plain_types(field.annotation))
    if Path in kinds:
        return "PATH"
    if float in kinds:
        return "NUMBER"
    return "INTEGER" if int in kinds else "TEXT"


def _plain_types(annotation: object) -> Iterator[object]:
    """The types within unions and Annotated."""
    yield annotation
    for inner in get_args(annotation):
        yield from _plain_types(inner)
