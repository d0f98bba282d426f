"""Where settings come from: a TOML file and the environment; and the words for what is wrong with them.

`load_settings` in `server/settings.py` reads through it. Nothing here knows the single settings.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError

from vashista.engine.errors import SettingsError

ENV_PREFIX = "VASHISTA_"
CONFIG_VARIABLE = "VASHISTA_CONFIG"


def flag_name(name: str) -> str:
    """`max_context` as it is written on the command line."""
    return "--" + name.replace("_", "-")


def off_flag_name(name: str) -> str:
    """Of a switch: `--no-prefix-caching`. A switch's flag takes no value."""
    return flag_name("no_" + name)


def read_toml(path: Path) -> dict[str, object]:
    """The file's values; SettingsError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"The settings file {path} cannot be read: {error}", param="config") from error


def read_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What is set with our prefix, by the setting's name."""
    own = {name: value for name, value in environ.items() if name.startswith(ENV_PREFIX) and name != CONFIG_VARIABLE}
    return {name.removeprefix(ENV_PREFIX).lower(): value for name, value in own.items()}


def unknown_setting(name: str, origin: str, known: Iterable[str]) -> SettingsError:
    """For a name that is none of the known ones."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    suggestion = f" Did you mean {near[0]}?" if near else ""
    return SettingsError(_sentence(f"{origin} is not a setting.{suggestion}"), param=name)


def invalid_settings(error: ValidationError, values: Mapping[str, object], origins: Mapping[str, str]) -> SettingsError:
    """Each wrong value with what it should be; `origins` says where it stands."""
    parts = []
    names = [str(problem["loc"][0]) for problem in error.errors() if problem["loc"]]
    for problem in error.errors():
        text = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        name = str(problem["loc"][0]) if problem["loc"] else None
        if name is None:
            parts.append(text)
        elif problem["type"] == "missing":
            ways = f"{flag_name(name)}, {ENV_PREFIX}{name.upper()}, or {name} in the file"
            parts.append(f"the setting {name} is missing: give {ways}")
        else:
            parts.append(f"{origins.get(name, name)} is {values.get(name)!r}: {text}")
    text = _sentence("; ".join(dict.fromkeys(parts)) + ".")
    return SettingsError(text, param=names[0] if names else None)


def _sentence(text: str) -> str:
    return "The" + text[3:] if text.startswith("the ") else text
