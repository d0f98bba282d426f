from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vashista.engine.model_config import load_model_config
from vashista.engine.work import GROUP_TOKENS, WorkModel, divide

MODEL = Path(__file__).parents[2] / "deploy" / "models" / "reference-26m"


@given(
    start=st.integers(0, 300),
    length=st.integers(1, 300),
    windows=st.lists(st.none() | st.integers(1, 400), min_size=1, max_size=4),
    num_kv_heads=st.integers(1, 4),
)
def test_dense_pairs_count_every_token_that_is_seen(start, length, windows, num_kv_heads):
    model = WorkModel(1.0, 1.0, 1.0, tuple((window, num_kv_heads) for window in windows))
    counted = sum(
        num_kv_heads * (position + 1 if window is None else min(position + 1, window))
        for window in windows
        for position in range(start, start + length)
    )
    assert model.dense_pairs(start, start + length) == counted


@given(st.floats(1e-9, 1e4), st.lists(st.floats(1e-3, 1e15), min_size=1, max_size=64))
def test_shares_add_up_and_keep_the_proportions(seconds, works):
    shares = divide(seconds, works)
    assert math.isclose(sum(shares), seconds, rel_tol=1e-12)
    for share, work in zip(shares, works, strict=True):
        assert math.isclose(share * sum(works), seconds * work, rel_tol=1e-9, abs_tol=1e-300)


def test_a_models_costs_follow_from_its_shape():
    config = load_model_config(MODEL)
    model = WorkModel.of(config)
    matrices = config.num_layers * (
        config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
        + 3 * config.hidden_size * config.intermediate_size
    )
    assert model.weights == matrices
    assert model.head == config.hidden_size * config.vocab_size
    assert model.pair == 2 * config.head_dim * config.num_heads / config.num_kv_heads
    assert sum(count for _, count in model.windows) == config.num_layers * config.num_kv_heads


def test_a_long_context_and_a_long_chunk_cost_more_and_a_sparse_token_less():
    model = WorkModel.of(load_model_config(MODEL))

    def token(position: int) -> float:
        return model.item(1, 1, model.dense_pairs(position, position + 1))

    assert token(100) < token(10000)
    chunk = model.item(512, 0, model.dense_pairs(0, 512))
    assert chunk > 400 * token(0) * (model.weights / (model.weights + model.head))
    visible = model.dense_pairs(9999, 10000)
    sparse = model.item(1, 1, model.sparse_pairs(visible // 32, visible))
    assert sparse < token(9999)
    assert model.sparse_pairs(0, 160) == 160 / GROUP_TOKENS


@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_a_single_item_takes_the_whole_step(seconds):
    assert divide(seconds, [3.0]) == [seconds]
