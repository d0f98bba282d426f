"""Server and engine are killed under load: no answered request is without its receipt, and the chain is whole.

`bench/ledger_kills.py --server-kills 200` does the same with the real engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[3] / "bench" / "ledger_kills.py"


def test_no_answered_request_is_lost_when_server_or_engine_is_killed() -> None:
    arguments = ["--server-kills", "5", "--engine", "scripted", "--seed", "3"]
    child = subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    figures = json.loads(child.stdout)
    assert figures["server_kills"] + figures["engine_kills"] >= 5
    assert figures["receipts"] >= figures["answered"] > 50
    assert figures["lost"] == 0
