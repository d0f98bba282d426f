"""Types of settings: sizes with units, `auto`, paths with ~, devices. ValueError says what a value should be.

`server/settings.py` declares settings with them; its command line and README show sizes as they are read here.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(value: object) -> object:
    """Bytes of `4GiB`, `512MB` or `4096`; anything but text is left to the next check. ValueError on a bad size."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError("should be a size such as 4GiB, 512MB or a number of bytes")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size != int(size):
        raise ValueError("should be a whole number of bytes")
    return int(size) if "." in match[1] else int(match[1]) * _UNITS[match[2].upper()]


def _auto_is_none(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() == "auto" else value


def _expand_home(value: object) -> object:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("should be a path")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"has ~ in it, but {error}") from error


def check_device(value: str) -> str:
    """The same text if it names a device; ValueError."""
    if not re.fullmatch(r"auto|cpu|cuda|cuda:\d{1,3}", value):
        raise ValueError("should be auto, cpu, cuda or cuda:N")
    return value


def check_name(value: str | None) -> str | None:
    """The same text if it is one line that can be shown; ValueError."""
    if value is not None and (not value.isprintable() or value != value.strip()):
        raise ValueError("should be one line of characters that can be shown, without spaces at its ends")
    return value


def parse_networks(value: object) -> object:
    """The networks of `192.0.2.0/24, 2001:db8::/32` or of a list of such texts. ValueError says which is none."""
    texts = value.split(",") if isinstance(value, str) else value
    if texts is None or not isinstance(texts, list | tuple):
        return texts
    return tuple(_network(text) for text in texts)


def _network(text: object) -> IPv4Network | IPv6Network:
    if isinstance(text, IPv4Network | IPv6Network):
        return text
    try:
        return ip_network(str(text).strip())
    except ValueError as error:
        raise ValueError(f"should be networks such as 192.0.2.0/24, but {error}") from error


Size = Annotated[int, BeforeValidator(parse_size)]
AutoSize = Annotated[int | None, BeforeValidator(parse_size), BeforeValidator(_auto_is_none)]
AutoCount = Annotated[int | None, BeforeValidator(_auto_is_none)]
AutoNumber = Annotated[float | None, BeforeValidator(_auto_is_none)]
FilePath = Annotated[Path, BeforeValidator(_expand_home)]
Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(parse_networks)]
