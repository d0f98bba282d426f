"""Every error a user can meet, with its stable `code`, HTTP status and remedy; all of them are imported from here.

The class docstring is the explanation printed in the documentation; the message says what was asked and what is
possible in this case; `remedy` says how to get there. The server turns these into OpenAI error bodies, the command
line prints them, the engine process sends them over its channel as (code, message). A new error is a class in the file
of its topic, and nothing else.
"""

from __future__ import annotations

# Their order is that of the documentation's table.
from vashista.engine.errors.root import VashistaError as VashistaError
from vashista.engine.errors.requests import *
from vashista.engine.errors.requests import RetryableError
from vashista.engine.errors.startup import *
from vashista.engine.errors.models import *
from vashista.engine.errors.tls import *
from vashista.engine.errors.ledger import *
from vashista.engine.errors.commands import *

ERRORS: dict[str, type[VashistaError]] = {}


def _register(error: type[VashistaError]) -> None:
    if error is not RetryableError:
        assert error.code not in ERRORS, f"two errors share the code {error.code}"
        ERRORS[error.code] = error
    for child in error.__subclasses__():
        _register(child)


_register(VashistaError)
