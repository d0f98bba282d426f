"""The quality benchmark asks what its passages hold, and its player's sparse result at full budget is the dense one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vashista.engine.attention.policy import PolicyOptions
from vashista.engine.config import EngineConfig
from vashista.engine.messages import DENSE, AttentionMode
from vashista.engine.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "bench" / "quality"
MODEL = FOLDER.parents[1] / "deploy" / "models" / "reference-26m"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL, 8192)


def test_a_question_asks_for_a_code_that_the_passage_holds_once(
    tokenizer: Tokenizer, scripts: Callable[[str], Any]
) -> None:
    sequences = scripts("passages").recall_sequences(tokenizer, 2, 1024, 3, 64)
    assert len(sequences) == 6
    for sequence in sequences:
        assert sequence.start % 64 == 0
        assert sequence.scored == 5
        text = tokenizer.decode(sequence.token_ids[: sequence.start], skip_special_tokens=False)
        question = tokenizer.decode(sequence.token_ids[sequence.start :], skip_special_tokens=False)
        name, code = question.split("the code of ")[1].split("?")[0], question.split()[-1]
        assert text.count(f"The code of {name} is {code}.") == 1
        assert text.count("The code of ") == 6


def test_a_passage_longer_than_the_books_is_refused(tokenizer: Tokenizer, scripts: Callable[[str], Any]) -> None:
    with pytest.raises(SystemExit, match="the books give"):
        scripts("passages").text_sequences(tokenizer, 1, 10**6, 8)


@pytest.mark.parametrize("module", ["player.Player", "suite_player.SuitePlayer"])
def test_players_steer_by_what_the_engine_would(module: str, scripts: Callable[[str], Any]) -> None:
    """Quest's scores say nothing of the mass, so that its budgets follow the audits alone."""
    name, kind = module.split(".")
    for attention, has_estimates in (("quest", False), ("vashista", True)):
        config = EngineConfig(
            model_dir=str(MODEL), device="cpu", attention=attention, num_threads=1, kv_cache_bytes=8 << 20
        )
        player = getattr(scripts(name), kind)(config, audit_rate=0.5)
        assert player._policy.options == PolicyOptions(0.5, dense_below=0, has_estimates=has_estimates)


def test_a_budget_that_covers_the_context_scores_as_dense_does(
    tokenizer: Tokenizer, scripts: Callable[[str], Any]
) -> None:
    config = EngineConfig(model_dir=str(MODEL), device="cpu", num_threads=1, max_context=512, kv_cache_bytes=64 << 20)
    player = scripts("player").Player(config, audit_rate=1.0)
    sequences = scripts("passages").text_sequences(tokenizer, 2, 512, 64)
    player.read(sequences, lambda num_tokens: None)
    dense, nothing = player.play(sequences, DENSE)
    covered, report = player.play(sequences, AttentionMode(token_budget=1024))
    assert nothing is None
    assert report is None
    assert all(torch.equal(a, b) for a, b in zip(dense, covered, strict=True))
    sparse, report = player.play(sequences, AttentionMode(token_budget=96))
    assert report is not None
    assert report.audit is not None
    assert 0 < report.audit.dropped_mass < 1
    assert not torch.equal(dense[0], sparse[0])
