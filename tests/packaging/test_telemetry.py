"""No telemetry in what the server is installed with, its locks, its bills; and a look that would find it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
AIRGAP = ROOT / "bench/airgap"
SITE = Path(importlib.metadata.distribution("torch").locate_file(""))  # type: ignore[arg-type]
OTHER_MACHINES = {"colorama", "httpx2-jsfetch"}
"""Pins of the lock for Windows and for browsers."""


@pytest.fixture(scope="module")
def telemetry() -> ModuleType:
    spec = importlib.util.spec_from_file_location("telemetry", AIRGAP / "telemetry.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["telemetry"] = module
    spec.loader.exec_module(module)
    return module


def pins(name: str) -> set[str]:
    text = (ROOT / f"deploy/lock/{name}.txt").read_text(encoding="utf-8")
    return set(re.findall(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE))


def installed_files() -> list[str]:
    """Of every package of the lock, relative to site-packages; the product's own are in the checkout."""
    files = []
    for name in pins("cpu") - OTHER_MACHINES:
        listed = importlib.metadata.distribution(name).files
        assert listed, f"{name} does not say what it installed"
        files += [str(file) for file in listed if not str(file).startswith("..")]
    return sorted(files)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_no_lock_pins_a_client_of_a_collector(name: str, telemetry: ModuleType) -> None:
    assert telemetry.in_lock(ROOT / f"deploy/lock/{name}.txt") == []


def test_what_the_server_is_installed_with_holds_nothing_but_what_is_known_with_its_reason(
    telemetry: ModuleType,
) -> None:
    files = installed_files()
    assert len(files) > 5000
    assert any(file.startswith("torch/lib/libtorch") for file in files), "compiled libraries are looked at too"
    found = telemetry.in_files(SITE, files)
    assert [finding for finding in found if finding.known is None] == []
    assert set(telemetry.KNOWN) == {finding.known for finding in found}, "an excuse for what is not there any more"


def test_the_products_own_source_holds_nothing_and_reaches_for_no_network_library(telemetry: ModuleType) -> None:
    files = [str(path.relative_to(ROOT)) for top in ("server", "engine", "kernels") for path in (ROOT / top).rglob("*")
             if path.is_file() and "__pycache__" not in path.parts]  # fmt: skip
    found = telemetry.in_files(ROOT, files)
    assert [finding for finding in found if not finding.what.startswith("imports")] == []
    assert found == []
    pattern = re.compile(
        r"^\s*(?:from|import) +(urllib\.request|http\.client|smtplib|ftplib|xmlrpc|poplib|imaplib|nntplib|telnetlib|"
        r"logging\.handlers|requests|httpx|aiohttp|urllib3|huggingface_hub|webbrowser)\b|push(?:add)?_to_gateway",
        re.MULTILINE,
    )
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in files if file.endswith(".py")}
    assert {file: match[0] for file, text in sources.items() if (match := pattern.search(text))} == {}


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_bill_that_a_bundle_of_the_lock_gets_names_none(
    variant: str, telemetry: ModuleType, tmp_path: Path
) -> None:
    bill = tmp_path / "sbom.cdx.json"
    bill.write_bytes(write_bill(variant, sorted(pins(variant))))
    assert telemetry.in_bill(bill) == []
    bill.write_bytes(write_bill(variant, [*sorted(pins(variant)), "Sentry_SDK", "opentelemetry-exporter-otlp"]))
    assert {finding.client for finding in telemetry.in_bill(bill)} == {"Sentry", "OpenTelemetry"}


def write_bill(variant: str, names: list[str]) -> bytes:
    """By deploy/bundle/build.py, of wheels with these names and of the packages of Debian that it pins."""
    code = (
        "import json, sys\n"
        f"sys.path[:0] = [{str(ROOT / 'deploy')!r}, {str(ROOT / 'docker')!r}]\n"
        "from bundle.build import Bundle\n"
        "from image.debian import Package, read_pins\n"
        "from image.wheels import Wheel\n"
        "variant, names = sys.argv[1], json.loads(sys.argv[2])\n"
        "bundle = Bundle(variant)\n"
        "for _, name in (pin for pins in bundle.pins() for pin in read_pins(pins)):\n"
        "    bundle.packages.append(Package(name.split('_')[0], name.split('_')[1], 'all', '0' * 64))\n"
        "bundle.wheels = [Wheel(name, '1', 'MIT', '0' * 64) for name in names]\n"
        "bundle.product = Wheel('vashista', '0.1.0', 'Apache-2.0', '0' * 64)\n"
        "bundle.contents['docs/README.md'] = b'x'\n"
        "bundle.add_bill()\n"
        "sys.stdout.buffer.write(bundle.contents['sbom.cdx.json'])\n"
    )
    command = [sys.executable, "-c", code, variant, json.dumps(names)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


PLANTED = {
    "posthog/client.py": "x = 1\n",
    "helper/_vendor/statsd/__init__.py": "",
    "helper/report.py": "def f():\n    import sentry_sdk.integrations as s\n",
    "helper/lazy.py": "import importlib\nm = importlib.import_module('ddtrace')\n",
    "helper/part.py": "from opentelemetry import context, sdk\n",
    "helper/brackets.py": "from fastapi.telemetry import (\n    _api,\n    _runtime,\n)\n",
    "helper/native.abi3.so": "\x7fELF\0\0https://api.segment.io/v1\0",
    "mixpanel-4.0.dist-info/METADATA": "Name: mixpanel\n",
    "fine/statistics.py": "from statistics import median\nimport analytics_of_ours\n",
    "fine/segment.py": "# a part of a line\nsegment = 1\n",
}


def test_what_is_planted_in_a_tree_is_found_and_what_only_sounds_alike_is_not(
    telemetry: ModuleType, tmp_path: Path
) -> None:
    for name, text in PLANTED.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = {(finding.client, finding.place) for finding in telemetry.in_tree(tmp_path)}
    assert found == {
        ("PostHog", "posthog/client.py"),
        ("StatsD", "helper/_vendor/statsd/__init__.py"),
        ("Sentry", "helper/report.py"),
        ("Datadog", "helper/lazy.py"),
        ("OpenTelemetry", "helper/part.py"),
        ("FastAPI's exporters", "helper/brackets.py"),
        ("Segment", "helper/native.abi3.so"),
        ("Mixpanel", tmp_path.name),
    }
    command = [sys.executable, str(AIRGAP / "telemetry.py"), "--tree", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.endswith("8 found, 8 of them unknown\n")


def test_a_lock_or_bill_without_names_is_no_clean_one(telemetry: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text("# nothing\n")
    (tmp_path / "bill.json").write_text('{"components": []}')
    for look, name in ((telemetry.in_lock, "lock.txt"), (telemetry.in_bill, "bill.json")):
        with pytest.raises(ValueError, match=r"pins nothing|names no library"):
            look(tmp_path / name)
