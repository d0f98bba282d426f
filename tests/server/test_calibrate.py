"""`vashista calibrate`: what it writes and prints, and how a wrong option ends it before any work is done."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vashista.engine import calibrate as work
from vashista.engine.support_profile import DeviceTimes, Rule, StepTime, SupportProfile, SupportStats
from vashista.server.cli import run
from vashista.server.commands.measuring import check_writable, write_whole
from vashista.server.commands.support_svg import support_svg
from vashista.server.commands.support_table import profile_text, support_plot

MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"
SVG = "{http://www.w3.org/2000/svg}"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VASHISTA_DEVICE", "VASHISTA_DTYPE", "VASHISTA_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def stats(tokens: float) -> SupportStats:
    return SupportStats(
        effective_median=tokens / 2, effective_p90=tokens, tokens_90_median=tokens, tokens_90_p90=2 * tokens,
        tokens_99_median=3 * tokens, tokens_99_p90=4 * tokens,
    )  # fmt: skip


def made(contexts: list[int]) -> SupportProfile:
    """A profile of 3 layers of 2 KV heads, support from 1 to 32 tokens, doubling from head to head."""
    heads = [[[stats(2.0 ** (2 * layer + head))] * len(contexts) for head in range(2)] for layer in range(3)]
    return SupportProfile(
        model_digest="0", rule=Rule.BOX, group_tokens=16, num_sinks=16, num_recent=64, contexts=contexts,
        num_positions=[8] * len(contexts), targets=[0.5, 0.1], layer_windows=[None] * 3,
        tokens=[[[[96, 160]] * len(contexts)] * 2] * 2 + [[[[96, 320]] * len(contexts)] * 2], support=heads,
        devices={"A device": DeviceTimes(dtype="float32", measured_at="", overhead_s=0.002, dense_s_per_token=1e-6,
                                         dense_steps=[StepTime(64, 0.002), StepTime(contexts[-1], 0.003)])},
    )  # fmt: skip


def test_a_model_is_calibrated_and_its_profile_loads(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "profile.json"
    arguments = ["--contexts", "64,128", "--passages", "1", "--positions", "3", "--num-threads", "1", "--device", "cpu"]
    assert run(["calibrate", str(MODEL), "--out", str(out), *arguments]) == 0
    profile = SupportProfile.load(out, MODEL)
    assert profile.contexts == [64, 128]
    assert profile.num_positions == [3, 3]
    assert profile.rule is Rule.MEAN_VARIANCE
    text = capsys.readouterr().out
    assert profile_text(profile) in text
    assert "Measured up to 128 of the model's 32768 tokens" in text
    assert f"Wrote {out} and {tmp_path / 'profile.svg'}." in text
    picture = ElementTree.parse(tmp_path / "profile.svg").getroot()
    assert len(picture.findall(f"{SVG}polyline")) == 16 + 2  # the heads, their median, and all tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.json", "profile.svg"]


def test_ctrl_c_leaves_the_old_profile_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "calibrate", interrupted)
    out = tmp_path / "profile.json"
    out.write_text("the old one")
    assert run(["calibrate", str(MODEL), "--out", str(out)]) == 130
    assert out.read_text() == "the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    assert "Interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--contexts", "two"], 2, "error[invalid_measurement]: --contexts is 'two'"),
        (["--contexts", "128,64"], 2, "must be positive and ascend"),
        (["--contexts", "65536"], 2, "the model was made for 32768"),
        (["--contexts", "64", "--positions", "65"], 2, "65 positions were asked for in a context of 64"),
        (["--contexts", "16384", "--passages", "6"], 2, "error[sample_text]: The sample text has 74836 tokens"),
        (["--passages", "100"], 2, "The sample text gives passages of 749 tokens; 2048 are needed"),
        (["--text", "no-such-file"], 2, "error[sample_text]: no-such-file cannot be read"),
        (["--rule", "guess"], 2, "guess"),
        (["--device", "tpu"], 2, "error[invalid_settings]"),
        (["--out", "no-folder/profile.json"], 1, "error[report_file]: no-folder/profile.json cannot be written"),
        (["--plot", "no-folder/plot.svg", "--out", "here.json"], 1, "error[report_file]: no-folder/plot.svg"),
        (["--out", "one.svg"], 1, "error[report_file]: one.svg cannot be both the profile and its picture"),
        (["--out", "one", "--plot", "./one"], 1, "error[report_file]: one cannot be both"),
        (["--passages", "0"], 2, "--passages"),
    ],
)
def test_a_wrong_option_ends_it_before_the_model_is_loaded(
    arguments: list[str], status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the measurement began")

    monkeypatch.setattr(work, "calibrate", never)
    monkeypatch.chdir(tmp_path)
    assert run(["calibrate", str(MODEL), *arguments]) == status
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_model_is_named(tmp_path: Path, capsys: Capture) -> None:
    assert run(["calibrate", str(tmp_path / "none")]) == 1
    assert "error[model_folder]" in capsys.readouterr().err


def test_the_plot_counts_every_head_once_in_each_column() -> None:
    profile = made([1024, 2048, 4096])
    lines = support_plot(profile).splitlines()[1:-2]
    columns = [[line.partition("|")[2][9 * i : 9 * i + 9] for line in lines] for i in range(3)]
    for column in columns:
        assert sum(int(number) for cell in column for number in re.findall(r"\d+", cell)) == 6
        assert sum("[" in cell for cell in column) == 1
    assert [line.split("|")[0].strip() for line in lines if line.split("|")[0].strip()] == [
        "32",
        "16",
        "8",
        "4",
        "2",
        "1",
    ]


def test_the_tables_show_median_and_largest_head_and_the_cost() -> None:
    text = profile_text(made([1024, 2048]))
    assert re.search(r"1024 +3 +16 +6 +32 +18 +96\n", text)
    assert re.search(r"1024 +96 +96 +213 +320\n", text)
    assert "16 > 16" in text
    assert "A device" in text
    assert re.search(r"fit +2.00 ms \+ 1.000 us per token", text)


@pytest.mark.parametrize("contexts", [[2048], [1024, 2048, 131072]])
def test_the_picture_is_valid_and_all_of_it_lies_inside(contexts: list[int]) -> None:
    picture = ElementTree.fromstring(support_svg(made(contexts), "a < b & c"))
    assert picture.find(f"{SVG}text").text == "a < b & c"  # type: ignore[union-attr]
    _, _, width, height = map(float, picture.attrib["viewBox"].split())
    for line in picture.iter(f"{SVG}polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height
    labels = [text for text in picture.iter(f"{SVG}text") if (text.text or "").startswith("layer")]
    heights = sorted(float(label.attrib["y"]) for label in labels)
    assert len(labels) == 6
    assert all(b - a >= 13.9 for a, b in pairwise(heights))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    from vashista.engine.errors import ReportFileError

    path = tmp_path / "file"
    write_whole(path, "one")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "two \ud800")
    assert path.read_text() == "one"
    for wrong in (tmp_path, tmp_path / "none" / "file"):
        with pytest.raises(ReportFileError, match="cannot be written"):
            check_writable(wrong)
        with pytest.raises(ReportFileError, match="cannot be written"):
            write_whole(wrong, "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
