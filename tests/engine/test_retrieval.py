"""Retrieval heads: found by what they attend to when a passage is read again."""

import pytest
import torch

from vashista.engine.attention.capture import Captured
from vashista.engine.retrieval import MAX_POSITIONS, MAX_TOKENS, RepeatedPassage, RetrievalTaker


@pytest.mark.parametrize("num_tokens", [4, 16, 321, 4096, 10_000])
def test_every_position_reads_what_was_read_before(num_tokens: int) -> None:
    passage = RepeatedPassage(range(num_tokens))
    tokens = passage.token_ids
    assert len(tokens) == min(num_tokens, MAX_TOKENS)
    assert 1 <= len(passage.positions) <= 2 * MAX_POSITIONS
    for position in passage.positions:
        assert tokens[position] == tokens[position - passage.distance]
        assert position + 1 - passage.distance < len(tokens) - len(tokens) // 4  # what comes next was read before, too


def test_a_text_too_short_to_repeat_has_no_positions() -> None:
    assert list(RepeatedPassage([1, 2, 3]).positions) == []


def seen(keys: torch.Tensor, position: int, first: int = 0, layer: int = 0) -> Captured:
    return Captured(layer=layer, position=position, first=first, query=torch.ones(4, 8), keys=keys, values=keys)


def test_the_mass_is_that_of_the_token_that_came_next_and_of_the_best_head_of_a_group() -> None:
    passage = RepeatedPassage(range(64))
    taker = RetrievalTaker(1, 2, scale=1.0)
    taker.start(passage)
    position = passage.positions[0]
    keys = torch.zeros(2, position + 1, 8)
    keys[1, position + 1 - passage.distance] = 10.0
    taker.observe(seen(keys, position))
    assert taker.mass() == [[pytest.approx(1 / (position + 1), abs=1e-4), 1.0]]


def test_masses_are_means_over_positions_and_a_window_that_ends_before_counts_as_none() -> None:
    passage = RepeatedPassage(range(64))
    taker = RetrievalTaker(1, 1, scale=1.0)
    taker.start(passage)
    position, other = passage.positions[0], passage.positions[1]
    keys = torch.zeros(1, position + 1, 8)
    keys[0, position + 1 - passage.distance] = 10.0
    taker.observe(seen(keys, position))
    taker.observe(seen(keys[:, -8:], other, first=other - 7))
    assert taker.mass() == [[0.5]]


def test_a_layer_that_was_never_seen_retrieves_nothing() -> None:
    assert RetrievalTaker(2, 2, scale=1.0).mass() == [[0.0, 0.0], [0.0, 0.0]]
