"""A task's prompt is as long as asked, holds what the answer needs, and is judged by whole words."""

from __future__ import annotations

import importlib
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vashista.engine.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "bench" / "quality"
MODEL = FOLDER.parents[1] / "deploy" / "models" / "reference-26m"
TASKS = (
    "single", "multi_key", "multi_value", "multi_query", "variable_tracking", "passkey", "copy", "common_words",
    "frequent_words",
)  # fmt: skip
NEEDLES = TASKS[:5]


@pytest.fixture(scope="module")
def quality() -> Iterator[SimpleNamespace]:
    """The suite's modules, imported as its scripts import them; nothing of them stays imported."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    names = ("haystack", "words", "task_parts", "tasks")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(FOLDER))
    for name in {path.stem for path in FOLDER.glob("*.py")} - before:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def count_tokens() -> Callable[[str], int]:
    tokenizer = Tokenizer.load(MODEL, 8192)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def haystack(quality: SimpleNamespace, count_tokens: Callable[[str], int]) -> Any:
    return quality.haystack.Haystack(quality.haystack.read_books()[:2], count_tokens)


@pytest.fixture
def draw(quality: SimpleNamespace, count_tokens: Callable[[str], int], haystack: Any) -> Callable[..., Any]:
    def make(task: str, num_tokens: int, seed: int = 1, **options: Any) -> Any:
        return quality.tasks.make_sample(task, num_tokens, random.Random(seed), haystack, count_tokens, **options)

    return make


def test_the_tasks_are_those_of_the_tests(quality: SimpleNamespace) -> None:
    assert set(quality.tasks.TASKS) == set(TASKS)


@pytest.mark.parametrize("num_tokens", [600, 2048])
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_is_nearly_as_long_as_asked_and_never_longer(
    draw: Callable[..., Any], count_tokens: Callable[[str], int], task: str, num_tokens: int
) -> None:
    for seed in range(3):
        sample = draw(task, num_tokens, seed)
        longest = max(count_tokens(sample.prompt), count_tokens(sample.user))
        assert longest <= num_tokens
        if task != "copy":  # ends with a whole paragraph
            assert longest > num_tokens * 0.93


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_scores_one_and_no_answer_nothing(
    draw: Callable[..., Any], quality: SimpleNamespace, count_tokens: Callable[[str], int], task: str
) -> None:
    sample = draw(task, 1024)
    score = quality.tasks.score
    assert score(sample, sample.completion) == score(sample, sample.reply) == 1
    assert score(sample, "") == 0
    assert 0 <= sample.chance < 0.3
    assert count_tokens(sample.reply) < sample.max_tokens


def test_a_score_is_the_share_of_answers_found_as_whole_words(
    draw: Callable[..., Any], quality: SimpleNamespace
) -> None:
    sample = draw("multi_query", 1024)
    assert quality.tasks.score(sample, f"{sample.answers[0]} and\n{sample.answers[2]}") == 0.5
    assert quality.tasks.score(sample, f"7{sample.answers[0]} {sample.answers[1]}7") == 0


@pytest.mark.parametrize("task", NEEDLES)
def test_each_answer_is_said_once_in_the_text_and_not_in_the_question(draw: Callable[..., Any], task: str) -> None:
    sample = draw(task, 1500)
    context, question, asked = sample.prompt.rpartition("\n\nQuestion: ")
    assert question
    for answer in sample.answers:
        in_text = [line for line in context.split("\n\n") if re.search(rf" is {answer}\.$", line)]
        assert len(in_text) == 1
        assert answer not in asked


def test_the_links_of_a_chain_lead_from_the_question_to_a_number(draw: Callable[..., Any]) -> None:
    sample = draw("variable_tracking", 1024)
    links = dict(re.findall(r"The value of (\w+) is (\w+)\.", sample.prompt))
    name = re.search(r"what is the value of (\w+)\?", sample.prompt)
    assert name is not None
    followed, value = [], name[1]
    while value in links:
        value = links[value]
        followed.append(value)
    assert tuple(followed) == sample.answers
    assert followed[-1].isdigit()


def test_common_words_are_there_far_more_often_than_any_other(draw: Callable[..., Any]) -> None:
    sample = draw("common_words", 2048)
    counts = Counter(sample.prompt.partition(".")[0].removeprefix("Words: ").split())
    common = {word for word, _ in counts.most_common(5)}
    assert common == set(sample.answers)
    assert min(counts[word] for word in common) >= 5 * max(counts[word] for word in counts if word not in common)


def test_frequent_words_are_asked_in_the_order_of_their_counts(draw: Callable[..., Any]) -> None:
    for num_tokens in (300, 2048):
        sample = draw("frequent_words", num_tokens)
        counts = Counter(sample.prompt.partition(".")[0].removeprefix("Words: ").split())
        first = counts.most_common(4)
        assert [word for word, _ in first[:3]] == list(sample.answers)
        assert len({count for _, count in first}) == 4


def test_a_passage_to_repeat_is_in_the_text_once_whole(draw: Callable[..., Any]) -> None:
    sample = draw("copy", 2048)
    context, _, given = sample.prompt.rpartition("\n\nQuestion: how does the passage go on? Answer: ")
    assert context.count(given + sample.completion) == 1


def test_the_same_seed_gives_the_same_sample_and_another_a_different_one(draw: Callable[..., Any]) -> None:
    assert draw("multi_key", 1024, 7) == draw("multi_key", 1024, 7) != draw("multi_key", 1024, 8)


def test_names_are_drawn_from_the_list_that_is_asked_for(draw: Callable[..., Any], quality: SimpleNamespace) -> None:
    words = quality.words
    for names in (words.EVALUATION_WORDS, words.HELD_OUT_WORDS, words.TRAINING_WORDS):
        assert len(set(names)) == len(names) >= 100  # multi_key draws 100
        assert set(draw("common_words", 1024, names=names).answers) <= set(names)
    assert set(draw("common_words", 1024).answers) <= set(words.EVALUATION_WORDS) <= set(words.TRAINING_WORDS)
    assert not set(words.HELD_OUT_WORDS) & set(words.TRAINING_WORDS)


def test_what_cannot_be_made_is_refused(draw: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="there is no task 'sums'"):
        draw("sums", 1024)
    with pytest.raises(ValueError, match="needles"):
        draw("multi_query", 64)
    with pytest.raises(ValueError, match="list of 60 words"):
        draw("common_words", 64)
    with pytest.raises(ValueError, match="no passage"):
        draw("copy", 40)


def test_clean_text_keeps_words_and_drops_marks(quality: SimpleNamespace) -> None:
    clean = quality.haystack.clean_text
    marked = "##  CHAPTER I\r\n\r\nWhy should _I_ want\u2014to?\u201d  \n\n\n* * *\n\n> **Yes**, 1833\\. snake_case"
    assert clean(marked) == 'CHAPTER I\n\nWhy should I want--to?"\n\nYes, 1833. snake_case'
