"""The support profile: exact at the measured points, honest beyond them, and never read from a wrong file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vashista.engine.errors import (
    ModelFolderError,
    SupportProfileDamagedError,
    SupportProfileFileError,
    SupportProfileMismatchError,
    SupportProfileVersionError,
)
from vashista.engine.model_digest import model_digest
from vashista.engine.support_profile import DeviceTimes, Rule, StepTime, SupportProfile, SupportStats

MODEL = Path(__file__).parents[2] / "deploy" / "models" / "reference-26m"
DIGEST = model_digest(MODEL)
STATS = SupportStats(
    effective_median=1.0, effective_p90=2.0, tokens_90_median=1.0, tokens_90_p90=2.0,
    tokens_99_median=1.0, tokens_99_p90=2.0,
)  # fmt: skip


def make(
    tokens: list[list[list[list[int]]]],
    contexts: list[int],
    targets: list[float],
    windows: list[int | None] | None = None,
) -> SupportProfile:
    return SupportProfile(
        model_digest=DIGEST,
        rule=Rule.MEAN_VARIANCE,
        group_tokens=16,
        num_sinks=16,
        num_recent=64,
        contexts=contexts,
        num_positions=[16] * len(contexts),
        targets=targets,
        layer_windows=windows or [None] * len(tokens),
        tokens=tokens,
        support=[[[STATS] * len(head) for head in layer] for layer in tokens],
    )


def typical(windows: list[int | None] | None = None) -> SupportProfile:
    """Two layers of two KV heads."""
    first = [[[96, 400, 1600], [128, 640, 3200]], [[80, 80, 96], [80, 80, 112]]]
    second = [[[256, 512, 768], [192, 384, 512]], [[80, 1200, 2048], [96, 2400, 4096]]]
    return make([first, second], [2048, 4096], [0.5, 0.1, 0.01], windows)


@st.composite
def profiles(draw: st.DrawFn) -> SupportProfile:
    contexts = sorted(draw(st.sets(st.integers(64, 20_000), min_size=1, max_size=4)))
    targets = sorted(draw(st.sets(st.sampled_from([0.7, 0.5, 0.2, 0.05, 0.01]), min_size=1, max_size=4)), reverse=True)
    groups = st.lists(st.integers(1, 2000), min_size=len(targets), max_size=len(targets))
    counts = groups.map(lambda numbers: [16 * number for number in sorted(numbers)])
    head = st.lists(counts, min_size=len(contexts), max_size=len(contexts))
    layer = st.lists(head, min_size=2, max_size=2)
    window = st.none() | st.integers(16, 4000)
    return make(
        draw(st.lists(layer, min_size=2, max_size=2)), contexts, targets, draw(st.lists(window, min_size=2, max_size=2))
    )


def test_a_profile_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    steps = [StepTime(64, 0.001), StepTime(2048, 0.002)]
    times = DeviceTimes(
        dtype="float32", measured_at="2026-01-01T00:00:00+00:00", overhead_s=0.001, dense_s_per_token=1e-6,
        dense_steps=steps,
    )  # fmt: skip
    profile = msgspec.structs.replace(typical([None, 512]), devices={"CPU": times})
    profile.save(tmp_path / "profile.json")
    assert SupportProfile.load(tmp_path / "profile.json", MODEL) == profile
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    assert times.dense_step_s(1000) == pytest.approx(0.002)


def test_budgets_at_measured_points_are_the_measured_tokens() -> None:
    profile = typical()
    for index, context in enumerate(profile.contexts):
        for target, mass in enumerate(profile.targets):
            expected = [[head[index][target] for head in layer] for layer in profile.tokens]
            assert profile.budgets(context, mass) == expected


def test_between_contexts_and_targets_budgets_lie_between() -> None:
    budgets = typical().budgets(2896, 0.032)  # both nearly half way in logarithm
    assert 400 < budgets[0][0] < 3200
    assert budgets[0][0] == pytest.approx((400 * 1600 * 640 * 3200) ** 0.25, rel=0.05)


def test_beyond_the_last_context_a_head_grows_by_its_trend_or_stays() -> None:
    budgets = typical().budgets(8192, 0.01)
    assert budgets[0][0] == 6400  # twice as many for twice the context
    assert budgets[1][0] == 512  # it fell: it stays at the last measurement


def test_with_one_context_measured_budgets_grow_with_the_context() -> None:
    profile = make([[[[160, 320]]]], [1000], [0.5, 0.1])
    assert profile.budgets(4000, 0.1) == [[1280]]
    assert profile.budgets(500, 0.1) == [[320]]


def test_below_the_smallest_target_tokens_grow_at_least_as_the_mass_falls() -> None:
    profile = make([[[[80, 80]], [[80, 640]]]], [100_000], [0.1, 0.05])
    assert profile.budgets(100_000, 0.025) == [[160, 5120]]  # the second by its own trend: eightfold a halving
    assert profile.budgets(100_000, 1e-30) == [[100_000, 100_000]]


def test_no_dropped_mass_needs_every_token_that_a_layer_sees() -> None:
    assert typical([None, 1000]).budgets(3000, 0.0) == [[3008, 3008], [1008, 1008]]


def test_a_budget_never_exceeds_what_a_layer_sees() -> None:
    assert typical([None, 100]).budgets(1000, 0.01) == [[1008, 96], [112, 112]]


@given(profiles(), st.integers(1, 100_000), st.floats(0, 1), st.floats(0, 1))
def test_budgets_are_whole_groups_and_a_smaller_mass_never_needs_fewer(
    profile: SupportProfile, context: int, one: float, other: float
) -> None:
    few, many = profile.budgets(context, max(one, other)), profile.budgets(context, min(one, other))
    for layer, window in enumerate(profile.layer_windows):
        for low, high in zip(few[layer], many[layer], strict=True):
            assert low % 16 == high % 16 == 0
            assert 16 <= low <= high < min(context, window or context) + 16


@given(profiles(), st.integers(1, 100_000), st.floats(1e-6, 0.999))
def test_a_budget_is_expected_to_drop_no_more_than_it_was_asked_for(
    profile: SupportProfile, context: int, mass: float
) -> None:
    for layer, row in enumerate(profile.budgets(context, mass)):
        for head, budget in enumerate(row):
            expected = profile.expected_dropped_mass(context, budget)[layer][head]
            assert 0.0 <= expected <= mass * (1 + 1e-3)


@given(profiles(), st.integers(1, 100_000), st.integers(1, 100_000), st.integers(1, 100_000))
def test_more_tokens_are_never_expected_to_drop_more(
    profile: SupportProfile, context: int, one: int, other: int
) -> None:
    few = profile.expected_dropped_mass(context, min(one, other))
    many = profile.expected_dropped_mass(context, max(one, other))
    assert all(
        0 <= m <= f * (1 + 1e-9) <= 1 + 1e-9 for a, b in zip(few, many, strict=True) for f, m in zip(a, b, strict=True)
    )


@given(profiles(), st.integers(1, 60_000), st.integers(1, 60_000), st.sampled_from([0.5, 0.1, 0.01, 0.001]))
def test_beyond_the_last_context_a_longer_one_never_needs_fewer(
    profile: SupportProfile, one: int, other: int, mass: float
) -> None:
    last = profile.contexts[-1]
    short, long = (profile.budgets(last + more, mass) for more in sorted((one, other)))
    assert all(s <= b for a, c in zip(short, long, strict=True) for s, b in zip(a, c, strict=True))


@pytest.mark.parametrize(("context", "mass"), [(0, 0.1), (100, -0.1), (100, 1.1), (100, float("nan"))])
def test_a_question_without_sense_is_a_bug_of_the_caller(context: int, mass: float) -> None:
    with pytest.raises(ValueError, match="budgets for a context"):
        typical().budgets(context, mass)


def edited(tmp_path: Path, **fields: Any) -> Path:
    """A saved profile with some fields replaced."""
    path = tmp_path / "profile.json"
    typical().save(path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **fields}))
    return path


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"contexts": [4096, 2048]}, "contexts do not ascend"),
        ({"contexts": [0, 2048]}, "contexts do not ascend"),
        ({"contexts": [2048]}, "num_positions has the wrong length"),
        ({"num_positions": [16]}, "num_positions has the wrong length"),
        ({"targets": [0.01, 0.1, 0.5]}, "targets do not descend"),
        ({"targets": [1.5, 0.1, 0.01]}, "targets do not descend"),
        ({"targets": [0.5, 0.1]}, "tokens are not positive"),
        ({"tokens": []}, "no layer"),
        ({"tokens": [[[[96, 400, 1600]]]]}, "layer_windows has the wrong length"),
        ({"tokens": [[[[96, 400, 1600], [16, 16, 16]]], [[[96, 80, 1600], [16, 16, 16]]]]}, "one too many"),
        ({"tokens": [[[[96, 80, 90], [16, 16, 16]]] * 2] * 2}, "fall from one target"),
        ({"tokens": [[[[0, 80, 90], [16, 16, 16]]] * 2] * 2}, "not positive"),
        ({"layer_windows": [None, 0]}, "window"),
        ({"num_sinks": -1}, "negative"),
        ({"rule": "guess"}, "rule"),
        ({"tokens": "many"}, "tokens"),
        ({"support": [[[]]]}, "one too many"),
    ],
)
def test_a_profile_that_contradicts_itself_is_damaged(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(SupportProfileDamagedError, match=words):
        SupportProfile.load(edited(tmp_path, **fields), MODEL)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"version": 1}', b'{"version": NaN}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_file_that_is_no_profile_is_damaged(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(data)
    with pytest.raises(SupportProfileDamagedError, match="is not a support profile"):
        SupportProfile.load(path, MODEL)


def test_a_profile_of_another_version_says_so_whatever_else_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"version": 2, "new_field": 1}')
    with pytest.raises(SupportProfileVersionError, match="version 2"):
        SupportProfile.load(path, MODEL)


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SupportProfileMismatchError, match="another model"):
        SupportProfile.load(edited(tmp_path, model_digest="0" * 64), MODEL)


def test_a_missing_file_a_folder_and_a_wrong_model_folder_have_their_names(tmp_path: Path) -> None:
    with pytest.raises(SupportProfileFileError, match="does not exist"):
        SupportProfile.load(tmp_path / "none.json", MODEL)
    with pytest.raises(SupportProfileFileError, match="not a plain file"):
        SupportProfile.load(tmp_path, MODEL)
    with pytest.raises(ModelFolderError):
        SupportProfile.load(edited(tmp_path), tmp_path / "no-model")


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(SupportProfileFileError, match="cannot be written"):
        typical().save(tmp_path / "no-folder" / "profile.json")
    (tmp_path / "taken").mkdir()
    with pytest.raises(SupportProfileFileError, match="cannot be written"):
        typical().save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def with_retrieval() -> SupportProfile:
    return msgspec.structs.replace(typical(), retrieval=[[0.0, 0.6], [0.19, 0.2]])


def test_retrieval_heads_keep_everything_and_drop_nothing() -> None:
    profile = with_retrieval()
    assert profile.retrieval_heads.tolist() == [[False, True], [False, True]]
    budgets, before = profile.budgets(4096, 0.1), typical().budgets(4096, 0.1)
    assert [budgets[0][1], budgets[1][1]] == [4096, 4096]
    assert [budgets[0][0], budgets[1][0]] == [before[0][0], before[1][0]]
    masses = profile.expected_dropped_mass(4096, 96)
    assert [masses[0][1], masses[1][1]] == [0.0, 0.0]
    assert masses[0][0] == typical().expected_dropped_mass(4096, 96)[0][0] > 0


def test_a_profile_without_retrieval_is_read_and_budgets_every_head(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    typical().save(path)
    fields = json.loads(path.read_text())
    del fields["retrieval"]
    path.write_text(json.dumps(fields))
    profile = SupportProfile.load(path, MODEL)
    assert profile.retrieval is None
    assert not profile.retrieval_heads.any()


@pytest.mark.parametrize("retrieval", [[[0.1, 0.2]], [[0.1], [0.2]], [[0.1, 1.1], [0.0, 0.0]], [[-0.1, 1], [0, 0]], []])
def test_a_retrieval_table_of_the_wrong_shape_or_no_mass_is_refused(tmp_path: Path, retrieval: list[Any]) -> None:
    path = tmp_path / "profile.json"
    typical().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"retrieval": retrieval}))
    with pytest.raises(SupportProfileDamagedError, match="retrieval"):
        SupportProfile.load(path, MODEL)
