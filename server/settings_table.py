"""The settings as text: README's table, and the defaults and ranges that `--help` shows.

Reads the declarations of `server/settings.py`; used by `server/reference.py` and `server/commands/options.py`.
"""

from __future__ import annotations

from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from vashista.server.setting_types import parse_size
from vashista.server.settings import Settings
from vashista.server.settings_sources import flag_name


def settings_table() -> str:
    """README's Markdown table of all settings, one row each, in the order of their declaration."""
    rows = ["| setting | flag | default | range | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        flag = flag_name(name)
        default = describe_default(field)
        rows.append(f"| `{name}` | `{flag}` | {default} | {describe_range(field)} | {field.description} |")
    return "\n".join(rows) + "\n"


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
