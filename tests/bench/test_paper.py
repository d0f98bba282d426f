"""The paper's claims: the arithmetic of each verdict, and a small run from the model to the document."""

from __future__ import annotations

import copy
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
MODEL = BENCH.parent / "deploy" / "models" / "reference-26m"
FOLDER = BENCH / "paper"
Scripts = Callable[[str], Any]
GIVEN = {"conditions": dict.fromkeys(("command", "model", "device", "dtype", "torch", "note", "text"), "x")}


@pytest.fixture(scope="module")
def path_of_measured(scripts: Scripts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the bundled model, as small as it gets."""
    out = tmp_path_factory.mktemp("paper") / "measured.json"
    arguments = ["--model", str(MODEL), "--device", "cpu", "--threads", "1", "--contexts", "256,512", "--hull-context",
                 "192", "--passages", "1", "--positions", "2", "--hull-positions", "1", "--tokens", "8", "--steps", "5",
                 "--token-budget", "112", "--note", "Small.", "--out", str(out)]  # fmt: skip
    assert scripts("run").main(["measure", *arguments]) == 0
    return out


@pytest.fixture
def measured(path_of_measured: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path_of_measured.read_text())
    return found


def test_a_run_measures_every_part_and_names_no_folder(measured: dict[str, Any]) -> None:
    assert len(measured["support"]["heads"]) == 8
    assert len(measured["support"]["heads"][0]) == 2
    assert len(measured["heads"]["rows"]) == 64
    assert len(measured["tokens"]["rows"]) == 8
    assert [len(row["seconds"]) for row in measured["times"]["rows"]] == [5] * 4
    assert [(row["context"], row["token_budget"]) for row in measured["times"]["rows"]] == [
        (256, None), (256, 112), (512, None), (512, 112),
    ]  # fmt: skip
    for row in measured["heads"]["rows"]:
        for leak in row["leakage"]:
            assert leak["dropped"] <= leak["bound"] * 1.0001
    command = measured["heads"]["conditions"]["command"]
    assert command.startswith("python bench/paper/run.py measure --model reference-26m --device cpu")
    assert "Small." not in command
    assert {part["conditions"]["note"] for part in measured.values()} == {"Small."}


def test_a_part_is_measured_anew_beside_the_others(scripts: Scripts, path_of_measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    out.write_text(path_of_measured.read_text())
    arguments = ["measure", "--model", str(MODEL), "--device", "cpu", "--threads", "1", "--contexts", "128", "--steps",
                 "2", "--token-budget", "112", "--out", str(out), "--parts"]  # fmt: skip
    assert scripts("run").main([*arguments, "times"]) == 0
    before, after = (json.loads(path.read_text()) for path in (path_of_measured, out))
    assert [name for name in before if before[name] != after[name]] == ["times"]
    assert after["times"]["conditions"]["note"] == ""


def test_the_document_is_written_from_files_alone_and_every_picture_is_there(
    scripts: Scripts, path_of_measured: Path, tmp_path: Path
) -> None:
    out = tmp_path / "paper.md"
    nothing = [str(tmp_path / name) for name in ("suite", "attention", "cpu")]
    arguments = ["write", "--measured", str(path_of_measured), "--suite", nothing[0], "--attention", nothing[1],
                 "--sparse-cpu", nothing[2], "--out", str(out)]  # fmt: skip
    assert scripts("run").main(arguments) == 0
    text = out.read_text()
    assert len(re.findall(r"^## [1-7]\. ", text, re.MULTILINE)) == 7
    assert {row.split("|")[1].strip() for row in text.splitlines() if "**not measured**" in row} >= {"5", "6"}
    linked = set(re.findall(r"\(paper/([\w-]+\.svg)\)", text))
    assert linked == {path.name for path in (tmp_path / "paper").iterdir()}
    assert len(linked) == 7
    for path in (tmp_path / "paper").iterdir():
        ET.fromstring(path.read_text())
    assert "nan" not in text
    assert "None" not in text
    scripts("run").main(arguments)
    assert out.read_text() == text


def test_the_document_of_the_project_is_what_its_measurements_give(scripts: Scripts, tmp_path: Path) -> None:
    assert scripts("run").main(["write", "--out", str(tmp_path / "paper.md")]) == 0
    docs = BENCH.parent / "docs"
    assert (docs / "paper.md").read_text() == (tmp_path / "paper.md").read_text()
    for path in (tmp_path / "paper").iterdir():
        assert (docs / "paper" / path.name).read_text() == path.read_text(), path.name


def test_without_measurements_there_is_no_document(scripts: Scripts, tmp_path: Path) -> None:
    arguments = ["write", "--measured", str(tmp_path / "no"), "--out", str(tmp_path / "paper.md")]
    with pytest.raises(SystemExit, match="lacks support, heads, tokens, times: run"):
        scripts("run").main(arguments)
    (tmp_path / "no").write_text('{"times": {}, "support": {}}')
    with pytest.raises(SystemExit, match="lacks heads, tokens: run"):
        scripts("run").main(arguments)
    assert not (tmp_path / "paper.md").exists()


def test_writing_again_removes_its_own_pictures_alone(scripts: Scripts, path_of_measured: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "paper.md", tmp_path / "paper"
    folder.mkdir()
    for name in ("older.svg", "mine.svg"):
        (folder / name).write_text("<svg/>")
    out.write_text("![An older picture](paper/older.svg)\n")
    assert scripts("run").main(["write", "--measured", str(path_of_measured), "--out", str(out)]) == 0
    assert (folder / "mine.svg").is_file()
    assert not (folder / "older.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["measure", "--parts", "support", "--out", "/dev/null/measured.json"], 2, "/dev/null/measured.json"),
        (["measure", "--out", "/tmp"], 2, "/tmp is a folder"),
        (["measure", "--parts", "hats"], 2, "there is no hats; there are support, heads, tokens, times"),
        (["measure", "--contexts", "4096,2048"], 2, "--contexts have to ascend"),
        (["measure", "--contexts", "32"], 2, "32 was asked for; 64 and more are possible"),
        (
            ["measure", "--model", str(MODEL), "--contexts", "65536", "--out", "OUT"],
            2,
            "contexts of [65536] tokens were asked for; the model takes 32768 at most",
        ),
        (["measure", "--model", str(MODEL), "--device", "cuda:99", "--out", "OUT"], None, "error[device_unavailable]"),
        (["measure", "--steps", "0"], 2, "0 was asked for; 1 and more"),
        (["measure", "--token-budget", "64"], 2, "64 was asked for; 96 and more"),
        (["measure", "--tokens", "1"], 2, "each of 2 passages needs one at least"),
        (["write", "--out", "/dev/null/paper.md"], 2, "/dev/null/paper.md"),
        (["measure", "--model", "/nowhere", "--out", "OUT"], None, "error[model_folder]: The model folder /nowhere"),
        (
            ["measure", "--model", "/nowhere", "--out", "SCRIPT"],
            None,
            "run.py does not hold the results of a benchmark",
        ),
        (["write", "--suite", "SCRIPT", "--out", "OUT"], None, "run.py does not hold the results of a benchmark"),
    ],
)
def test_what_cannot_be_read_or_written_is_said_before_anything_is_measured(
    arguments: list[str],
    status: int | None,
    words: str,
    scripts: Scripts,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"OUT": str(tmp_path / "out.md"), "SCRIPT": str(BENCH / "paper" / "run.py")}
    with pytest.raises(SystemExit) as ended:
        scripts("run").main([places.get(word, word) for word in arguments])
    said = capsys.readouterr().err if status else str(ended.value)
    assert words in said
    assert status in {None, ended.value.code}


def test_growth_is_the_exponent_of_the_context(scripts: Scripts) -> None:
    growth = scripts("claims").growth
    contexts = [1000, 2000, 4000]
    assert growth(contexts, [7.0, 7.0, 7.0]) == pytest.approx(0)
    assert growth(contexts, [10.0, 20.0, 40.0]) == pytest.approx(1)
    assert growth(contexts, [1000**0.5, 2000**0.5, 4000**0.5]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("num_flat", "finding"),
    [(10, "holds"), (9, "holds"), (5, "holds in part"), (1, "holds in part"), (0, "does not hold")],
)
def test_constant_support_is_judged_by_the_share_of_flat_heads(num_flat: int, finding: str, scripts: Scripts) -> None:
    def stats(growing: bool) -> list[dict[str, float]]:
        sizes = (10.0, 20.0) if growing else (10.0, 10.1)
        return [{"tokens_90_median": size, "tokens_99_median": 2 * size} for size in sizes]

    heads = [[stats(index >= num_flat)] for index in range(10)]
    claim = scripts("claims").support({"support": {"contexts": [1024, 2048], "queries": 4, "heads": heads} | GIVEN})
    assert claim.finding == finding
    assert claim.plainly.startswith(f"{num_flat} of 10 KV heads are flat")


def test_a_leak_above_the_theorems_bound_refutes_it(scripts: Scripts, measured: dict[str, Any]) -> None:
    leakage = scripts("claims").leakage
    assert leakage(measured).finding == "holds in part"
    solved = next(row for row in measured["heads"]["rows"] if row["theorem"])
    point = next(p for p in solved["theorem"]["points"] if p["in_regime"])
    point["log_leakage"] = point["log_bound"] + 1
    assert leakage(measured).finding == "does not hold"
    point["in_regime"] = False
    for row in measured["heads"]["rows"]:
        row["log_bound_of_model"] = -1.0
    assert leakage(measured).finding == "holds"


def test_the_linear_term_is_right_up_to_the_first_point_that_is_off(scripts: Scripts, measured: dict[str, Any]) -> None:
    claims = scripts("claims")
    points = [{"eps": eps, "displacement": eps * factor} for eps, factor in ((1, 3.0), (2, 2.9), (4, 2.0), (8, 3.0))]
    row = {"theorem": {"points": points[::-1], "predicted": 3.0}}
    assert claims.reach(row) == 2
    assert claims.reach({"theorem": {"points": points, "predicted": None}}) is None
    assert claims.linear(measured).finding in {"holds in part", "does not hold"}
    for head in claims.theorems(measured):
        head["theorem"] |= {"slope": 1.0, "predicted": 3.0, "points": [{"eps": 100.0, "displacement": 300.0}]}
    assert claims.linear(measured).finding == "holds"


def test_precision_and_recall_are_of_what_is_called_safe_and_of_what_is(scripts: Scripts) -> None:
    criterion = scripts("criterion")
    assert criterion.rates([True, True, False, False], [True, False, True, True]) == (0.5, pytest.approx(1 / 3))
    assert criterion.rates([False, False], [True, False]) == (None, 0.0)
    assert criterion.rates([True], [False]) == (0.0, None)
    assert criterion.area([3.0, 2.0, 1.0], [True, True, False])[0] == 1.0
    assert criterion.area([1.0, 2.0, 2.0], [True, False, True])[0] == 0.25
    assert criterion.area([1.0], [True]) is None
    assert criterion.threshold([5.0, 4.0, 3.0, 2.0], [True, True, False, False]) == 4.0
    assert criterion.threshold([5.0, 4.0], [False, False]) is None
    assert criterion.curve([5.0, 4.0, 3.0], [True, False, True]) == [
        (0.5, 1.0),
        (0.5, 0.5),
        (1.0, pytest.approx(2 / 3)),
    ]


@pytest.mark.parametrize(
    ("heads_tell", "tokens_tell", "finding"),
    [(True, True, "holds"), (True, False, "holds in part"), (False, True, "does not hold")],
)
def test_the_criterion_has_to_tell_heads_and_tokens_apart(
    heads_tell: bool, tokens_tell: bool, finding: str, scripts: Scripts
) -> None:
    rows = []
    for index in range(40):
        is_safe = index % 4 < 2
        gap = (9.0 if is_safe else 2.0) if heads_tell else 1.0
        leak = {"eps": 1.0, "gap": gap, "dropped": 0.01 if is_safe else 0.4, "bound": 0.9, "estimate": 0.2}
        rows.append({"leakage": [leak], "num_keys": 99})
    other = {"estimate": 0.1, "bound": 1.0, "dropped": 0.1}
    tokens = [other | {"changed": i % 5 == 0, "gap": float(i % (5 if tokens_tell else 7))} for i in range(70)]
    heads = {"rows": rows, "context": 99, "token_budget": 16}
    found = {"heads": heads | GIVEN, "tokens": {"rows": tokens, "context": 99} | GIVEN}
    claim = scripts("criterion").criterion(found)
    assert claim.finding == finding
    assert "14 of 70 likeliest tokens changed" in claim.plainly


def test_speed_is_read_from_the_benchmarks_files(scripts: Scripts) -> None:
    speed = scripts("serving").speed
    layers = [
        {"batch": 1, "context": 32768, "dense": 60.0, "levels_1": {"us": 20.0}, "levels_2": {"us": 15.0}, "chosen": 1},
        {"batch": 1, "context": 8192, "dense": 20.0, "levels_1": {"us": 20.0}, "chosen": 1},
        {"context": 16384, "us": 10.0, "flashinfer": 50.0, "paged_decode": 40.0},
    ]
    claim = speed(layers, None)
    assert claim.finding == "holds"
    assert claim.tables[0][1].rows == [
        ["1 x 32,768", "60.0", "20.0", "15.0", "3.0"],  # as served: with the levels chosen, not the fastest
        ["1 x 8,192", "20.0", "20.0", "-", "1.0"],
    ]
    assert claim.tables[1][1].rows == [["16,384", "40.0", "10.0", "4.0"]]
    wrapped = speed({"conditions": "a GPU", "rows": layers}, None)
    assert wrapped.tables == claim.tables
    assert wrapped.measured.endswith("GPU: a GPU.")
    slow = copy.deepcopy(layers)
    slow[0]["dense"] = 21.0
    assert speed(slow, None).finding == "does not hold"
    assert speed(None, None).finding == "not measured"
    cpu = [{"module": "vashista", "context": 16000, "dense ms": 12.0, "sparse ms": 6.0, "dense / sparse": 2.0}]
    assert speed(None, cpu).finding == "holds in part"
    assert "2.0 times faster" in speed(layers, cpu).plainly


def suite_of(lost_by_gap: Callable[[float], float], dense: float = 1.0) -> dict[str, Any]:
    row = {"task": "single", "context": 4096, "module": "vashista", "chance": 0.0}
    gaps = [float(gap) for gap in range(30)]
    sparse = {"values": [1.0 - lost_by_gap(gap) for gap in gaps], "support": [{"gap": gap} for gap in gaps]}
    results = [row | {"mode": "dense", "values": [dense] * 30}, row | {"mode": "tokens 1024"} | sparse]
    conditions = {"command": "python suite.py", "model": "m", "device": "d", "samples": [30], "sparse_from": "question"}
    return {"results": results, "conditions": conditions}


@pytest.mark.parametrize(
    ("lost_by_gap", "finding"),
    [
        (lambda gap: 0.5 if gap < 10 else 0.0, "holds"),
        (lambda gap: 0.0, "holds in part"),
        (lambda gap: 0.5 if gap > 20 else 0.0, "does not hold"),
    ],
)
def test_quality_has_to_be_kept_where_gaps_are_large_and_lost_where_they_are_small(
    lost_by_gap: Callable[[float], float], finding: str, scripts: Scripts
) -> None:
    serving = scripts("serving")
    suite = suite_of(lost_by_gap)
    assert serving.quality(suite).finding == finding
    assert len(serving.quality_points(suite)) == 10
    assert scripts("pictures").quality(suite).svg().count("<circle") >= 10


def test_quality_is_not_judged_where_full_attention_fails_or_nothing_was_given(scripts: Scripts) -> None:
    quality = scripts("serving").quality
    assert "cannot judge" in quality(suite_of(lambda gap: 0.0, dense=0.5)).plainly
    assert quality(suite_of(lambda gap: 0.0, dense=0.5)).finding == "not measured"
    assert quality(None).finding == "not measured"


@pytest.mark.parametrize(
    ("sparse_ms", "finding"),
    [((5.0, 6.0), "holds"), ((5.0, 9.0), "holds in part"), ((5.0, 40.0), "does not hold")],
)
def test_latency_is_predictable_if_it_hardly_grows(
    sparse_ms: tuple[float, float], finding: str, scripts: Scripts
) -> None:
    times = []
    for context, dense, sparse in ((1024, 5.0, sparse_ms[0]), (8192, 20.0, sparse_ms[1])):
        for budget, ms in ((None, dense), (1024, sparse)):
            times.append({"context": context, "token_budget": budget, "seconds": [ms / 1000] * 10})
    claim = scripts("serving").predictable({"times": {"rows": times} | GIVEN})
    assert claim.finding == finding
    assert f"{sparse_ms[1] / sparse_ms[0]:.2f} times sparse and 4.00 times dense" in claim.plainly


def times_of(dense: list[list[float]], sparse: list[list[float]]) -> dict[str, Any]:
    rows = []
    for context, full, part in zip((1024, 8192), dense, sparse, strict=True):
        rows += [{"context": context, "token_budget": None, "seconds": full},
                 {"context": context, "token_budget": 8, "seconds": part}]  # fmt: skip
    return {"times": {"rows": rows} | GIVEN}


def test_a_spread_that_is_wide_is_not_predictable(scripts: Scripts) -> None:
    wide = [0.001] * 5 + [0.004] * 5
    found = times_of([[0.005] * 10, [0.05] * 10], [wide, wide])
    assert scripts("serving").predictable(found).finding == "holds in part"


@pytest.mark.parametrize("dense", [[[0.05] * 10, [0.005] * 10], [[0.001] * 5 + [0.004] * 5, [0.05] * 10]])
def test_times_that_other_work_disturbed_prove_nothing(dense: list[list[float]], scripts: Scripts) -> None:
    claim = scripts("serving").predictable(times_of(dense, [[0.001] * 10] * 2))
    assert claim.finding == "not measured"
    assert "disturbed these times" in claim.plainly


def test_numbers_are_rounded_and_what_is_none_is_null(scripts: Scripts) -> None:
    rounded = scripts("measure")._rounded
    assert rounded({"a": [1.23456789, math.nan, math.inf], "b": True, "c": 7, "d": None}) == {
        "a": [1.2346, None, None], "b": True, "c": 7, "d": None,
    }  # fmt: skip
