"""The one place that imports sqlite_utils: without numpy, which it would import for types that nobody here stores.

numpy's linear algebra starts a thread for each core. A server that has threads before the kernel's filter is on refuses
to serve in isolation (`server/isolation/baggage.py`), and one that never computes with numpy starts sooner without it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

__all__ = ["Database"]


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """A module that cannot be imported meanwhile; as it is where it has been imported before."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


with _hidden("numpy"):
    from sqlite_utils import Database
