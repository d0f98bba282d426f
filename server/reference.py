"""README's tables of settings, errors and metrics, written from the declarations themselves.

`make docs` runs `python -m vashista.server.reference README.md`; `tests/docs/test_readme.py` fails while a table in
README differs from the one made here. A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from vashista.engine.errors import ERRORS, SettingsError, VashistaError
from vashista.server.metrics import metrics_table
from vashista.server.settings_table import settings_table


def errors_table() -> str:
    """Markdown of all errors: code, HTTP status, explanation and remedy.

    Errors that only starting up or a command can meet inherit the root's status; the table shows a dash for them.
    """
    rows = ["| code | HTTP status | meaning | remedy |", "| --- | --- | --- | --- |"]
    for code, error in ERRORS.items():
        meaning = " ".join((error.__doc__ or "").split("\n\n")[0].split())
        status = error.http_status if _has_own_status(error) else "-"
        rows.append(f"| `{code}` | {status} | {meaning} | {error.remedy} |")
    return "\n".join(rows) + "\n"


def _has_own_status(error: type[VashistaError]) -> bool:
    return any("http_status" in vars(parent) for parent in error.__mro__ if parent is not VashistaError)


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "errors": errors_table,
    "metrics": metrics_table,
}


def with_tables(text: str) -> str:
    """The text with every table written anew; SettingsError when the markers of one are missing."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, found_begin, rest = text.partition(begin)
        _, found_end, tail = rest.partition(end)
        if not found_begin or not found_end:
            raise SettingsError(f"The file has no place for the table of {name}, between {begin.strip()} and {end}.")
        text = f"{head}{begin}{table()}{end}{tail}"
    return text


def main(arguments: list[str]) -> int:
    """Write the tables of the files named."""
    for name in arguments:
        path = Path(name)
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
