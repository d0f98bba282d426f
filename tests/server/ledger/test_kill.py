"""A process that writes is killed with SIGKILL: every receipt it had acknowledged is there, and the chain is whole.

`bench/ledger.py kill` does the same 200 times.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITER = Path(__file__).parents[3] / "bench" / "ledger.py"
NUM_KILLS = 20


def test_no_acknowledged_receipt_is_lost_when_the_writer_is_killed(
    tmp_path: Path, check: Callable[..., dict[str, Any]]
) -> None:
    source = random.Random(5)
    command = [sys.executable, str(WRITER), "write", str(tmp_path)]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}  # it reads its neighbour
    acknowledged = 0
    for _ in range(NUM_KILLS):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as writer:
            assert writer.stdout is not None
            for _ in range(source.randint(1, 40)):
                line = writer.stdout.readline()
            writer.kill()
            rest = writer.stdout.read().split(b"\n")[:-1]
            acknowledged = max([int(line), *map(int, rest)])
        verdict = check(tmp_path / "ledger.db")
        assert verdict["is_intact"]
        assert verdict["num_receipts"] >= acknowledged
    assert acknowledged > NUM_KILLS
