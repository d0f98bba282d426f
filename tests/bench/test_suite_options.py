"""What the quality suite refuses before it plays anything, what it publishes of its command, and how it waits for a
server that is still loading its model."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "bench" / "quality"
MODEL = str(FOLDER.parents[1] / "deploy" / "models" / "reference-26m")
CUT = ["--model", MODEL, "--contexts", "768", "--samples", "1", "--tasks", "single", "--workers", "0", "--budgets",
       "256", "--masses="]  # fmt: skip
HERE = [*CUT, "--device", "cpu", "--texts", "0"]
Scripts = Callable[[str], Any]
Refusal = Callable[[Callable[..., Any], list[str]], str]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--contexts", "65536"], "contexts of [65536] tokens were asked for; 200 to 32768"),
        (["--contexts", "-5"], "contexts of [-5]"),
        (["--contexts", "768,768"], "twice"),
        (["--contexts="], "name one at least"),
        (["--tasks", "riddle"], "there is no riddle; there are single, multi_key"),
        (["--tasks="], "nothing to play"),
        (["--modules", "vashista,magic"], "there is no magic; there are vashista, quest"),
        (["--samples", "0"], "--samples is 0"),
        (["--samples", "-1"], "--samples is -1"),
        (["--samples", "1,2"], "one number, or one for each"),
        (["--texts", "14"], "there are 13 held-out books"),
        (["--texts", "1", "--scored", "385"], "1 to 384 tokens"),
        (["--texts", "1", "--scored", "0"], "--scored is 0"),
        (["--budgets", "64"], "budgets of 64 tokens were asked for; 96 and more"),
        (["--masses", "1.5"], "from 0.001 to below 1"),
        (["--batch", "0"], "--batch is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--workers", "-1"], "--workers is -1"),
        (["--audit-rate", "2"], "--audit-rate is 2"),
        (["--json", "/nowhere/suite.json"], "/nowhere/suite.json cannot be written"),
        (["--json", "/tmp"], "/tmp cannot be written"),
        (["--plots", "/proc/pictures"], "/proc/pictures cannot be made"),
        (["--concurrency", "4"], "--concurrency is for a model asked with --url"),
        (["--url", "http://127.0.0.1:9"], "--device is for a model in this process"),
        (["--sam", "1"], "unrecognized"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_can(
    arguments: list[str], words: str, scripts: Scripts, refusal: Refusal
) -> None:
    assert words in refusal(scripts("suite_options").parse, [*HERE, *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*HERE, "--model", "/nowhere"], "error[model_folder]: The model folder /nowhere does not exist"),
        ([*HERE, "--device", "cuda:99"], "error[device_unavailable]"),
        ([*HERE, "--contexts", "200", "--tasks", "multi_key"], "a context of 200 tokens is too short: task multi_key"),
        ([*CUT, "--url", "http://127.0.0.1:9"], "http://127.0.0.1:9/v1 does not answer as an OpenAI server"),
        ([*CUT, "--url", "nonsense"], "nonsense/v1 does not answer as an OpenAI server"),
    ],
)
def test_a_run_that_cannot_begin_is_no_missed_gate(
    arguments: list[str],
    words: str,
    scripts: Scripts,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["suite.py", *arguments])
    assert scripts("suite").main() == 2
    assert words in capsys.readouterr().err


def test_neither_keys_nor_folders_nor_servers_are_published(scripts: Scripts) -> None:
    published = scripts("suite_options").published
    said = [
        "--key",
        "secret",
        "--url",
        "http://host:1",
        "--json=/home/me/x.json",
        "--model",
        "/home/me/m",
        "--seed",
        "2",
    ]
    assert published(said) == ["--key", "KEY", "--url", "URL", "--json=x.json", "--model", "m", "--seed", "2"]
    assert published(["--key=secret", "--url=http://h"]) == ["--key=KEY", "--url=URL"]


def test_pictures_need_no_json(scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = scripts("suite_options").parse([*HERE, "--plots", str(tmp_path / "pictures")])
    report = scripts("suite_report")
    rows = [report.Result("single", 768, "vashista", "dense", 0.0, [1.0])]
    scripts("suite").write(options, rows, report.judge(rows))
    assert {path.name for path in options.plots.iterdir()} == {"suite-single.svg", "suite-modules.svg"}


def test_a_disk_that_is_full_is_said(scripts: Scripts) -> None:
    options = scripts("suite_options").parse([*HERE, "--json", "/dev/full"])
    with pytest.raises(scripts("suite_options").SuiteError, match="No space left on device"):
        scripts("suite").write(options, [], scripts("suite_report").judge([]))


class Loading:
    """A server that lists its model at once and completes nothing before so many requests were made."""

    def __init__(self, num_refusals: int, status: int = 503) -> None:
        self.asked: list[dict[str, Any]] = []
        loading = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                loading.asked.append(body)
                if len(loading.asked) <= num_refusals:
                    self.answer(status, {"error": {"message": "The engine is loading the model."}})
                else:
                    self.answer(200, {"id": "1", "object": "text_completion", "choices": [{"text": "x"}]})

            def answer(self, status: int, body: dict[str, Any]) -> None:
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_a_server_that_is_still_loading_is_waited_for(scripts: Scripts, capsys: pytest.CaptureFixture[str]) -> None:
    slept: list[float] = []
    loading = Loading(3)
    with loading as url:
        scripts("suite_http").Server(url, "", 1).wait_until_ready(60.0, sleep=slept.append)
    assert len(loading.asked) == 4
    assert slept == [1.0] * 3
    said = capsys.readouterr().out
    assert said.count("is not ready, waiting for 60 s at most") == 1
    assert "The engine is loading the model." in said


def test_the_wait_for_a_server_ends_and_says_so(scripts: Scripts) -> None:
    now = [0.0]

    def sleep(duration_s: float) -> None:
        now[0] += duration_s

    loading = Loading(1000)
    with loading as url, pytest.raises(scripts("suite_options").SuiteError) as ended:
        scripts("suite_http").Server(url, "", 1).wait_until_ready(5.0, lambda: now[0], sleep)
    assert "was not ready within 5 s (--ready-s allows more); it says: " in str(ended.value)
    assert "The engine is loading the model." in str(ended.value)
    assert len(loading.asked) == 6


def test_a_server_that_refuses_is_not_waited_for(scripts: Scripts) -> None:
    loading = Loading(1000, status=401)
    with loading as url, pytest.raises(scripts("suite_options").SuiteError, match="does not complete a prompt"):
        scripts("suite_http").Server(url, "", 1).wait_until_ready(60.0)
    assert len(loading.asked) == 1


def test_a_reply_that_fails_ends_the_run_with_a_message(scripts: Scripts) -> None:
    question = scripts("suite_samples").Maker.load(MODEL).question("single", 768, 0, 0)
    loading = Loading(1000, status=400)
    with loading as url, pytest.raises(scripts("suite_options").SuiteError, match=r"gave no reply \(dense\)"):
        scripts("suite_http").Server(url, "", 1).ask([question], scripts("suite_report").Mode("server"), lambda: None)
