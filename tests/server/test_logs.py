"""Log lines: one a record, with the request's id, in two forms."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from vashista.server.logs import configure_logging, request_id

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_text_line_has_time_level_logger_message_fields_and_request_id() -> None:
    stream = io.StringIO()
    configure_logging("info", "text", stream)
    token = request_id.set("req-1")
    logging.getLogger("vashista.server.gate").info("done", extra={"fields": {"status": 200, "why": "a b"}})
    request_id.reset(token)
    logging.getLogger("vashista.server.gate").debug("not shown")
    line = stream.getvalue()
    assert re.fullmatch(rf'{TIME} info server\.gate: done status=200 why="a b" request_id=req-1\n', line)


def test_a_json_line_is_one_object() -> None:
    stream = io.StringIO()
    configure_logging("debug", "json", stream)
    logging.getLogger("vashista.server.gate").debug("a\nb", extra={"fields": {"n": 1, "level": "hidden"}})
    assert stream.getvalue().count("\n") == 1
    entry = json.loads(stream.getvalue())
    assert re.fullmatch(TIME, entry.pop("time"))
    assert entry == {"level": "debug", "logger": "vashista.server.gate", "message": "a\nb", "n": 1}


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_is_logged_with_its_trace(form: str) -> None:
    stream = io.StringIO()
    configure_logging("error", form, stream)  # type: ignore[arg-type]
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("failed")
    assert "ValueError: broken" in stream.getvalue()
    assert "Traceback" in stream.getvalue()


def test_a_message_cannot_forge_another_line() -> None:
    stream = io.StringIO()
    configure_logging("info", "text", stream)
    logging.getLogger("x").info("a\n2026-01-01T00:00:00.000Z info x: forged", extra={"fields": {"id": "b\nc"}})
    assert stream.getvalue().count("\n") == 1


def test_what_a_client_puts_into_a_path_cannot_steer_a_terminal() -> None:
    stream = io.StringIO()
    configure_logging("info", "text", stream)
    logging.getLogger("x").info("GET /%s", "\x1b[2J\x00\x9b31m", extra={"fields": {"id": "\x1b[1m"}})
    assert stream.getvalue().rstrip("\n").isprintable()
    assert r"GET /\x1b[2J\x00\x9b31m" in stream.getvalue()


def test_uvicorns_records_take_the_same_form_and_a_second_call_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("info", "text", first)
    configure_logging("warning", "json", second)
    logging.getLogger("uvicorn.error").warning("from uvicorn")
    assert first.getvalue() == ""
    assert json.loads(second.getvalue())["message"] == "from uvicorn"
