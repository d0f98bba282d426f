"""The command line: what help says, how errors end it, and what each command prints."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from msgspec.structs import replace

from vashista.engine.errors import ERRORS, GrammarError
from vashista.engine.messages import FinishReason, SamplingParams, Submit, SupportAudit, SupportReport, TokenEvent
from vashista.server.cli import cli, run
from vashista.server.commands.complete import Outcome, stream_completion
from vashista.server.commands.lazy import LazyGroup
from vashista.server.settings import Settings

MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"
PROMPT = "It was a dark and stormy night, and the old captain"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("VASHISTA_"):
            monkeypatch.delenv(name)


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command that is not a group, with its words."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        words = f"{path} {name}".strip()
        if isinstance(command, click.Group):
            yield from commands(command, words)
        else:
            yield words, command


def test_all_commands_are_there() -> None:
    assert {words for words, _ in commands(cli)} == {
        *(
            "serve",
            "complete",
            "predict",
            "calibrate",
            "diagnose",
            "doctor",
            "selftest",
            "version",
            "bench serve",
            "models list",
            "models inspect",
        ),
        *("models pack", "models import", "models verify", "models remove"),
        *("attest write", "attest verify"),
        *("bundle build", "bundle key", "bundle sign"),
        *("keys create", "keys list", "keys limit", "keys open", "keys revoke"),
        *("ledger verify", "ledger report", "ledger export", "ledger prune", "ledger show", "ledger key"),
    }


def test_every_help_has_an_example_and_describes_every_option() -> None:
    for words, command in commands(cli):
        context = click.Context(command, info_name=f"vashista {words}")
        text = command.get_help(context)
        assert f"vashista {words}" in text.split("xample", 1)[1], words
        for param in command.params:
            if isinstance(param, click.Option):
                assert param.help, f"{words} {param.name}"


def test_every_command_is_found_where_its_group_looks_for_it() -> None:
    groups: list[LazyGroup] = [cli, *(group for group in cli.commands.values() if isinstance(group, LazyGroup))]
    for group in groups:
        for name, place in group.lazy.items():
            command = group.get_command(click.Context(group), name)
            assert command is not None
            assert command.name == name
            assert place.help.endswith(".")


def test_help_and_settings_import_neither_torch_nor_the_web_server() -> None:
    code = (
        "import sys; from vashista.server.cli import run\n"
        "for arguments in (['--help'], ['keys', '--help'], ['models', '--help'], ['bench', '--help']): run(arguments)\n"
        "light = {'pydantic', 'sqlite_utils', 'torch', 'starlette'} & set(sys.modules)\n"
        "for arguments in (['serve', '--help'], ['complete', '--help'], ['keys', 'create', '--help'], ['version'],\n"
        f"                  ['models', 'inspect', {str(MODEL)!r}]): run(arguments)\n"
        "heavy = {'torch', 'starlette', 'uvicorn', 'transformers'} & set(sys.modules)\n"
        "assert not light and not heavy, (light, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout


def test_an_error_is_printed_with_its_code_and_remedy(capsys: Capture) -> None:
    assert run(["models", "inspect", "/no/such/folder"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error[model_folder]: The model folder /no/such/folder does not exist.\n"
        "  remedy: Give the path of a folder with config.json, tokenizer.json and *.safetensors.\n"
    )


def test_a_wrong_setting_ends_with_status_2(capsys: Capture) -> None:
    assert run(["serve", "--model", str(MODEL), "--port", "99999"]) == 2
    assert "error[invalid_settings]: The flag --port is '99999'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["srve"], "No such command 'srve'"),
        (["serve", "--prot", "1"], "No such option '--prot'"),
        (["complete", str(MODEL)], "Missing argument 'PROMPT'"),
        (["complete", str(MODEL), "x", "--temperature", "nan"], "not a finite number"),
        (["complete", str(MODEL), "x", "--temperature", "3"], "not in the range 0<=x<=2"),
        (["complete", str(MODEL), "x", "--logit-bias", "x=1"], "'x=1' should look like 42=-100"),
        (["complete", str(MODEL), "x", "--logit-bias", "1=101"], "not in the range -100<=x<=100"),
        (["complete", str(MODEL), "x", "--stop", ""], "a stop string must have a character"),
        (["complete", str(MODEL), "x", "--system", "y"], "--system needs --chat"),
        (["complete", str(MODEL), "x", "--json-object", "--json-schema", "f"], "choose one"),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(arguments: list[str], message: str, capsys: Capture) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.replace("'--prot'.", "'--prot'")


def test_every_setting_is_a_flag_of_serve() -> None:
    serve = dict(commands(cli))["serve"]
    assert {param.name for param in serve.params} == {*Settings.model_fields, "config"}


def test_serve_gives_the_server_its_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import vashista.server.serve as serve_module

    seen: list[Settings] = []

    def fake_run(settings: Settings) -> int:
        seen.append(settings)
        return 7

    monkeypatch.setattr(serve_module, "run", fake_run)
    monkeypatch.setenv("VASHISTA_MAX_N", "5")
    config = tmp_path / "v.toml"
    config.write_text("max_stops = 3\nport = 1\n")
    flags = ["--model", str(MODEL), "--port", "0", "--no-prefix-caching", "--kv-cache-bytes", "1GiB"]
    assert run(["serve", *flags, "--config", str(config)]) == 7
    settings = seen[0]
    assert (settings.max_n, settings.max_stops, settings.port) == (5, 3, 0)
    assert (settings.prefix_caching, settings.kv_cache_bytes) == (False, 1 << 30)


def test_version_prints_what_is_installed(capsys: Capture) -> None:
    assert run(["version"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["vashista", "python", "torch", "triton", "platform"]
    assert out.splitlines()[1].split()[1] == ".".join(map(str, sys.version_info[:3]))


# --- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_is_created_listed_and_revoked(tmp_path: Path, capsys: Capture) -> None:
    state = ["--state-dir", str(tmp_path / "state")]
    assert run(["keys", "list", *state]) == 0
    assert "There are no keys" in capsys.readouterr().out
    assert run(["keys", "create", "alice", *state]) == 0
    secret, note = capsys.readouterr()
    key_id = secret.split("_")[1]
    assert secret == f"vsk_{key_id}_{secret.strip().split('_', 2)[2]}\n"
    assert f"Made the key {key_id} for alice" in note
    assert run(["keys", "list", "--json", *state]) == 0
    listed = capsys.readouterr().out
    assert secret.strip() not in listed
    assert [(entry["id"], entry["name"], entry["revoked_at"]) for entry in json.loads(listed)] == [
        (key_id, "alice", None)
    ]
    assert run(["keys", "revoke", key_id, *state]) == 0
    assert "refuses every request" in capsys.readouterr().err
    assert run(["keys", "list", *state]) == 0
    assert key_id in capsys.readouterr().out
    assert run(["keys", "revoke", "nope", *state]) == 1
    assert "error[key_not_found]" in capsys.readouterr().err


def test_keys_are_listed_where_nothing_can_be_written(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ["--state-dir", str(tmp_path / "state")]
    assert run(["keys", "create", "alice", *state]) == 0
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    capsys.readouterr()
    assert run(["keys", "list", *state]) == 0
    assert "alice" in capsys.readouterr().out
    assert run(["keys", "create", "bob", *state]) == 1
    assert "Read-only file system" in capsys.readouterr().err


def test_a_key_gets_roles_and_limits(tmp_path: Path, capsys: Capture) -> None:
    state = ["--state-dir", str(tmp_path / "state")]
    assert run(["keys", "create", "alice", "--role", "metrics", "--role", "infer", *state]) == 0
    key_id = capsys.readouterr().out.split("_")[1]
    limits = ["--requests", "60/minute", "--tokens", "1000000/day", "--money", "25.50/month"]
    assert run(["keys", "limit", key_id, *limits, *state]) == 0
    text = "25.5 money/month, 60 requests/minute, 1000000 tokens/day"
    assert capsys.readouterr().out == f"{key_id} alice: {text}\n"
    assert run(["keys", "limit", key_id, "--tokens", "none/day", *state]) == 0
    assert "tokens" not in capsys.readouterr().out
    assert run(["keys", "list", *state]) == 0
    assert "infer,metrics  25.5 money/month, 60 requests/minute  alice" in capsys.readouterr().out
    assert run(["keys", "list", "--json", *state]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["roles"] == ["infer", "metrics"]
    assert listed["limits"][1] == {"resource": "requests", "window": "minute", "amount": 60}
    for wrong in ("60", "60/hour", "-1/day", "x/day", "1.5/day"):
        assert run(["keys", "limit", key_id, "--requests", wrong, *state]) == 2
        assert "error[invalid_key_option]: --requests is" in capsys.readouterr().err
    assert run(["keys", "limit", "nope", *state]) == 1


def test_opening_the_server_asks_and_forgets_the_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ["--state-dir", str(tmp_path)]
    assert run(["keys", "create", "alice", *state]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert run(["keys", "open", *state]) == 130
    with contextlib.closing(sqlite3.connect(tmp_path / "keys.db")) as database, database:
        database.execute("delete from keys")
    capsys.readouterr()
    assert run(["keys", "list", *state]) == 0
    assert "refuses everyone" in capsys.readouterr().out
    assert run(["keys", "open", "--yes", *state]) == 0
    assert run(["keys", "list", *state]) == 0
    assert "answers everyone" in capsys.readouterr().out


def test_the_state_folder_of_keys_comes_from_the_servers_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("VASHISTA_STATE_DIR", str(tmp_path / "state"))
    assert run(["keys", "create", "alice"]) == 0
    assert (tmp_path / "state" / "keys.db").exists()
    capsys.readouterr()


# --- models ---------------------------------------------------------------------------------------------------------


def test_inspect_tells_shape_memory_and_digests(capsys: Capture) -> None:
    assert run(["models", "inspect", str(MODEL), "--json", "--digest"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["num_parameters"], found["context"]) == ("LlamaForCausalLM", 26747392, 32768)
    # 2 (keys and values) x 8 layers x 2 KV heads x 64 elements x 2 bytes
    bfloat16 = next(need for need in found["memory"] if need["dtype"] == "bfloat16")
    assert (bfloat16["weight_bytes"], bfloat16["kv_bytes_per_token"]) == (2 * 26747392, 4096)
    assert bfloat16["full_context_bytes"] == 2 * 26747392 + 32768 * 4096
    assert found["sha256"]["config.json"] == hashlib.sha256((MODEL / "config.json").read_bytes()).hexdigest()
    assert set(found["sha256"]) == {path.name for path in MODEL.iterdir()}


def test_inspect_prints_the_same_for_people(capsys: Capture) -> None:
    assert run(["models", "inspect", str(MODEL)]) == 0
    out = capsys.readouterr().out
    assert "8 query and 2 KV heads of 64" in out
    assert "26.7M (26747392)" in out
    assert "sha256" not in out


def test_list_finds_models_at_any_depth_and_says_why_one_cannot_be_served(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/good").symlink_to(MODEL)
    (tmp_path / "deep/loop").symlink_to(tmp_path)
    (tmp_path / "bad").mkdir()
    shutil.copy(MODEL / "config.json", tmp_path / "bad")
    assert run(["models", "list", str(tmp_path), "--json"]) == 0
    bad, good = json.loads(capsys.readouterr().out)
    assert bad["folder"].endswith("bad")
    assert bad["error"]["code"] in ERRORS
    assert good["folder"].endswith("deep/er/good")
    assert good["num_parameters"] == 26747392
    assert run(["models", "list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "error[model_folder]" in lines[1]
    words = "deep/er/good LlamaForCausalLM 26.7M bfloat16 51.0 MiB 32768 unsigned"
    assert lines[2].split() == words.split()


def test_list_of_a_folder_without_models_says_so(tmp_path: Path, capsys: Capture) -> None:
    assert run(["models", "list", str(tmp_path)]) == 0
    assert "No model folder" in capsys.readouterr().out
    assert run(["models", "list", str(tmp_path / "none")]) == 1


# --- complete -------------------------------------------------------------------------------------------------------


def test_complete_streams_the_text_to_stdout_and_the_counts_to_stderr(capsys: Capture) -> None:
    flags = ["--temperature", "0", "--max-tokens", "8", "--kv-cache-bytes", "16MiB", "--num-threads", "1"]
    assert run(["complete", str(MODEL), PROMPT, *flags]) == 0
    out, err = capsys.readouterr()
    assert out == ", who had been so long in the\n"
    assert "prompt 14 tokens, output 8 tokens" in err
    assert "finish: length" in err


def test_complete_reads_stdin_and_honours_sampling_flags(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    flags = ["--temperature", "0", "--stop", "long", "--kv-cache-bytes", "16MiB", "--num-threads", "1", "--quiet"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert run(["complete", str(MODEL), "-", *flags]) == 0
    assert capsys.readouterr() == (", who had been so \n", "")


def test_complete_obeys_a_json_schema_and_a_seed(tmp_path: Path, capsys: Capture) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],'
                      ' "additionalProperties": false}')  # fmt: skip
    flags = ["--json-schema", str(schema), "--seed", "3", "--kv-cache-bytes", "16MiB", "--num-threads", "1", "--quiet"]
    assert run(["complete", str(MODEL), "x", *flags]) == 0
    first = capsys.readouterr().out
    assert json.loads(first)["a"] in {1, 2}
    assert run(["complete", str(MODEL), "x", *flags]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["x", "--logit-bias", "8192=1"], "token_out_of_vocabulary"),
        (["x", "--stop-token-id", "8192"], "token_out_of_vocabulary"),
        (["x", "--json-schema", "/no/such/file"], "invalid_grammar"),
        (["x", "--device", "cuda:99"], "device_unavailable"),
        (["x", "--max-tokens", "40000", "--kv-cache-bytes", "16MiB"], "context_length_exceeded"),
    ],
)
def test_complete_refuses_what_cannot_be_done(arguments: list[str], code: str, capsys: Capture) -> None:
    assert run(["complete", str(MODEL), *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error[{code}]" in err


class ScriptedEngine:
    """Answers a request with the given steps; a step may raise."""

    def __init__(self, steps: list[list[TokenEvent]]) -> None:
        self.steps = list(steps)
        self.submitted: list[Submit] = []

    @property
    def has_work(self) -> bool:
        return bool(self.steps)

    def submit(self, submit: Submit) -> None:
        self.submitted.append(submit)

    def step(self) -> list[TokenEvent]:
        return self.steps.pop(0)

    def abort(self, request_id: str) -> None:
        raise AssertionError(request_id)


def test_a_stream_counts_tokens_and_times_the_first() -> None:
    events = [
        [],
        [TokenEvent("r", [1], "a")],
        [TokenEvent("r", [2], "")],
        [TokenEvent("r", [3], "bc", finish_reason=FinishReason.STOP)],
    ]
    seconds = iter([10.0, 11.0, 12.0, 15.0])
    written: list[str] = []
    outcome = Outcome(4)
    submit = Submit("r", [1, 2, 3, 4], SamplingParams(seed=0, max_tokens=9), 0.0)
    stream_completion(ScriptedEngine(events), submit, written.append, outcome, lambda: next(seconds))
    assert written == ["a", "bc"]
    assert outcome == Outcome(4, 3, 1.0, 5.0, FinishReason.STOP)
    assert outcome.text() == (
        "prompt 4 tokens, output 3 tokens, first token after 1.000 s, then 0.5 tokens/s, finish: stop"
    )


def test_the_line_on_a_sparse_completion_says_which_head_steps_the_audits_are_of() -> None:
    audit = SupportAudit(2, 0.1, 0.0, 0.4, 0.05, 0.15, 50.0, 200.0, 700.0)
    support = SupportReport(
        num_head_steps=100, dense_share=0.25, tokens_attended=300.0, tokens_visible=1000.0, dropped_mass_bound=1.0,
        dropped_mass_estimate=0.08, support_gap=4.5, audit=audit,
    )  # fmt: skip
    outcome = Outcome(4, 3, 1.0, 5.0, FinishReason.STOP, support)
    assert outcome.text().endswith(
        "attended to 300 of 1000 tokens a head; dropped mass 0.080 by estimate, 0.100 (0.000 to 0.400) by 2 audits of "
        "the 75% of head-steps that were sparse"
    )
    outcome.support = replace(support, dense_share=0.0)
    assert outcome.text().endswith("by 2 audits")


def test_an_error_of_the_engine_is_raised_by_its_code() -> None:
    event = TokenEvent("r", finish_reason=FinishReason.ERROR, error_code="invalid_grammar", error_message="No token.")
    submit = Submit("r", [1], SamplingParams(seed=0, max_tokens=9), 0.0)
    with pytest.raises(GrammarError, match="No token"):
        stream_completion(ScriptedEngine([[event]]), submit, str, Outcome(1))


def test_output_that_fits_on_no_disk_ends_with_one_line_and_no_trace():
    command = [sys.executable, "-c", "from vashista.server.cli import main; main()", "version"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "The output cannot be written: No space left on device.\n")
