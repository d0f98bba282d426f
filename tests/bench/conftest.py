"""What the tests of the benchmarks share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Parse = Callable[[list[str]], object]
BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def scripts(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """Imports a script of the test module's FOLDER as its own run would; nothing of it stays imported."""
    modules, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(request.module.FOLDER))
    yield importlib.import_module
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if BENCH in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
            del sys.modules[name]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[[Parse, list[str]], str]:
    """Parses arguments that have to end the run with status 2; what was said of them."""

    def read(parse: Parse, arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as ended:
            parse(arguments)
        assert ended.value.code == 2
        return capsys.readouterr().err

    return read
