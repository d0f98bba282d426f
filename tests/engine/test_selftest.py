"""The checks of `vashista selftest`: they pass on what is right, and each fails on what it is there to find."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from vashista.engine import selftest_cpu, selftest_gpu
from vashista.engine.config import EngineConfig
from vashista.engine.errors import ModelFolderError, SelftestAnswersError, SelftestModelError
from vashista.engine.model_config import load_model_config
from vashista.engine.sample_text import read_sample_text
from vashista.engine.selftest import Selftest
from vashista.engine.selftest_answers import FILE_NAME, SelftestAnswers, digest_file, hide_codes
from vashista.engine.selftest_check import Check, CheckFailed, CheckResult, CheckSkipped, Status
from vashista.engine.selftest_cpu import cpu_checks
from vashista.engine.selftest_gpu import Size, gpu_checks
from vashista.engine.selftest_model import ModelTest
from vashista.engine.selftest_write import write_answers
from vashista.engine.tokenizer import Tokenizer
from vashista.kernels import triton_guard
from vashista.kernels.cpu import library

MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"
NUM_PASSAGE_TOKENS = 700
TINY = Size(
    contexts=(1, 17, 130), chunks=(1, 5, 20), head_dim=64, num_kv_heads=2, group=2, page_size=16, budget=96,
    dtype=torch.float32,
)  # fmt: skip
KERNELS = ["CPU kernels: products, norms, gates", "CPU kernels: dense attention", "CPU kernels: sparse attention"]


@pytest.fixture(scope="module")
def answers() -> SelftestAnswers:
    """Of the bundled model, with a short passage."""
    return write_answers(MODEL, EngineConfig(model_dir=str(MODEL), num_threads=1), NUM_PASSAGE_TOKENS)


def run_all(folder: Path, answers: SelftestAnswers) -> dict[str, CheckResult]:
    config = EngineConfig(model_dir=str(folder), device="cpu", num_threads=1)
    return {check.name: check.run() for check in Selftest(folder, answers, config).list_checks()}


def without_recall(answers: SelftestAnswers) -> SelftestAnswers:
    """For tests that need no long passage."""
    return msgspec.structs.replace(answers, recall=None)


def run_check(checks: list[Check], name: str) -> CheckResult:
    [check] = [check for check in checks if check.name == name]
    return check.run()


def test_a_check_passes_fails_or_is_skipped_and_says_why() -> None:
    def fail() -> str:
        raise CheckFailed("7 is not 8")

    def skip() -> str:
        raise CheckSkipped("no GPU")

    def refuse() -> str:
        raise ModelFolderError("m is missing.")

    def crash() -> str:
        raise RuntimeError("out of range")

    ticks = iter(range(100))
    results = [Check("a", look, "try again").run(lambda: next(ticks)) for look in (lambda: "1", fail, skip)]
    results += [Check("a", look, "try again").run() for look in (refuse, crash)]
    assert [result.status for result in results] == ["passed", "failed", "skipped", "failed", "failed"]
    assert [result.detail for result in results] == [
        *("1", "7 is not 8", "no GPU", "model_folder: m is missing.", "RuntimeError: out of range"),
    ]
    assert [result.remedy for result in results] == [None, "try again", None, ModelFolderError.remedy, "try again"]
    assert results[0].took_s == 1


def test_a_sound_installation_passes_every_check(answers: SelftestAnswers) -> None:
    results = run_all(MODEL, answers)
    assert [name for name, result in results.items() if result.status is Status.FAILED] == []
    assert " M parameters in float32" in results["model loads on the CPU"].detail
    assert " codes out of " in results["recall, dense"].detail
    assert "dropped mass" in results["recall, sparse"].detail
    assert "to the bit" in results["sparse equals dense where all is kept"].detail


def copy_model(folder: Path) -> Path:
    """Without the support profile, which knows its model too."""
    return Path(shutil.copytree(MODEL, folder / "model", ignore=shutil.ignore_patterns("support_profile.json")))


def test_a_changed_tensor_is_found_by_its_file_and_by_what_the_model_says(
    answers: SelftestAnswers, tmp_path: Path
) -> None:
    folder = copy_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.5.mlp.down_proj.weight"
    weights[name] = -weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    results = run_all(folder, without_recall(answers))
    assert results["model files"].detail == "not the file that the answers were made with: model.safetensors"
    assert results["known answers"].status is Status.FAILED
    assert {results[name].status for name in KERNELS} <= {Status.PASSED, Status.SKIPPED}


def test_a_single_changed_bit_is_found(answers: SelftestAnswers, tmp_path: Path) -> None:
    folder = copy_model(tmp_path)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    assert run_all(folder, without_recall(answers))["model files"].status is Status.FAILED


def test_a_torn_weight_file_fails_by_its_named_error_and_the_kernels_are_still_checked(
    answers: SelftestAnswers, tmp_path: Path
) -> None:
    folder = copy_model(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])
    results = run_all(folder, answers)
    assert results["model loads on the CPU"].detail.startswith("invalid_checkpoint: ")
    assert results["model loads on the CPU"].remedy
    assert results["known answers"].status is Status.SKIPPED
    assert results["recall, dense"].detail == "the model is not loaded"
    assert {results[name].status for name in KERNELS} <= {Status.PASSED, Status.SKIPPED}


def test_a_missing_file_is_named(answers: SelftestAnswers, tmp_path: Path) -> None:
    folder = copy_model(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    result = run_all(folder, without_recall(answers))["model files"]
    assert result.detail.startswith("selftest_model: tokenizer_config.json is missing in ")


def test_other_tokens_and_other_codes_than_known_are_named(answers: SelftestAnswers) -> None:
    [*others, last] = answers.known
    lying = msgspec.structs.replace(last, token_ids=[*last.token_ids[:2], 7, *last.token_ids[3:]])
    recall = answers.recall
    assert recall is not None
    codes = recall.codes | {"elephant": "00000"}
    results = run_all(MODEL, msgspec.structs.replace(answers, known=[*others, lying], recall=None))
    assert f"after {last.prompt!r} token 3 is " in results["known answers"].detail
    passage = msgspec.structs.replace(recall, needle="The code of {name} is 11111.\n\n", codes=codes)
    results = run_all(MODEL, msgspec.structs.replace(answers, recall=passage))
    assert "'11111.' for elephant, not 00000" in results["recall, dense"].detail


def test_another_rounding_of_log_probabilities_passes_and_another_value_fails(answers: SelftestAnswers) -> None:
    for shift, status in ((1e-4, Status.PASSED), (1e-2, Status.FAILED)):
        moved = [msgspec.structs.replace(k, logprobs=[x + shift for x in k.logprobs]) for k in answers.known]
        results = run_all(MODEL, msgspec.structs.replace(answers, known=moved, recall=None))
        assert results["known answers"].status is status
        assert results["recall, dense"].status is Status.SKIPPED


def spoil_output(door: Callable[..., Any]) -> Callable[..., Any]:
    """A door whose result, returned or written into its last positional tensor, is a little off."""

    def lie(*args: Any, **kwargs: Any) -> Any:
        result = door(*args, **kwargs)
        target = result if isinstance(result, torch.Tensor) else [a for a in args if isinstance(a, torch.Tensor)][-1]
        target.mul_(1.01)
        return result

    return lie


@pytest.mark.parametrize(
    ("module", "name", "check"),
    [
        ("linear", "linear", KERNELS[0]),
        ("norm", "rms_norm", KERNELS[0]),
        ("norm", "silu_mul", KERNELS[0]),
        ("attend", "decode", KERNELS[1]),
        ("sparse", "decode", KERNELS[2]),
    ],
)
def test_a_cpu_kernel_that_lies_is_found(module: str, name: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library.load() is None:
        pytest.skip(library.status())
    target = getattr(selftest_cpu, module)
    assert run_check(cpu_checks(), check).status is Status.PASSED
    monkeypatch.setattr(target, name, spoil_output(getattr(target, name)))
    result = run_check(cpu_checks(), check)
    assert result.status is Status.FAILED
    assert "plain: " in result.detail
    assert "from the reference" in result.detail


def test_a_bound_below_the_dropped_mass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.load() is None:
        pytest.skip(library.status())
    decode = selftest_cpu.sparse.decode

    def lie(native: Any, plan: Any, *args: Any, **kwargs: Any) -> None:
        decode(native, plan, *args, **kwargs)
        plan.diagnostics[..., 4] -= 30

    monkeypatch.setattr(selftest_cpu.sparse, "decode", lie)
    assert "the bound of the dropped mass is below" in run_check(cpu_checks(), KERNELS[2]).detail


def test_the_instruction_set_in_use_is_the_same_afterwards() -> None:
    native = library.load()
    if native is None:
        pytest.skip(library.status())
    before = native.instruction_set
    results = [check.run() for check in cpu_checks()]
    assert native.instruction_set == before
    assert all(name in results[1].detail for name in native.set_names)


@pytest.mark.parametrize(
    ("status", "expected"),
    [("no compiled kernels", Status.SKIPPED), ("no compiled kernels (of another version)", Status.FAILED)],
)
def test_an_installation_without_compiled_kernels_is_right_and_one_whose_kernels_do_not_load_is_not(
    status: str, expected: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(library, "status", lambda: status)
    assert {check.run().status for check in cpu_checks()} == {expected}


def triton_checks() -> list[Check]:
    if triton_guard.triton is None:
        pytest.skip("the triton package is not installed")
    return gpu_checks(torch.device("cuda" if torch.cuda.is_available() else "cpu"), TINY)


def test_the_gpu_kernels_pass() -> None:
    assert [result.detail for check in triton_checks() if (result := check.run()).status is not Status.PASSED] == []


@pytest.mark.parametrize(
    ("name", "index"), [("rope_and_write", 0), ("paged_decode", 1), ("paged_prefill", 2), ("sparse_decode", 3)]
)
def test_a_gpu_kernel_that_lies_is_found(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest_gpu, name, spoil_output(getattr(selftest_gpu, name)))
    assert triton_checks()[index].run().status is Status.FAILED


def test_a_gpu_without_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest_gpu.triton_guard, "triton", None)
    results = [check.run() for check in gpu_checks(torch.device("cpu"), TINY)]
    assert {result.status for result in results} == {Status.FAILED}
    assert "vashista[cuda]" in results[0].detail


def test_answers_are_read_as_they_were_written(answers: SelftestAnswers, tmp_path: Path) -> None:
    answers.save(tmp_path / FILE_NAME)
    assert SelftestAnswers.load(tmp_path / FILE_NAME) == answers
    assert all(len(known.token_ids) >= 4 for known in answers.known)
    assert any(known.is_chat for known in answers.known)
    assert "README.md" not in answers.files
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(answers.files)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d.update(version=9), "is of version 9; this program reads version 1"),
        (lambda d: d.pop("known"), "missing required field"),
        (lambda d: d.update(known=[]), "it holds no continuation"),
        (lambda d: d.update(files={"../x": ""}), "a file is not a plain name"),
        (lambda d: d["known"][0]["logprobs"].pop(), "tokens and log probabilities differ"),
        (lambda d: d["recall"].update(asked=["nobody"]), "a code asked is not there"),
    ],
)
def test_damaged_answers_are_refused(
    edit: Callable[[dict[str, Any]], Any], words: str, answers: SelftestAnswers, tmp_path: Path
) -> None:
    path = tmp_path / FILE_NAME
    data = json.loads(msgspec.json.encode(answers))
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(SelftestAnswersError, match=words):
        SelftestAnswers.load(path)


def test_answers_that_are_no_file_no_text_or_too_large_are_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with pytest.raises(SelftestAnswersError, match="does not exist"):
        SelftestAnswers.load(path)
    with pytest.raises(SelftestAnswersError, match="not a plain file"):
        SelftestAnswers.load(tmp_path)
    for data in (b"", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(SelftestAnswersError, match="does not hold known answers"):
            SelftestAnswers.load(path)
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(SelftestAnswersError, match="larger than"):
        SelftestAnswers.load(path)


def test_all_codes_are_in_the_passage_which_is_as_long_as_it_says(answers: SelftestAnswers) -> None:
    recall = answers.recall
    assert recall is not None
    tokenizer = Tokenizer.load(MODEL, load_model_config(MODEL).vocab_size)
    token_ids = hide_codes(tokenizer, read_sample_text(None), recall)
    text = tokenizer.decode(token_ids)
    places = [text.index(recall.needle.format(name=name, code=code)) for name, code in recall.codes.items()]
    assert places == sorted(places)
    assert 0.7 * NUM_PASSAGE_TOKENS < len(token_ids) <= NUM_PASSAGE_TOKENS
    with pytest.raises(SelftestModelError, match="are needed"):
        hide_codes(tokenizer, "A short text.", recall)


def test_the_bundled_model_ships_its_answers() -> None:
    shipped = SelftestAnswers.load(MODEL / FILE_NAME)
    assert shipped.recall is not None
    assert shipped.recall.num_tokens >= 8000
    assert sum(len(known.token_ids) for known in shipped.known) >= 64


def test_a_file_that_may_not_be_read_is_told_from_one_that_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SelftestModelError, match="cannot be read: Permission denied") as refused:
        digest_file(tmp_path / "config.json")
    assert "let the user who runs this read it" in refused.value.remedy


def test_a_model_without_its_support_profile_is_said_to_have_none(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = EngineConfig(model_dir=str(folder), device="cpu", dtype="float32", num_threads=1)
    assert "support profile" not in ModelTest(folder, 256, config).describe()
    (folder / "support_profile.json").unlink()
    assert "; no support profile" in ModelTest(folder, 256, config).describe()
