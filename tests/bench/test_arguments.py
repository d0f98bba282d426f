"""What the benchmarks of decoding refuse before they load a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "bench"
MODEL = str(FOLDER.parent / "deploy" / "models" / "reference-26m")
Scripts = Callable[[str], Any]
Refusal = Callable[[Callable[..., Any], list[str]], str]
FILE = (["--json", "/nowhere/x.json"], "/nowhere/x.json cannot be written")
CONTEXTS = (["--contexts", "few"], "'few' is no whole number")
REFUSED = {
    "sparse_cpu": [
        FILE,
        CONTEXTS,
        (["--contexts", "32768"], "contexts of [32816] tokens were asked for; 49 to 32768"),
        (["--modules", "dense"], "there is no dense; there are vashista, quest"),
        (["--budget", "64"], "64 was asked for; 96 and more"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--rounds", "0"], "0 was asked for; 1 and more"),
        (["--threads", "0"], "0 was asked for; 1 and more"),
        (["--model", "/nowhere"], "The model folder /nowhere does not exist"),
    ],
    "gpu_decode": [
        FILE,
        CONTEXTS,
        (["--model", MODEL, "--contexts", "32768"], "a context of 32768 tokens was asked for; the model takes 32704"),
        (["--model", "/nowhere"], "The model folder /nowhere does not exist"),
        (["--batches", "1,0"], "0 was asked for; 1 and more"),
        (["--layers", "0"], "0 was asked for; 1 and more"),
        (["--read-tbs", "0"], "0 was asked for; possible is 0.01 to 100"),
    ],
}


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [(script, *refused) for script, refusals in REFUSED.items() for refused in refusals],
)
def test_what_cannot_be_used_is_refused_with_what_can(
    script: str, arguments: list[str], words: str, scripts: Scripts, refusal: Refusal
) -> None:
    assert words in refusal(scripts(script).parse, arguments)


def test_the_defaults_can_be_used(scripts: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scripts("sparse_cpu").parse([]).contexts[-1] == 16000
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert scripts("gpu_decode").parse([]).contexts == [1024, 32000]


def test_without_a_gpu_the_random_model_can_be_made_and_nothing_timed(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert scripts("gpu_decode").parse(["--make", "model"]).make == Path("model")
    assert "sees none; --make needs none" in refusal(scripts("gpu_decode").parse, [])
