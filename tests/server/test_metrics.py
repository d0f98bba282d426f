"""/metrics: what promtool says of it, and that the numbers are right."""

from __future__ import annotations

import re
import shutil
import subprocess

import httpx
import pytest

from vashista.server.metrics import TOKEN_EDGES_S, Metrics, metrics_table


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Debian's package prometheus")
def test_promtool_finds_nothing_to_complain_about(server, script):
    server.complete()
    server.complete(seed=script.ERROR)
    httpx.get(server.url + "/nowhere")
    text = httpx.get(server.url + "/metrics").content
    check = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (check.returncode, check.stdout + check.stderr) == (0, b"")


def test_a_request_is_counted_once_everywhere(start_server):
    server = start_server().wait_ready()
    server.complete(max_tokens=5, n=2)
    assert server.metric('vashista_requests_total{finish_reason="length"}') == 2
    assert server.metric("vashista_prompt_tokens_total") == 8
    assert server.metric("vashista_cached_tokens_total") == 6
    assert server.metric("vashista_generated_tokens_total") == 10
    for name, count in {
        "time_to_first_token": 2,
        "time_per_output_token": 2,
        "inter_token_latency": 8,
        "request_duration": 2,
        "queue_time": 2,
    }.items():
        assert server.metric(f"vashista_{name}_seconds_count") == count, name
    assert server.metric('vashista_kv_pages{state="free"}') == 1023
    assert server.metric("vashista_engine_ready") == 1
    assert server.metric('vashista_http_responses_total{route="/v1/completions",status="200"}') == 1


def test_refusals_and_unknown_paths_have_bounded_labels(server):
    before = server.metric('vashista_http_responses_total{route="other",status="404"}')
    for path in ("/a", "/b"):
        httpx.get(server.url + path)
    assert server.metric('vashista_http_responses_total{route="other",status="404"}') == before + 2
    text = httpx.get(server.url + "/metrics").text
    assert 'vashista_requests_refused_total{code="not_found"}' in text
    assert "/a" not in re.findall(r'route="([^"]*)"', text)


def test_the_edges_tell_2_ms_from_20_ms_and_between():
    assert [edge for edge in TOKEN_EDGES_S if 0.002 <= edge < 0.02] == [0.002, 0.003, 0.005, 0.0075, 0.01, 0.015]


def test_the_table_has_every_metric_that_is_served(server):
    text = httpx.get(server.url + "/metrics").text
    served = set(re.findall(r"^# TYPE (vashista_\w+)", text, re.MULTILINE))
    documented = set(re.findall(r"^\| `(\w+)`", metrics_table(), re.MULTILINE))
    assert served == documented
    assert all(line.count("|") == 4 for line in metrics_table().splitlines())


def test_two_sets_of_metrics_do_not_share_state():
    first, second = Metrics(), Metrics()
    first.generated_tokens.inc(5)
    assert b"vashista_generated_tokens_total 5.0" in first.exposition()
    assert b"vashista_generated_tokens_total 0.0" in second.exposition()
