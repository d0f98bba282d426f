"""What a server and its engine import while they serve: of telemetry, nothing."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
NEVER = ("huggingface_hub", "httpx2", "hf_xet", "requests", "urllib3", "pip", "smtplib", "ftplib")
LOADED_UNUSED = "torch._strobelight."
"""torch imports it; engine/offline.py takes away the variable that would start it."""
NOTE_IMPORTS = """
import os, sys
def note(event, arguments, folder=os.environ["IMPORTS_NOTED_IN"]):
    if event == "import":
        with open(f"{folder}/{os.getpid()}", "a") as file:
            file.write(arguments[0] + "\\n")
sys.addaudithook(note)
"""


def left_out() -> set[str]:
    """Modules that the CPU image does not have: of wheels that stay away, and whole folders of others."""
    described = tomllib.loads((ROOT / "docker/image.toml").read_text(encoding="utf-8"))
    parts = (described, described["variants"]["cpu"])
    wheels = {name.replace("-", "_") for part in parts for name in part["leave_out_wheels"]}
    folders = {
        match[1] for part in parts for name in part["leave_out"] if (match := re.fullmatch(r"([\w/]+)/\*", name))
    }
    return wheels | {name.replace("/", ".") for name in folders}


@pytest.fixture
def modules() -> list[str]:
    """Those of all clients of collectors."""
    spec = importlib.util.spec_from_file_location("telemetry", ROOT / "bench/airgap/telemetry.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["telemetry"] = module
    spec.loader.exec_module(module)
    return [name for client in module.CLIENTS for name in client.modules]


def test_server_and_engine_import_no_client_of_a_collector_even_where_the_environment_names_one(
    start_server: Any, tmp_path: Path, modules: list[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOTE_IMPORTS)
    noted = tmp_path / "noted"
    noted.mkdir()
    environ = {
        **{"PYTHONPATH": str(tmp_path), "IMPORTS_NOTED_IN": str(noted)},
        **{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "otlp"},
        **{"FASTAPI_OTEL_AUTO_CONFIGURE": "true", "OTEL_SDK_DISABLED": "false", "TORCH_COMPILE_STROBELIGHT": "1"},
    }
    server = start_server("real", environ).wait_ready()
    assert server.complete().status_code == 200
    assert server.chat(stream=True).status_code == 200
    assert httpx.get(server.url + "/metrics").status_code == 200
    engine = server.engine_pid()
    of_server, of_engine = (set((noted / str(pid)).read_text().split()) for pid in (server.process.pid, engine))
    assert {"fastapi", "uvicorn", "prometheus_client"} <= of_server
    assert {"torch", "vashista.engine.models"} <= of_engine
    assert {"sympy", "huggingface_hub", "torch._inductor"} <= left_out()
    never = tuple(module + "." for module in (*modules, *NEVER, *left_out()))
    for imported in (of_server, of_engine):
        found = {name for name in imported if (name + ".").startswith(never)}
        assert {name for name in found if not (name + ".").startswith(LOADED_UNUSED)} == set()
    for who in ("server", "engine"):
        assert server.metric(f'vashista_egress_attempts_total{{seen_by="{who}",what="connect"}}') == 0
