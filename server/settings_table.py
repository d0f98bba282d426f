"""The settings as text: README's table, defaults and ranges for `--help`, the file of a new installation.

Reads the declarations of `server/settings.py`; used by `server/reference.py`, `server/commands/options.py` and
`server/commands/bundle.py`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from vashista.server.setting_types import parse_size
from vashista.server.settings import Settings
from vashista.server.settings_sources import flag_name, off_flag_name


def settings_table() -> str:
    """README's Markdown table of all settings, one row each, in the order of their declaration."""
    rows = ["| setting | flag | default | range | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        flags = f"`{flag_name(name)}`"
        if field.annotation is bool:
            flags += f", `{off_flag_name(name)}`"
        default = describe_default(field)
        rows.append(f"| `{name}` | {flags} | {default} | {describe_range(field)} | {field.description} |")
    return "\n".join(rows) + "\n"


FILE_HEAD = """\
# Settings of Vashista. A line without # counts; a line with # shows the default. `systemctl restart vashista` takes
# changes over. A wrong or unknown setting is an error. Addresses are in vashista.socket, which holds the LAN's port.
"""


def settings_file(values: Mapping[str, str]) -> str:
    """A TOML file with every setting, its meaning and range: `values` as lines, all others as comments.

    Numbers and switches stand as such, anything else in quotes; a setting without a default shows its name alone.
    """
    parts, group = [FILE_HEAD], ""
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        section = str(extra["group"]) if isinstance(extra, dict) else ""
        if section != group:
            group = section
            parts.append(f"\n# --- {group} ---\n")
        allowed = describe_range(field)
        text = f"{(field.description or '').replace('`', '')}{f' [{allowed}]' if allowed else ''}"
        parts += ["\n", *(f"# {line}\n" for line in textwrap.wrap(text, 110))]
        if name in values:
            parts.append(f"{name} = {json.dumps(values[name], ensure_ascii=False)}\n")
        else:
            parts.append(f"#{name} = {_toml_default(field)}\n")
    return "".join(parts)


def _toml_default(field: FieldInfo) -> str:
    if isinstance(field.default, bool):
        return "true" if field.default else "false"
    if isinstance(field.default, int | float) and not is_size(field):
        return str(field.default)
    return json.dumps("" if field.is_required() else describe_default(field))


def describe_default(field: FieldInfo) -> str:
    """The default as text; `auto` or nothing for None."""
    if field.is_required():
        return ""
    value = field.default
    if value is None:
        return "auto" if "`auto`" in (field.description or "") else ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return size_text(value) if is_size(field) else str(value)


def describe_range(field: FieldInfo) -> str:
    """The allowed values as text, from the field's constraints or its literal."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(str(value) for value in get_args(field.annotation))
    if field.annotation is bool:
        return "on, off"
    low = high = ""
    text = size_text if is_size(field) else str
    for rule in field.metadata:
        if hasattr(rule, "ge") or hasattr(rule, "gt"):
            low = f"at least {text(rule.ge)}" if hasattr(rule, "ge") else f"above {rule.gt}"
        if hasattr(rule, "le") or hasattr(rule, "lt"):
            high = f"at most {text(rule.le)}" if hasattr(rule, "le") else f"below {rule.lt}"
    return ", ".join(part for part in (low, high) if part)


def is_size(field: FieldInfo) -> bool:
    """Whether the field is a number of bytes, which may be written as 4GiB."""
    return any(getattr(rule, "func", None) is parse_size for rule in field.metadata)


def size_text(num_bytes: int) -> str:
    """16777216 as 16MiB: the largest unit that leaves a whole number."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes and num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return str(num_bytes)
