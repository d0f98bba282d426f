"""Runs `vashista.server.serve.run` for tests: `run_server.py scripted|real SETTINGS_AS_JSON`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vashista.server.engine_process import ENGINE_COMMAND
from vashista.server.serve import run
from vashista.server.settings import Settings

SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_engine.py")))

if __name__ == "__main__":
    command = SCRIPTED if sys.argv[1] == "scripted" else ENGINE_COMMAND
    status = run(Settings.model_validate(json.loads(sys.argv[2])), engine_command=command)
    print("torch was imported" if "torch" in sys.modules else "no torch")
    sys.exit(status)
