"""What the scripts of the quality benchmark refuse before they load a model, and that what they allow can be done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vashista.engine.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "bench" / "quality"
MODEL = str(FOLDER.parents[1] / "deploy" / "models" / "reference-26m")
Scripts = Callable[[str], Any]
Refusal = Callable[[Callable[..., Any], list[str]], str]

MODEL_ARGUMENTS = [
    (["--model", "/nowhere"], "The model folder /nowhere does not exist"),
    (["--device", "cuda:99"], "device is 'cuda:99', but torch"),
    (["--device", "abacus"], "possible are auto, cpu, cuda and cuda:N"),
    (["--dtype", "float8"], "invalid choice: 'float8'"),
    (["--json", "/nowhere/x.json"], "/nowhere/x.json cannot be written"),
    (["--json", "/tmp"], "/tmp cannot be written"),
    (["--dev", "cpu"], "unrecognized arguments: --dev"),
]
PASSAGES = [
    (["--passages", "14"], "14 was asked for; 1 to 13 are possible"),
    (["--passages", "0"], "0 was asked for; 1 to 13"),
    (["--questions", "x"], "'x' is no whole number"),
    (["--questions", "1000"], "1000 was asked for; 1 to 31 are possible"),
    (["--budgets", "256,64"], "64 was asked for; 96 and more are possible"),
    (["--budgets", "256,256"], "256,256 names one of them twice"),
]
REFUSED = {
    "run": [
        *MODEL_ARGUMENTS,
        *PASSAGES,
        (["--contexts", "16384,65536"], "contexts of [65536] tokens were asked for; 768 to 32768 are possible"),
        (["--contexts", "1024", "--questions", "31"], "contexts of [1024] tokens were asked for; 2240 to"),
        (["--contexts="], "name one at least"),
        (["--modules", "vashista,magic"], "there is no magic; there are vashista, quest"),
        (["--modules="], "name one at least"),
        (["--masses", "0.03,1"], "1 was asked for; possible is 0.001 to below 1"),
        (["--masses", "few"], "'few' is no number"),
        (["--audit-rate", "2"], "2 was asked for; possible is 0 to 1"),
        (["--audit-rate", "nan"], "nan was asked for"),
    ],
    "rules": [
        *MODEL_ARGUMENTS,
        *PASSAGES,
        (["--context", "65536"], "contexts of [65536] tokens were asked for; 768 to 32768"),
        (["--context", "2048", "--scored", "2048"], "contexts of [2048] tokens were asked for; 2049 to"),
        (["--scored", "-1"], "-1 was asked for; 0 and more"),
        (["--only", "99"], "99 was asked for; 0 to"),
    ],
    "tail": [
        *MODEL_ARGUMENTS,
        (["--context", "65536"], "contexts of [65536] tokens were asked for; 256 to 32768"),
        (["--budget", "64"], "64 was asked for; 96 and more"),
        (["--counts", "riddle:4"], "there is no riddle; there are single"),
        (["--counts", "copy"], "'' is no whole number"),
        (["--counts", "copy:0"], "0 was asked for; 1 and more"),
        (["--counts", "loss:14"], "14 was asked for; 1 to 13"),
        (["--counts", "copy:1,copy:2"], "copy is named twice"),
        (["--scored", "0"], "0 was asked for; 1 and more"),
        (["--audited", "0"], "0 was asked for; 1 and more"),
        (["--batch", "0"], "0 was asked for; 1 and more"),
        (["--workers", "-1"], "-1 was asked for; 0 and more"),
        (["--threads", "0"], "0 was asked for; 1 and more"),
        (["--seconds", "-1"], "-1 was asked for; possible is 0 to inf"),
        (["--only", "-1"], "-1 was asked for; 0 to"),
    ],
}


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [(script, *refused) for script, refusals in REFUSED.items() for refused in refusals],
)
def test_what_cannot_be_used_is_refused_with_what_can(
    script: str, arguments: list[str], words: str, scripts: Scripts, refusal: Refusal
) -> None:
    assert words in refusal(scripts(script).parse, ["--model", MODEL, "--device", "cpu", *arguments])


@pytest.mark.parametrize("script", REFUSED)
def test_the_defaults_can_be_used(script: str, scripts: Scripts, tmp_path: Path) -> None:
    options = scripts(script).parse(["--model", MODEL, "--device", "cpu", "--json", str(tmp_path / "found.json")])
    assert options.json == tmp_path / "found.json"


def test_counts_keep_their_order(scripts: Scripts) -> None:
    options = scripts("tail").parse(["--model", MODEL, "--counts", "loss:2,copy:24"])
    assert list(options.counts.items()) == [("loss", 2), ("copy", 24)]


@pytest.mark.parametrize("num_questions", [1, 8, 31])
def test_the_shortest_context_has_room_for_the_codes(num_questions: int, scripts: Scripts) -> None:
    context = scripts("checks").least_context(num_questions, 0)
    tokenizer = Tokenizer.load(MODEL, 8192)
    for sequence in scripts("passages").recall_sequences(tokenizer, 13, context, num_questions, 64):
        assert len(sequence.token_ids) <= context
        name = tokenizer.decode(sequence.token_ids[sequence.start :]).split("the code of ")[-1].split(" ")[0]
        assert f"The code of {name} is " in tokenizer.decode(sequence.token_ids[: sequence.start])
