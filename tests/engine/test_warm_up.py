"""What is done before a GPU's engine is ready changes nothing that requests see; run on the CPU here."""

from pathlib import Path

import msgspec
import pytest
import tiny_models
import torch

from vashista.engine.attention import sparse_cpu
from vashista.engine.config import EngineConfig
from vashista.engine.engine import Engine
from vashista.engine.messages import DENSE, SamplingParams, Submit
from vashista.engine.model_config import load_model_config
from vashista.engine.runner import Runner
from vashista.engine.sampler import SamplingRow, sample
from vashista.engine.warm_up import CHOICES, _choose, warm_up


def make_config(folder: Path, **fields: object) -> EngineConfig:
    settings = {"page_size": 16, "num_threads": 1, "kv_cache_bytes": 16 << 20, "max_running_requests": 5} | fields
    return EngineConfig(model_dir=str(folder), device="cpu", **settings)  # type: ignore[arg-type]


def tokens(engine: Engine) -> list[int]:
    engine.submit(Submit("a", list(range(5, 90)), SamplingParams(seed=0, max_tokens=8), arrival_s=0.0, attention=DENSE))
    found: list[int] = []
    while engine.has_work:
        for event in engine.step():
            found += event.token_ids
    return found


def test_requests_get_after_it_what_they_get_without_it(tmp_path: Path) -> None:
    folder = tiny_models.build("llama", tmp_path, head_dim=64)
    cold, warm = (Engine(make_config(folder)) for _ in range(2))
    warm_up(warm._runner, 5)
    assert tokens(warm) == tokens(cold)
    assert len(tokens(cold)) == 8


def test_every_number_of_rows_is_run_densely_and_sparsely_with_and_without_a_head_that_keeps_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.build("llama", tmp_path, head_dim=64, max_position_embeddings=4096)
    config = make_config(folder, attention="vashista")
    runner = Runner(config, load_model_config(folder))
    seen = set()
    whole = set()
    begin = sparse_cpu.SparseCpuAttention.begin

    def spy(self: sparse_cpu.SparseCpuAttention, step: object, cos: object, sin: object) -> None:
        spans = step.spans  # type: ignore[attr-defined]
        seen.add((len(spans), spans[0].num_queries, spans[0].selection is not None))
        if spans[0].selection is not None:
            budgets = spans[0].selection.budgets
            whole.add((len(spans), int((budgets >= spans[0].context_len).sum()), int((budgets == 1024).sum())))
        begin(self, step, cos, sin)  # type: ignore[arg-type]

    monkeypatch.setattr(sparse_cpu.SparseCpuAttention, "begin", spy)
    warm_up(runner, 5)
    prompts = {(1, 2176, False), (1, 17, False)}
    assert seen == prompts | {(rows, 1, is_sparse) for rows in (1, 2, 4, 5) for is_sparse in (False, True)}
    num_heads = runner.attention_shape.num_layers * runner.attention_shape.num_kv_heads
    assert whole == {(rows, count, num_heads - count) for rows in (1, 2, 4, 5) for count in (0, 1)}


def test_tokens_are_chosen_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_models.build("llama", tmp_path, head_dim=64)
    runner = Runner(make_config(folder), load_model_config(folder))
    chosen: list[list[SamplingParams]] = []

    def spy(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
        chosen.append([row.sampling for row in rows])
        return sample(logits, rows)

    monkeypatch.setattr("vashista.engine.warm_up.sample", spy)
    warm_up(runner, 2)
    assert all([choice] in chosen for choice in CHOICES)
    assert list(CHOICES) in chosen
    fields = {name for choice in CHOICES for name, value in msgspec.structs.asdict(choice).items()
              if value != msgspec.structs.asdict(CHOICES[1])[name]}  # fmt: skip
    assert fields == {
        "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
        "logit_bias",
    }  # fmt: skip


def test_a_model_that_gives_nan_is_left_to_its_requests_errors() -> None:
    _choose(torch.full((1, 8), torch.nan))  # on a GPU an index of -1 would end the process's use of it


@pytest.mark.parametrize("context", [1, 2, 30])
def test_a_model_of_few_tokens_is_warmed_up_with_what_fits(tmp_path: Path, context: int) -> None:
    folder = tiny_models.build("llama", tmp_path, head_dim=64)
    config = make_config(folder, max_context=context)
    warm_up(Runner(config, load_model_config(folder)), 3)
