import json
import os

import pytest

from vashista.server.cli import run


@pytest.fixture
def bench(server, capsys, monkeypatch):
    """Runs the command; gives (exit status, stdout, stderr)."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def call(*arguments):
        status = run(["bench", "serve", "--url", server.url, "--quiet", "--warmup", "0", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_a_sweep_prints_a_row_a_level_and_writes_all_records(bench, server, tmp_path):
    path = tmp_path / "report.json"
    status, out, _ = bench(
        *("--concurrency", "1,2", "--num-requests", "6", "--input-len", "20", "--output-len", "3:5"),
        *("--slo", "ttft=1min,e2e=1min", "--json", str(path), "--seed", "5"),
    )
    assert status == 0
    assert "c=1" in out
    assert "c=2" in out
    assert "100.0%" in out
    document = json.loads(path.read_text())
    assert [len(result["outcomes"]) for result in document["results"]] == [6, 6]
    assert document["settings"]["seed"] == 5
    assert document["settings"]["model"] == "fake"
    for result in document["results"]:
        assert result["summary"]["num_exact_prompts"] == 6
        assert all(outcome["num_prompt_tokens"] == 20 for outcome in result["outcomes"])
        assert {outcome["max_tokens"] for outcome in result["outcomes"]} <= {3, 4, 5}
        assert result["summary"]["ttft"]["num_values"] == 6
        assert result["summary"]["num_cached_tokens"] == 18


def test_an_open_loop_also_prints_latencies_from_arrival(bench):
    status, out, _ = bench("--rate", "500", "--num-requests", "5", "--output-len", "2")
    assert status == 0
    assert "500/s" in out
    assert "E2E from arrival" in out
    assert "sent late by" in out


def test_failed_requests_end_with_status_1_and_their_counts(bench, server):
    server.fail_every = 3
    status, out, err = bench("--concurrency", "1", "--num-requests", "6", "--output-len", "2")
    assert status == 1
    assert "2 failed with 429 queue_full: too many" in out
    assert "2 of 6 requests failed" in err


def test_a_run_in_which_everything_fails_still_reports(bench, server):
    server.cut_after_chunks = 0
    status, out, _ = bench("--concurrency", "1", "--num-requests", "2")
    assert status == 1
    assert "No request succeeded" in out
    assert "connection_lost" in out


def test_chat_without_usage_and_without_tokenizer_says_what_it_counted(bench, server):
    server.has_usage = server.has_tokenize = False
    server.tokens_per_chunk = 2
    status, out, _ = bench("--endpoint", "chat", "--concurrency", "1", "--num-requests", "2", "--output-len", "4")
    assert status == 0
    assert "counted chunks" in out
    assert all("messages" in body for body in server.completions)


def test_chunks_of_several_tokens_are_remarked_on(bench, server):
    server.tokens_per_chunk = 2
    _, out, _ = bench("--concurrency", "1", "--num-requests", "2", "--output-len", "4")
    assert "a chunk carries 2.00 tokens" in out


def test_messages_of_a_file_are_sent_as_they_are(bench, server, tmp_path):
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "hello there"}]
    path.write_text(json.dumps({"messages": messages, "max_tokens": 2}))
    status, _, _ = bench("--endpoint", "chat", "--dataset", str(path), "--concurrency", "1", "--num-requests", "2")
    assert status == 0
    assert [body["messages"] for body in server.completions] == [messages, messages]
    assert [body["max_tokens"] for body in server.completions] == [2, 2]


def test_the_key_is_sent_and_never_written(bench, server, tmp_path, monkeypatch):
    server.key = "very-secret"
    path = tmp_path / "report.json"
    arguments = ("--concurrency", "1", "--num-requests", "1", "--json", str(path))
    assert bench(*arguments, "--api-key", "wrong")[0] == 1
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    status, out, err = bench(*arguments)
    assert status == 0
    assert "very-secret" not in out + err + path.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "1", "--rate", "2"], "exclude each other"),
        (["--concurrency", "0"], "above 0"),
        (["--concurrency", "1.5"], "not a whole number"),
        (["--concurrency", "1,x"], "not a list of numbers"),
        (["--rate", "nan"], "above 0"),
        (["--concurrency", "8", "--num-requests", "4"], "never keep 8 clients busy"),
        (["--max-in-flight", "3"], "belongs to --rate"),
        (["--num-requests", "0", "--rate", "1"], "num_requests is 0"),
        (["--duration", "-1"], "duration is -1"),
        (["--duration", "nan"], "duration is nan"),
        (["--timeout", "0"], "timeout is 0"),
        (["--warmup", "-1"], "warmup is -1"),
        (["--input-len", "x"], "input_len"),
        (["--output-len", "0"], "output_len"),
        (["--slo", "ttft=1"], "slo"),
        (["--slo", "ttft=1s", "--no-stream"], "need streams"),
        (["--extra-body", "[1]"], "not a JSON object"),
        (["--prefix-len", "128"], "prefix_len 128"),
        (["--dataset", "missing.txt"], "cannot be read"),
        (["--url", "localhost:1"], "URL"),
        (["--api-key", "a\nb"], "API key"),
    ],
)
def test_wrong_options_are_named_before_any_load(bench, server, arguments, message):
    status, out, err = bench(*arguments)
    assert status == 2
    assert "error[invalid_workload]" in err
    assert message in err
    assert not out
    assert not server.completions


def test_an_unknown_model_is_named_with_those_there(bench):
    status, _, err = bench("--model", "gpt-9")
    assert status == 1
    assert "error[model_not_found]" in err
    assert "it has: fake" in err


def test_a_report_that_cannot_be_written_is_known_before_the_load(bench, server, tmp_path):
    status, _, err = bench("--json", str(tmp_path / "missing" / "report.json"))
    assert status == 1
    assert "error[report_file]" in err
    assert not server.requests


def test_the_progress_bar_is_on_stderr_and_can_be_left_out(server, capsys):
    arguments = [
        "bench",
        "serve",
        "--url",
        server.url,
        "--concurrency",
        "1",
        "--num-requests",
        "3",
        "--output-len",
        "2",
    ]
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert "c=1" in shown.err
    assert "it/s" not in shown.out
    assert run([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert os.environ.get("OPENAI_API_KEY") is None
