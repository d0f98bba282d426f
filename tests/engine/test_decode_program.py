"""A decode step as one program: the bits of the layers one by one, for every architecture and attention module."""

from pathlib import Path

import pytest
import tiny_models
import torch

from vashista.engine.config import EngineConfig
from vashista.engine.model_config import load_model_config
from vashista.engine.models.decode_program import DecodeProgram
from vashista.engine.runner import Runner
from vashista.engine.step import Selection, Span, StepInput

CONTEXTS = [90, 1, 33, 64, 57]
PAGE = 16


@pytest.fixture(scope="module", params=sorted(tiny_models.KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build(request.param, tmp_path_factory.mktemp("model"))


def make_runner(folder: Path, attention: str, dtype: str = "float32") -> Runner:
    config = EngineConfig(
        model_dir=str(folder), page_size=PAGE, num_threads=2, kv_cache_bytes=8 << 20, attention=attention, dtype=dtype,
        device="cpu",
    )  # fmt: skip
    return Runner(config, load_model_config(folder))


def pages_of(index: int) -> list[int]:
    return list(range(8 * index, 8 * index + 8))


def fill(runner: Runner) -> None:
    """Write each request's tokens but the last."""
    for index, context in enumerate(CONTEXTS):
        if context > 1:
            run(runner, [Span(0, context - 1, context - 1, pages_of(index))], seed=index)


def run(runner: Runner, spans: list[Span], seed: int) -> torch.Tensor:
    num_tokens = sum(span.num_queries for span in spans)
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(1, tiny_models.VOCAB_SIZE, (num_tokens,), generator=generator)
    positions = torch.cat([torch.arange(span.start, span.context_len) for span in spans])
    step = StepInput(token_ids, positions, spans, torch.arange(num_tokens))
    hidden = runner.model.forward(step, runner.attention)
    runner.attention.take_support()
    return hidden


def decode(runner: Runner, which: list[int], audits: list[tuple[int, int]] | None = None) -> torch.Tensor:
    """One step of single queries; with audits, these and small budgets."""
    spans = []
    for row, index in enumerate(which):
        selection = None
        if audits is not None:
            shape = runner.attention_shape
            selection = Selection(torch.full((shape.num_layers, shape.num_kv_heads), 96, dtype=torch.int32), audits)
        spans.append(Span(row, 1, CONTEXTS[index], pages_of(index), selection))
    return run(runner, spans, seed=99)


def without_program(runner: Runner) -> Runner:
    runner.model._program = None
    return runner


@pytest.mark.parametrize("attention", ["dense", "vashista"])
def test_a_program_has_the_bits_of_the_layers(folder: Path, attention: str) -> None:
    layers, program = without_program(make_runner(folder, attention)), make_runner(folder, attention)
    assert isinstance(program.model._program, DecodeProgram)
    for runner in (layers, program):
        fill(runner)
    for which in ([0, 1, 2, 3, 4], [2], [4, 0]):
        assert torch.equal(decode(program, which), decode(layers, which))
    for layer in range(layers.attention_shape.num_layers):
        for ours, theirs in zip(
            program.attention.read_cache(layer, pages_of(0), CONTEXTS[0]),
            layers.attention.read_cache(layer, pages_of(0), CONTEXTS[0]),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_bfloat16_runs_as_a_program_too(tmp_path: Path) -> None:
    folder = tiny_models.build("qwen3", tmp_path)
    layers, program = (
        without_program(make_runner(folder, "vashista", "bfloat16")),
        make_runner(folder, "vashista", "bfloat16"),
    )
    for runner in (layers, program):
        fill(runner)
    assert torch.equal(decode(program, [0, 2]), decode(layers, [0, 2]))


def test_a_step_that_is_audited_goes_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(tiny_models.build("llama", tmp_path), "vashista")
    fill(runner)
    runs = []
    original = DecodeProgram.run
    monkeypatch.setattr(DecodeProgram, "run", lambda self, ids: runs.append(len(ids)) or original(self, ids))
    plain = decode(runner, [0, 3], audits=[])
    assert runs == [2]
    assert torch.equal(decode(runner, [0, 3], audits=[(1, 1)]), plain)
    assert runs == [2]


def test_steps_that_no_program_serves_go_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(tiny_models.build("llama", tmp_path), "dense")
    fill(runner)

    def refuse(self: DecodeProgram, token_ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the program ran")

    monkeypatch.setattr(DecodeProgram, "run", refuse)
    run(runner, [Span(0, 1, 90, pages_of(0)), Span(1, 3, 33, pages_of(2))], seed=1)
    run(runner, [Span(row, 1, 1, [row]) for row in range(65)], seed=2)
    with pytest.raises(AssertionError, match="the program ran"):
        run(runner, [Span(row, 1, 1, [row]) for row in range(64)], seed=2)
