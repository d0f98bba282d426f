from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from vashista.server.cli import run
from vashista.server.ledger.receipt import decode
from vashista.server.ledger.signing import load_public


def test_verify_prints_what_to_note_and_takes_it_back(filled: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = ["--state-dir", str(filled)]
    assert run(["ledger", "verify", *state]) == 0
    text = capfd.readouterr().out
    assert "Intact: 25 receipts, 1 to 25, 3 checkpoints." in text
    noted = text.split("last ")[1].split()[0]
    assert run(["ledger", "verify", *state, "--noted", noted, "--key", str(filled / "ledger.pub")]) == 0
    assert run(["ledger", "verify", *state, "--noted", "7:" + "0" * 64]) == 1
    assert "noted at receipt 7" in capfd.readouterr().err


def test_verify_of_a_damaged_ledger_fails_and_prints_json_too(filled: Path, capfd: pytest.CaptureFixture[str]) -> None:
    connection = sqlite3.connect(filled / "ledger.db")
    connection.execute("delete from receipts where seq = 4")
    connection.commit()
    connection.close()
    assert run(["ledger", "verify", "--file", str(filled / "ledger.db"), "--json"]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["damage"] == {"kind": "missing", "seq": 4, "message": "Receipts 4 to 4 are missing."}
    assert "error[ledger_verification]" in err


def test_report_and_export_take_a_span_of_time(filled: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = ["--state-dir", str(filled)]
    assert run(["ledger", "report", *state, "--by", "day", "--format", "json"]) == 0
    assert sum(row["num_requests"] for row in json.loads(capfd.readouterr().out)) == 25
    assert run(["ledger", "report", *state, "--format", "csv", "--until", "2026-09-22"]) == 0
    assert capfd.readouterr().out.count("\n") == 2
    assert run(["ledger", "report", *state]) == 0
    assert "4f0c2a9be1d7" in capfd.readouterr().out
    assert run(["ledger", "export", *state, "--since", "2026-09-22T10:00"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["seq"] for line in lines] == list(range(20, 26))
    assert decode(json.dumps(lines[0]["receipt"]).encode(), 20).request_id == "request-20"


@pytest.mark.parametrize(
    "date", ["2026-09-31", "2026-02-29", "2026-13", "2026-09-22T24:01", "2026-09-22T10:61", "\u0662026"]
)
def test_a_date_that_does_not_exist_is_refused_and_nothing_is_deleted_by_it(
    filled: Path, capfd: pytest.CaptureFixture[str], date: str
) -> None:
    state = ["--state-dir", str(filled)]
    for words in (["export", "--since"], ["report", "--until"], ["prune", "--yes", "--before"]):
        assert run(["ledger", words[0], *state, *words[1:], date]) == 2
        assert "give a UTC date such as" in capfd.readouterr().err
    assert run(["ledger", "verify", *state]) == 0
    assert "Intact: 25 receipts" in capfd.readouterr().out


@pytest.mark.parametrize("date", ["2026", "2024-02-29", "2026-09-22T10:00Z", "2026-09-22T10:00:59.25"])
def test_a_date_or_the_beginning_of_one_is_taken(filled: Path, date: str) -> None:
    assert run(["ledger", "export", "--state-dir", str(filled), "--since", date]) == 0


def test_a_key_that_cannot_be_read_is_a_matter_of_the_option_not_of_the_ledgers_key(
    filled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("no key")
    for key in ("none", "text"):
        for command in (["ledger", "verify", "--state-dir", str(filled)], ["attest", "verify", "none.json"]):
            assert run([*command, "--key", str(tmp_path / key)]) == 2
            error = capfd.readouterr().err
            assert str(tmp_path / key) in error
            assert "move both away" not in error


def test_an_export_that_finds_no_room_or_no_reader_does_not_blame_the_ledger(filled: Path) -> None:
    code = "import sys; from vashista.server.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "ledger", "export", "--state-dir", str(filled)]
    reader, gone = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for sink, words in ((full, "The output cannot be written: No space left on device.\n"), (gone, "")):
        result = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, text=True, check=False)
        os.close(sink)
        assert (result.returncode, result.stderr) == (1, words)


def test_prune_asks_deletes_and_leaves_a_whole_ledger(filled: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = ["--state-dir", str(filled)]
    assert run(["ledger", "prune", *state, "--before", "2000"]) == 0
    assert "nothing was deleted" in capfd.readouterr().out
    assert run(["ledger", "prune", *state, "--through", "12", "--yes"]) == 0
    assert "Deleted 12 receipts, 1 to 12" in capfd.readouterr().out
    assert run(["ledger", "verify", *state]) == 0
    assert "13 receipts, 13 to 25" in capfd.readouterr().out
    assert run(["ledger", "prune", *state, "--keep-days", "0", "--before", "2026"]) == 2


def test_the_key_is_printed_as_fingerprint_pem_and_json(filled: Path, capfd: pytest.CaptureFixture[str]) -> None:
    key = load_public(filled / "ledger.pub")
    state = ["--state-dir", str(filled)]
    for flags, expected in (([], key.fingerprint + "\n"), (["--pem"], key.pem)):
        assert run(["ledger", "key", *state, *flags]) == 0
        assert capfd.readouterr().out == expected
    assert run(["ledger", "key", *state, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"fingerprint": key.fingerprint, "pem": key.pem}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--noted", "7"], "SEQ:HASH"),
        (["report", "--since", "yesterday"], "UTC date"),
        (["prune"], "exactly one"),
        (["prune", "--keep-days", "99999"], "before 1970"),
    ],
)
def test_a_wrong_option_is_named(
    filled: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["ledger", *arguments, "--state-dir", str(filled)]) == 2
    assert message in capfd.readouterr().err


def test_a_state_folder_without_a_ledger_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "report", "export", "key"):
        assert run(["ledger", command, "--state-dir", str(tmp_path)]) == 1
        assert "error[ledger_" in capfd.readouterr().err
