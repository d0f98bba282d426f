import argparse
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "engine_cpu"
MODEL = FOLDER.parents[1] / "deploy" / "models" / "reference-26m"


class FakeContest:
    """Contestants whose greedy tokens are given."""

    def __init__(self, tokens):
        self.options = argparse.Namespace(model_dir=str(MODEL), llama_python="python", rounds=3)
        self.vocab_size = 8192
        self.results = {}
        self._tokens = tokens

    def worker(self, name):
        return argparse.Namespace(ask=lambda operation, prompt, num_tokens: {"tokens": self._tokens[name]})


def test_contestants_that_agree_may_be_measured(scripts):
    names = ("transformers f32", "vashista f32", "llama.cpp f32")
    contest = FakeContest({name: [1, 2, 3] for name in names})
    assert scripts("run").check(contest) == []
    assert contest.results["check"]["contestants"] == list(names)


def test_a_contestant_with_other_tokens_is_named_with_the_first_of_them(scripts):
    tokens = {"transformers f32": [1, 2, 3], "vashista f32": [1, 2, 3], "llama.cpp f32": [1, 9, 3]}
    problems = scripts("run").check(FakeContest(tokens))
    assert len(problems) == 4
    assert all("llama.cpp f32 differs" in problem and "token 1 on" in problem for problem in problems)


def test_contestants_take_turns_and_the_first_round_does_not_count(scripts):
    calls = []

    def measure(name):
        def call():
            calls.append(name)
            return float(len(calls))

        return call

    values = scripts("contest").interleave(FakeContest({}), "x", {name: measure(name) for name in "ab"})
    assert "".join(calls) == "abbaabba"
    assert values == {"a": [4.0, 5.0, 8.0], "b": [3.0, 6.0, 7.0]}


def test_a_ratio_is_the_median_of_the_rounds_own_ratios(scripts):
    assert scripts("contest").ratio([1.0, 20.0, 3.0], [2.0, 10.0, 3.0]) == 1.0


def test_the_fastest_rival_decides_whether_a_target_is_met(scripts):
    def row(name, share, context=1024):
        return {"dtype": "f32", "name": name, "context": context, "ours_over_theirs": share}

    rows = [row("vashista f32", None), row("llama.cpp f32", 0.9), row("llama.cpp f32 flash", 0.7)]
    rows += [row("transformers f32", 0.1), row("llama.cpp f32", 0.2, context=4096)]
    (line,) = scripts("run").verdicts({"decode": rows})
    assert line.startswith("MISSED")
    assert "llama.cpp f32 flash: 0.70" in line
    lines = scripts("run").verdicts({"ready_s": [1.0, 5.1], "batch": [{"load": "x", "ours_over_theirs": 2.0}]})
    assert [line.split()[0] for line in lines] == ["met", "MISSED"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json", "/nowhere/x.json"], "/nowhere/x.json cannot be written"),
        (["--parts", "decode,lunch"], "there is no lunch; there are decode, batch, http, ready"),
        (["--contexts", "32768"], "contexts of [32832] tokens were asked for; 1 to 32768 are possible"),
        (["--rounds", "0"], "0 was asked for; 1 and more"),
        (["--model-dir", "/nowhere"], "The model folder /nowhere does not exist"),
        (["--llama-python", "/nowhere/python"], "/nowhere/python is no program that can be run"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_timed(scripts, arguments, words, refusal):
    assert words in refusal(scripts("run").parse, arguments)
    assert scripts("run").parse([]).parts == ["decode", "batch", "http", "ready"]
