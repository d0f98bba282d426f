"""What the tests of the benchmarks share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def scripts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a script of the test module's FOLDER as its own run would; nothing of it stays imported."""
    folder = request.module.FOLDER
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in folder.glob("*.py")} - before:
        sys.modules.pop(name, None)
