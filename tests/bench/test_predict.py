"""The benchmark of predictions: who used the processor, and what it says of a cell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "predict"


def proc(folder: Path, cpu: list[int], processes: dict[int, tuple[int, int]]) -> Path:
    """A /proc; processes: parent and seconds by id."""
    hertz = os.sysconf("SC_CLK_TCK")
    (folder / "stat").write_text(f"cpu  {' '.join(str(seconds * hertz) for seconds in cpu)} 0 0\ncpu0 1 2 3\n")
    for pid, (parent, seconds) in processes.items():
        (folder / str(pid)).mkdir(exist_ok=True)
        fields = ["S", parent, *range(9), seconds * hertz, 0, 0, 0]
        (folder / str(pid) / "stat").write_text(f"{pid} (a) b) {' '.join(map(str, fields))}")
    return folder


def test_the_time_of_own_processes_is_told_from_that_of_others_and_of_the_host(scripts, tmp_path):
    machine = scripts("machine")
    # 10 is the client, 11 its server, 12 the engine; 20 belongs to somebody else.
    before = machine.usage([10], proc(tmp_path, [0] * 8, {10: (1, 0), 11: (10, 0), 12: (11, 0), 20: (1, 0)}))
    later = proc(tmp_path, [50, 5, 5, 20, 5, 2, 3, 10], {10: (1, 1), 11: (10, 9), 12: (11, 30), 20: (1, 25)})
    found = machine.shares(before, machine.usage([10], later))
    assert found == pytest.approx({"own": 0.4, "others": 0.25, "stolen": 0.1})


def test_this_very_process_and_its_children_are_own(scripts):
    machine = scripts("machine")
    before = machine.usage([os.getpid()])
    loop = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", loop], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        after = machine.usage([os.getpid()])
        child.communicate(b"\n")
    assert after.own_s - before.own_s >= 0.25
    assert after.used_s <= after.all_s


def test_conditions_stand_beside_the_figures(scripts):
    results = [
        {"cell": "chat, idle", "capacity": None, "cpu": {"own": 0.5, "others": 0.25, "stolen": 0.0}, "drifting": False},
        {"cell": "chat, 60 %", "capacity": 4.0, "cpu": {"own": 0.9, "others": 0.0, "stolen": 0.02}, "drifting": True},
    ]
    idle, loaded = scripts("figures").conditions(results).splitlines()[2:]
    assert idle == "| chat, idle | - | 50% | 25.0% | 0.0% | - |"
    assert loaded == "| chat, 60 % | 4.00 | 90% | 0.0% | 2.0% | raised |"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "--state", "s", "--seconds", "0"], "0 was asked for; possible is 1 to 86400"),
        (["fit", "--state", "s", "--vocab-size", "300"], "300 was asked for; 301 and more"),
        (["cell", "--load", "-30"], "-30 was asked for; possible is 0 to 200"),
        (["cell", "--load", "60", "--mix", "prose"], "invalid choice: 'prose'"),
        (["cell", "--load", "60", "--out", "/nowhere/x"], "/nowhere/x cannot be written"),
        (["cell", "--load", "60", "--state", "/nowhere"], "no state folder /nowhere; `run.py fit --state /nowhere`"),
        (["cell", "--load", "0", "--rate", "2"], "with --load 0 one request follows the other"),
        (["report", "/nowhere"], "/nowhere cannot be read"),
        (["report", "/proc/self/limits"], "/proc/self/limits cannot be read"),
        (["report", "NUMBER"], "is no cell's; `run.py cell --out FILE` writes such files"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(arguments, words, scripts, refusal, tmp_path):
    (tmp_path / "number.json").write_text("3")
    arguments = [str(tmp_path / "number.json") if word == "NUMBER" else word for word in arguments]
    if arguments[0] == "cell":
        defaults = ["--state", str(tmp_path), "--mix", "chat", "--out", str(tmp_path / "out.json")]
        arguments = ["cell", *defaults, *arguments[1:]]
    assert words in refusal(scripts("run").parse, arguments)


def test_cells_and_their_report_can_be_asked_for(scripts, tmp_path):
    out = tmp_path / "out.json"
    cell = scripts("run").parse(
        ["cell", "--state", str(tmp_path), "--mix", "both", "--load", "60", "--rate", "2.5", "--out", str(out)]
    )
    assert (cell.load, cell.rate, cell.seconds, cell.out) == (60.0, 2.5, 120.0, out)
    out.write_text('{"cell": "both, 60 %", "usages": [], "cpu": {}, "capacity": 4.1, "drifting": false}')
    assert scripts("run").parse(["report", str(out), str(out)]).files[1]["capacity"] == 4.1


def test_first_tokens_are_timed_with_their_launches(scripts, monkeypatch, capsys, tmp_path):
    model = tiny_models.build("llama", tmp_path)
    command = ["first_token.py", "--model", str(model), "--device", "cpu", "--lengths", "4,9,99999", "--times", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--warm", "1", "--pause", "0", "--pauses", "0"])
    scripts("first_token").main()
    cells = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[1].strip(" -") for row in cells] == ["prompt", "", "4", "9", "prompt", "", "128 after 0 s"]
    for row in (cells[2], cells[3], cells[6]):
        expected, seen, low, high, _, launch = (float(cell) for cell in row[2:8])
        assert expected > 0
        assert 0 < low <= seen <= high
        assert 0 < launch <= high
