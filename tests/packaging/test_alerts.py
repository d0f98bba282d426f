"""deploy/prometheus: every alert is tried by promtool, and asks for metrics and labels that the server has."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from vashista.engine.errors import ERRORS
from vashista.server.reference import TABLES

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
CASES = Path(__file__).with_name("alerts_test.yml")
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


@needs_promtool
def test_promtool_sets_every_alert_off_and_none_where_all_is_well(tmp_path: Path) -> None:
    for path in (PROMETHEUS / "alerts.yml", CASES):
        shutil.copy(path, tmp_path)
    tried = subprocess.run(
        ["promtool", "test", "rules", CASES.name], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert set(re.findall(r'alertname="(\w+)"', CASES.read_text())) == {rule["alert"] for rule in RULES}


@needs_promtool
def test_promtool_takes_scrape_job_and_alerts_as_the_operators_guide_joins_them(tmp_path: Path) -> None:
    shutil.copy(PROMETHEUS / "alerts.yml", tmp_path)
    config = (PROMETHEUS / "scrape.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(f"rule_files: [alerts.yml]\n{config}")
    checked = subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(RULES)} rules found" in checked.stdout


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_metrics_that_there_are_and_tells_what_to_do(rule: dict[str, object]) -> None:
    expression = str(rule["expr"])
    names = set(re.findall(r"\bvashista_[a-z_]+", expression))
    assert names or expression.startswith("up{")
    for name in names:
        assert f"| `{name.removesuffix('_bucket')}` |" in TABLES["metrics"](), name
    for code in re.findall(r'code="(\w+)"', expression):
        assert code in ERRORS
    annotations = rule["annotations"]
    assert isinstance(annotations, dict)
    assert {"summary", "remedy"} == set(annotations)
