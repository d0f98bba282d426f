"""The quality suite: a cut of it on the bundled model, its arithmetic, its verdicts, and its talk with a server."""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vashista.engine.config import EngineConfig
from vashista.engine.messages import AttentionMode

FOLDER = Path(__file__).parents[2] / "bench" / "quality"
MODEL = FOLDER.parents[1] / "deploy" / "models" / "reference-26m"
Scripts = Callable[[str], Any]


def result(scripts: Scripts, values: list[float], **fields: Any) -> Any:
    given = {"task": "single", "context": 4096, "module": "vashista", "mode": "dense", "chance": 0.0} | fields
    return scripts("suite_report").Result(values=values, **given)


def test_a_cut_of_the_suite_runs_on_the_bundled_model(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "suite.json"
    arguments = ["--model", str(MODEL), "--device", "cpu", "--threads", "1", "--contexts", "768", "--samples", "2",
                 "--tasks", "single,multi_key", "--texts", "1", "--scored", "8", "--modules", "vashista,sinks_recent",
                 "--budgets", "96", "--masses", "0.3", "--workers", "0"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["suite.py", *arguments, "--json", str(out), "--plots", str(tmp_path)])
    assert scripts("suite").main() in {1, 2}
    found = json.loads(out.read_text())
    rows = {(row["task"], row["module"], row["mode"]): row for row in found["results"]}
    sparse_modes = [(name, mode) for name in ("vashista", "sinks_recent") for mode in ("tokens 96", "mass 0.3")]
    modes = [("vashista", "dense"), *sparse_modes]
    assert set(rows) == {(task, *mode) for task in ("single", "multi_key", "loss") for mode in modes}
    assert rows["single", "vashista", "dense"]["values"] == [1.0, 1.0]
    assert all(0 <= value <= 1 for key, row in rows.items() if key[0] != "loss" for value in row["values"])
    sparse = rows["loss", "vashista", "tokens 96"]
    assert sparse["values"] != rows["loss", "vashista", "dense"]["values"]
    assert 0.05 < sparse["support"][0]["attended"] < 0.3
    assert rows["single", "vashista", "dense"]["support"] == []
    assert str(tmp_path) not in out.read_text()
    assert found["conditions"]["command"].startswith("python bench/quality/suite.py --model " + MODEL.name)
    assert "vashista  tokens 96" in " ".join(capsys.readouterr().out.split("\n")).replace("      ", "  ")
    for path in tmp_path.glob("*.svg"):
        ET.fromstring(path.read_text())
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        *("suite-single.svg", "suite-multi-key.svg", "suite-modules.svg"),
    }


def player_of(scripts: Scripts, script: Any, attention: str = "vashista") -> Any:
    config = EngineConfig(
        model_dir=str(MODEL), device="cpu", attention=attention, num_threads=1, max_context=1024, max_running_requests=2
    )
    player = scripts("suite_player").SuitePlayer(config, 1.0)
    player.read([script], lambda num_tokens: None)
    return player


def test_playing_again_after_a_sparse_mode_gives_the_dense_result_again(scripts: Scripts) -> None:
    module = scripts("suite_player")
    maker = scripts("suite_samples").Maker.load(str(MODEL))
    question = maker.question("single", 700, 0, 0)
    start = question.question_start - 3  # inside of a unit of 16 tokens that has summaries
    player = player_of(scripts, module.Script(question.token_ids, start, start, 8, 4))
    [dense] = player.play(AttentionMode())
    [sparse] = player.play(AttentionMode(token_budget=96))
    [again] = player.play(AttentionMode())
    [covered] = player.play(AttentionMode(), player.covering())
    assert len(dense.token_ids) == 8
    assert len(dense.logprobs) == 4
    assert dense.logprobs != sparse.logprobs
    assert (again.token_ids, again.logprobs) == (dense.token_ids, dense.logprobs)
    assert (covered.token_ids, covered.logprobs) == (dense.token_ids, dense.logprobs)
    assert dense.support is None
    assert sparse.support.audit.num_audits == sparse.support.num_head_steps * 15 / 16  # without the retrieval head


def test_a_module_that_takes_over_a_reading_plays_as_if_it_had_read(scripts: Scripts) -> None:
    module = scripts("suite_player")
    question = scripts("suite_samples").Maker.load(str(MODEL)).question("single", 700, 0, 0)
    start = question.question_start - 3  # inside of a unit of 16 tokens that has summaries
    script = module.Script(question.token_ids, start, start, 8, 4)
    reader, alone, other = (player_of(scripts, script, name) for name in ("vashista", "quest", "quest"))
    other.read([module.Script(question.token_ids[::-1], start, start, 8, 4)], lambda num_tokens: None)

    def played(player: Any) -> Any:
        [performance] = player.play(AttentionMode(token_budget=96))
        return performance.logprobs, performance.token_ids, performance.support

    assert played(other) != played(alone)
    other.read_as(reader)
    assert played(other) == played(alone) != played(reader)


def test_served_attention_is_dense_up_to_the_answer(scripts: Scripts) -> None:
    question = scripts("suite_samples").Maker.load(str(MODEL)).question("single", 700, 1, 0)
    script = scripts("suite").script_of(question, "answer")
    [performance] = player_of(scripts, script).play(AttentionMode(token_budget=96))
    heads = 8 * 2
    assert performance.support.num_head_steps == heads * (question.sample.max_tokens - 1)
    assert script.start == len(question.token_ids) - 1


def test_samples_are_the_same_again_and_their_question_begins_where_it_says(scripts: Scripts) -> None:
    module = scripts("suite_samples")
    first, again = (list(module.make_questions(str(MODEL), ["single", "copy"], 700, 1, 3, 0)) for _ in range(2))
    assert first == again
    assert first != list(module.make_questions(str(MODEL), ["single", "copy"], 700, 1, 4, 0))
    tokenizer = module.Maker.load(str(MODEL)).tokenizer
    for question in first:
        text = tokenizer.decode(question.token_ids[question.question_start :])
        assert text.strip().startswith(("Question:", "uestion:", ": "))
        assert len(question.token_ids) + question.sample.max_tokens <= 700


def test_texts_are_as_long_as_the_context_even_beyond_one_book(scripts: Scripts) -> None:
    texts = scripts("suite_samples").make_texts(str(MODEL), 50_000, 2, 256)
    assert [len(text.token_ids) for text in texts] == [50_000, 50_000]
    assert texts[0].token_ids != texts[1].token_ids


def test_differences_are_paired_and_know_their_error(scripts: Scripts) -> None:
    report = scripts("suite_report")
    dense = result(scripts, [1.0, 1.0, 0.0, 1.0])
    lost = report.differ(result(scripts, [1.0, 0.0, 0.0, 1.0], mode="mass 0.03"), dense)
    assert lost.mean == 0.25
    assert lost.error == pytest.approx(0.25)
    loss = {"task": "loss"}
    more = report.differ(result(scripts, [2.02, 4.04], **loss), result(scripts, [2.0, 4.0], **loss))
    assert more.mean == pytest.approx(0.01)
    assert report.standard_error([1.0]) == math.inf


@pytest.mark.parametrize(
    ("dense", "sparse", "is_met", "words"),
    [
        ([1.0] * 40, [1.0] * 40, True, ""),
        ([1.0] * 40, [1.0] * 39 + [0.0], None, "undecided: single at 4096: worse by 2.50%"),
        ([1.0, 1.0], [0.8, 0.8], None, "undecided: single at 4096: worse by 20.00% +- 50.00%"),
        ([1.0] * 40, [1.0] * 20 + [0.0] * 20, False, "missed: single at 4096: worse by 50.00%"),
        ([1.0] * 30 + [0.0] * 10, [1.0] * 30 + [0.0] * 10, None, "cannot judge: full attention, single at 4096: 0.750"),
        ([1.0] * 39 + [0.0], [1.0] * 40, True, ""),
    ],
)
def test_the_verdict_says_met_missed_or_undecided(
    dense: list[float], sparse: list[float], is_met: bool | None, words: str, scripts: Scripts
) -> None:
    rows = [
        result(scripts, dense),
        result(scripts, sparse, mode="mass 0.03"),
        result(scripts, [0.0], mode="tokens 9"),
    ]
    verdict = scripts("suite_report").judge(rows)
    assert verdict.is_met is is_met
    assert verdict.num_unsure == (is_met is True)  # 40 samples do not tell a point
    assert words in "\n".join(verdict.lines)
    assert verdict.can_judge is ("cannot judge" not in words)
    assert (verdict.num_judged, verdict.num_cells) == (0 if "cannot judge" in words else 1, 1)


def test_a_task_that_cannot_be_judged_leaves_the_others_to_be(scripts: Scripts) -> None:
    rows = [
        result(scripts, values, task=task, mode=mode)
        for task, dense in (("single", 1.0), ("multi_key", 0.5), ("loss", 3.0))
        for mode, values in (("dense", [dense] * 4), ("mass 0.03", [dense] * 4))
    ]
    verdict = scripts("suite_report").judge(rows)
    assert (verdict.is_met, verdict.can_judge, verdict.num_judged, verdict.num_cells) == (True, False, 2, 3)
    assert verdict.lines == ["cannot judge: full attention, multi_key at 4096: 0.500, below 0.97"]


def test_enough_samples_make_a_verdict_sure(scripts: Scripts) -> None:
    rows = [result(scripts, [1.0] * 101, mode=mode) for mode in ("dense", "mass 0.03")]
    verdict = scripts("suite_report").judge(rows)
    assert (verdict.is_met, verdict.num_unsure) == (True, 0)


def test_without_a_result_of_the_default_setting_nothing_is_decided(scripts: Scripts) -> None:
    verdict = scripts("suite_report").judge([result(scripts, [1.0])])
    assert verdict.is_met is None
    assert verdict.lines == ["nothing to judge: there is no result of vashista mass 0.03"]


def test_aggregation_has_to_be_clearly_above_chance(scripts: Scripts) -> None:
    weakness = scripts("suite_report").weakness
    row = {"task": "common_words", "chance": 0.1}
    assert "not clearly above chance (0.100)" in weakness(result(scripts, [0.19, 0.19, 0.19], **row))
    assert weakness(result(scripts, [0.4, 0.5, 0.4], **row)) == ""
    assert weakness(result(scripts, [0.4, 0.0, 0.4], **row))


def test_results_survive_json(scripts: Scripts) -> None:
    report = scripts("suite_report")
    rows = [result(scripts, [1.0, 0.5], support=[{"audit": 0.25}])]
    data = report.to_json(rows, report.judge(rows), {"model": "m"})
    assert report.from_json(json.loads(json.dumps(data))) == rows


def test_a_server_is_asked_as_its_protocol_says(scripts: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    module, report = scripts("suite_http"), scripts("suite_report")
    asked: list[dict[str, Any]] = []
    support = {"tokens_attended": 10.0, "tokens_visible": 40.0, "dropped_mass_estimate": 0.1,
               "dropped_mass_bound": 1.0, "support_gap": 2.0, "audit": {"dropped_mass": 0.2}}  # fmt: skip

    class Client:
        def __init__(self, **options: Any) -> None:
            self.models = SimpleNamespace(list=lambda: SimpleNamespace(data=[SimpleNamespace(id="m")]))
            self.completions = SimpleNamespace(create=self.create)
            assert options["base_url"] == "http://h/v1"

        def create(self, **fields: Any) -> Any:
            asked.append(fields)
            is_sparse = fields["extra_body"]["vashista"]["attention"]["mode"] == "sparse"
            extra = {"vashista": {"support": support}} if is_sparse else {}
            usage = SimpleNamespace(model_extra=extra)
            return SimpleNamespace(choices=[SimpleNamespace(text=" 12345.")], usage=usage)

    monkeypatch.setattr(module.openai, "OpenAI", Client)
    sample = SimpleNamespace(task="single", prompt="p", max_tokens=7, chance=0.0, answers=("12345",))
    question = SimpleNamespace(context=4096, index=0, sample=sample)
    server = module.Server("http://h/v1/", "", 2)
    [dense] = server.ask([question], report.Mode("server"), lambda: None)
    [sparse] = server.ask([question], report.Mode("server", token_budget=512), lambda: None)
    [mass] = server.ask([question], report.Mode("server", max_dropped_mass=0.2), lambda: None)
    assert [fields["extra_body"]["vashista"]["attention"] for fields in asked] == [
        {"mode": "dense"}, {"mode": "sparse", "token_budget": 512}, {"mode": "sparse", "max_dropped_mass": 0.2},
    ]  # fmt: skip
    assert (dense.values, dense.support) == ([1.0], [])
    assert sparse.support == [{"estimate": 0.1, "bound": 1.0, "gap": 2.0, "attended": 0.25, "audit": 0.2}]
    assert (sparse.mode, mass.mode, asked[0]["temperature"]) == ("tokens 512", "mass 0.2", 0.0)


def test_a_chart_is_svg_without_colours_and_leaves_out_what_has_no_place(scripts: Scripts) -> None:
    chart = scripts("suite_chart").Chart("a < b", "x", "y", x_log=True, y_log=True)
    for style in range(10):
        chart.add(f"s{style}", [(1, 1e-9), (10, math.nan), (100, 0.0), (1000, 2.0 + style)])
    chart.add("nothing", [(0, 1)])
    svg = chart.svg()
    ET.fromstring(svg)
    assert "nothing" not in svg
    assert "a &lt; b" in svg
    assert "nan" not in svg
    shades = {part.split('"')[0] for part in svg.split('stroke="')[1:] + svg.split('fill="')[1:]}
    assert shades <= {"black", "white", "none", "#777", "#aaa", "#444", "#e4e4e4"}
