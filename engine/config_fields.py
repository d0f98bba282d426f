"""Typed reading of one JSON object of a model folder, field by field.

Used by `engine/model_config.py`. Every complaint is a ModelConfigError that names file, field, value and what is
possible, so that an operator finds the line to correct. A JSON null counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vashista.engine.errors import ModelConfigError

MAX_INTEGER = (1 << 40) - 1


class ConfigFields:
    """The fields of one object; `where` is printed before each field's name, as in `config.json: rope_scaling.`"""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def error(self, name: str, message: str) -> ModelConfigError:
        """The error for a field, to be raised by the caller."""
        return ModelConfigError(f"{self.where}{name} {message}.", param=name)

    def wrong(self, name: str, wanted: str) -> ModelConfigError:
        """The error for a value that is not as wanted."""
        return self.error(name, f"is {_shown(self.values.get(name))}, but must be {wanted}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is None:
            raise self.error(name, "is missing")
        return default

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = MAX_INTEGER) -> int:
        """A whole number from `low` to `high`; without a default the field must be there."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None, *, low: float = 0.0, low_allowed: bool = False) -> float:
        """A finite number above `low`, or equal to it where allowed."""
        value = self._get(name, default)
        wanted = f"a number {'of at least' if low_allowed else 'above'} {low:g}"
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.wrong(name, wanted)
        if value < low or (value == low and not low_allowed):
            raise self.wrong(name, wanted)
        return float(value)

    def optional_number(self, name: str, *, low: float = 0.0, low_allowed: bool = False) -> float | None:
        """The same, None when absent."""
        return self.number(name, low=low, low_allowed=low_allowed) if self.has(name) else None

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id or a list of them; () when absent."""
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
                raise self.wrong(name, f"a token id, or a list of them, from 0 to {vocab_size - 1}")
        return tuple(dict.fromkeys(ids))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
