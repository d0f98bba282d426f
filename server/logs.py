"""What the server writes to its log: one line a record on stderr, as text or JSON, with the request's id.

`vashista serve` calls `configure_logging` once, before anything is logged. Code logs through the logger of its module
and passes facts as `extra={"fields": {...}}`; the HTTP layer sets `request_id` for the time of a request. Prompts,
replies and keys are never logged: fields carry counts, times, codes and ids only. uvicorn's records take the same form.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that the running task serves."""


def configure_logging(
    level: Literal["debug", "info", "warning", "error"], form: Literal["text", "json"], stream: TextIO | None = None
) -> None:
    """Send all records from `level` up to `stream` (stderr unless given); replaces what was configured before."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(_add_request_id)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # httpx and asyncio speak of every request and poll at these levels.
    for name in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z info server.serve: ready device=cpu request_id=...`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, or more when there is an exception."""
        name = record.name.removeprefix("vashista.")
        line = f"{_time(record)} {record.levelname.lower()} {name}: {_one_line(record.getMessage())}"
        for key, value in _fields(record).items():
            text = str(value)
            is_plain = text and text.isprintable() and not set(text) & _NEEDS_QUOTES
            line += f" {key}={text if is_plain else json.dumps(text)}"
        return line if not record.exc_info else f"{line}\n{self.formatException(record.exc_info)}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; values that JSON does not know are written as text."""
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {key: value for key, value in _fields(record).items() if key not in entry}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


_NEEDS_QUOTES = frozenset(' "=\\')


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = dict(getattr(record, "fields", {}))
    if getattr(record, "request_id", None) is not None:
        fields.setdefault("request_id", record.__dict__["request_id"])
    return fields


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _one_line(text: str) -> str:
    """A record stays one line and printable, so that nothing in a message can forge a record or steer a terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
