"""Every architecture against transformers: logits in any chunks, long greedy outputs, and the bundled model."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from vashista.engine.config import EngineConfig
from vashista.engine.engine import Engine
from vashista.engine.messages import SamplingParams, Submit
from vashista.engine.model_config import ARCHITECTURES, load_model_config
from vashista.engine.models.registry import MODELS
from vashista.engine.pages import PageAllocator, root_hash
from vashista.engine.request import Request
from vashista.engine.runner import Runner
from vashista.engine.scheduler import Scheduler
from vashista.kernels.cpu import library as cpu_library

NUM_TOKENS = 150
"""More than every window (40), every original context (128), and not a multiple of a page (16)."""


def random_ids(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, tiny_models.VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


@pytest.fixture(scope="module", params=sorted(tiny_models.KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tiny_models.build(request.param, tmp_path_factory.mktemp("model"))
    return folder, tiny_models.reference(folder)


def compute_logits(runner: Runner, ids: list[int], chunk: int) -> torch.Tensor:
    """Logits of all positions, computed `chunk` tokens at a time."""
    scheduler = Scheduler(PageAllocator(runner.num_pages), page_size=16, max_running_requests=1, max_batch_tokens=chunk)
    request = Request(Submit("a", ids, SamplingParams(seed=0, max_tokens=1), 0.0), root_hash("model"))
    scheduler.add(request)
    parts = []
    while request.num_computed_tokens < len(ids):
        batch = scheduler.schedule()
        parts.append(runner.logits(runner.execute(batch, lambda _: True).hidden))
        scheduler.complete(batch)
    return torch.cat(parts).cpu()


@pytest.mark.parametrize("chunk", [1, 7, 16, 17, 64, 512])
def test_logits_equal_those_of_transformers_in_any_chunks(model: tuple[Path, Any], chunk: int) -> None:
    folder, reference = model
    config = EngineConfig(model_dir=str(folder), page_size=16, num_threads=1, kv_cache_bytes=8 << 20)
    ids = random_ids(NUM_TOKENS)
    logits = compute_logits(Runner(config, load_model_config(folder)), ids, chunk)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
        exact = reference.double()(torch.tensor([ids])).logits[0]
        reference.float()
    assert expected.std() > 0.5, "flat logits would hide errors"
    # Weights drawn wide amplify rounding: where transformers itself is off by more than 5e-5, twice that is allowed.
    limit = max(1e-4, 2 * (expected - exact).abs().max().item())
    assert (logits - exact).abs().max().item() <= limit


@pytest.mark.parametrize("is_tied", [True, False])
def test_float32_products_of_a_bfloat16_checkpoint_keep_it_and_are_those_of_transformers(
    is_tied: bool, tmp_path: Path
) -> None:
    folder = tiny_models.build("qwen2-window", tmp_path, dtype=torch.bfloat16, tie_word_embeddings=is_tied)
    config = EngineConfig(
        model_dir=str(folder), device="cpu", dtype="float32", page_size=16, num_threads=1, kv_cache_bytes=8 << 20
    )
    runner, ids = Runner(config, load_model_config(folder)), random_ids(NUM_TOKENS)
    if cpu_library.load() is not None:
        products = [*runner.model.layers[0].products, runner.model.lm_head]
        assert {product._row_major.dtype for product in products} == {torch.bfloat16}
    with torch.inference_mode():
        expected = tiny_models.reference(folder)(torch.tensor([ids])).logits[0]
    for chunk in (7, 512):  # few rows, and more than the compiled kernels take
        assert (compute_logits(runner, ids, chunk) - expected).abs().max().item() <= 1e-4 * expected.std().item() + 1e-4


def greedy(engine: Engine, ids: list[int], num_tokens: int) -> list[int]:
    sampling = SamplingParams(seed=0, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    engine.submit(Submit("a", ids, sampling, 0.0))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for event in engine.step() for token in event.token_ids]
    return tokens


def reference_greedy(model: Any, ids: list[int], num_tokens: int) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def test_256_greedy_tokens_equal_those_of_transformers(model: tuple[Path, Any]) -> None:
    folder, reference = model
    engine = Engine(EngineConfig(model_dir=str(folder), page_size=16, num_threads=1, kv_cache_bytes=8 << 20))
    ids = random_ids(30, seed=1)
    assert greedy(engine, ids, 256) == reference_greedy(reference, ids, 256)


PROMPTS = [
    "It was a dark and stormy night, and the old captain",
    "The code of elephant is 48213. Question: what is the code of elephant? Answer: the code of elephant is ",
    "CHAPTER I\r\n\r\nIn the year 1815 M. Charles",
    "“Ah,” said the doctor — quietly —",
    "x",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_bundled_model_says_what_transformers_says(prompt: str, bundled: tuple[Engine, Any]) -> None:
    engine, reference = bundled
    ids = engine._tokenizer.encode(prompt)
    assert greedy(engine, ids, 256) == reference_greedy(reference, ids, 256)


@pytest.fixture(scope="module")
def bundled() -> tuple[Engine, Any]:
    folder = Path(__file__).parents[2] / "deploy" / "models" / "reference-26m"
    config = EngineConfig(model_dir=str(folder), dtype="float32", kv_cache_bytes=64 << 20)
    return Engine(config), tiny_models.reference(folder)


def test_half_precision_stays_close_to_single(tmp_path: Path) -> None:
    folder = tiny_models.build("qwen3", tmp_path)
    ids = random_ids(NUM_TOKENS)
    logits = {}
    for dtype in ("float32", "bfloat16", "float16"):
        config = EngineConfig(model_dir=str(folder), dtype=dtype, page_size=16, num_threads=1, kv_cache_bytes=8 << 20)
        logits[dtype] = compute_logits(Runner(config, load_model_config(folder)), ids, 64)
    norm = logits["float32"].norm()
    assert (logits["bfloat16"] - logits["float32"]).norm() / norm < 0.06
    assert (logits["float16"] - logits["float32"]).norm() / norm < 0.01


def test_every_architecture_that_is_parsed_has_a_model() -> None:
    assert set(ARCHITECTURES) == set(MODELS)
