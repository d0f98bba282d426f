"""The door to the long-context tasks: `make_sample` gives a prompt with its answers, `score` judges what was generated.

Nine tasks after RULER (Hsieh et al., arXiv 2404.06654), of our wording (`task_parts.py`). A prompt is a text of books
(`haystack.py`) with sentences hidden between its paragraphs, or a list of words, and a question with the begin of its
answer; the model continues it greedily. Each sample also has a chat form: the same question as a user's turn. Names
come from the lists of `words.py`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import task_parts
from haystack import SEPARATOR, Haystack
from task_parts import Parts
from words import EVALUATION_WORDS

NEEDLE_TASKS = ("single", "multi_key", "multi_value", "multi_query", "variable_tracking", "passkey")
PASSAGE_TASKS = ("copy",)
AGGREGATION_TASKS = ("common_words", "frequent_words")
TASKS = NEEDLE_TASKS + PASSAGE_TASKS + AGGREGATION_TASKS
SPARE_TOKENS = 8
"""Generated beyond the right answer, so that an answer with a word more is still read."""

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Sample:
    """One question about one text."""

    task: str
    prompt: str
    """To be continued: text, question and the begin of the answer."""
    answers: tuple[str, ...]
    chance: float
    """The score of guessing."""
    completion: str
    """What a perfect model generates after `prompt`."""
    user: str
    """The chat form: the content of the user's one turn."""
    reply: str
    """The chat form: what a perfect model replies."""
    max_tokens: int
    """As many tokens hold `reply`, and so `completion`, with some to spare."""


def make_sample(
    task: str,
    num_tokens: int,
    rng: random.Random,
    haystack: Haystack,
    count_tokens: CountTokens,
    names: Sequence[str] = EVALUATION_WORDS,
) -> Sample:
    """A sample whose prompt and user turn have at most `num_tokens` tokens, and few less.

    `count_tokens` counts without tokens at the begin or end of a text; leave room for those, for a chat's control
    tokens and for the answer. `names`: the words that the task's facts are about. ValueError for an unknown task or
    fewer tokens than the task needs.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    if task in AGGREGATION_TASKS:
        parts, context = _list_context(task, num_tokens, rng, count_tokens, names)
    elif task == "copy":
        parts, context = _copy_context(num_tokens, rng, haystack, count_tokens)
    else:
        parts = task_parts.BUILDERS[task](num_tokens, rng, names)
        context = _hidden_context(task, parts, num_tokens, rng, haystack, count_tokens)
    return render(task, context, parts, count_tokens)


def render(task: str, context: str, parts: Parts, count_tokens: CountTokens) -> Sample:
    """The sample that asks `parts` about the context."""
    reply = reply_text(parts)
    return Sample(
        task=task,
        prompt=context + plain_question(parts),
        answers=parts.answers,
        chance=parts.chance,
        completion=parts.completion,
        user=context + SEPARATOR + chat_question(parts),
        reply=reply,
        max_tokens=count_tokens(reply) + SPARE_TOKENS,
    )


def plain_question(parts: Parts) -> str:
    return f"{SEPARATOR}Question: {parts.question} Answer: {parts.prefix}"


def chat_question(parts: Parts) -> str:
    return capitalised(parts.chat_question or parts.question)


def reply_text(parts: Parts) -> str:
    """The answer as an assistant's turn; a passage keeps its small letter."""
    return (parts.prefix if parts.chat_question else capitalised(parts.prefix)) + parts.completion


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def score(sample: Sample, text: str) -> float:
    """The share of the answers found in the generated text, as whole words in any order: RULER's string match."""
    text = " ".join(text.split())
    found = [re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None for answer in sample.answers]
    return sum(found) / len(found)


def _room(parts: Parts, num_tokens: int, count_tokens: CountTokens) -> int:
    """Tokens left for the context beside the question, in the longer of the two forms; ValueError if none."""
    asked = max(count_tokens(plain_question(parts)), count_tokens(SEPARATOR + chat_question(parts)))
    if num_tokens <= asked:
        raise ValueError(f"{num_tokens} tokens do not hold the question alone, which has {asked}")
    return num_tokens - asked


def _hidden_context(
    task: str, parts: Parts, num_tokens: int, rng: random.Random, haystack: Haystack, count_tokens: CountTokens
) -> str:
    """The needles at random places between paragraphs."""
    separator = haystack.separator_tokens
    room = _room(parts, num_tokens, count_tokens)
    room -= sum(count_tokens(needle) + separator for needle in parts.needles)
    if room < 0:
        raise ValueError(f"{num_tokens} tokens do not hold the {len(parts.needles)} needles of task {task}")
    if task == "passkey":
        paragraphs = [task_parts.NOISE] * (room // (count_tokens(task_parts.NOISE) + separator))
    else:
        paragraphs = haystack.draw(room, rng)
    return SEPARATOR.join(hide(paragraphs, parts.needles, rng))


def hide(paragraphs: Sequence[str], needles: Sequence[str], rng: random.Random) -> list[str]:
    """The paragraphs in their order with the needles anywhere among them, in any order."""
    places = sorted(rng.randrange(len(paragraphs) + 1) for _ in needles)
    shuffled = rng.sample(list(needles), len(needles))
    mixed: list[str] = []
    done = 0
    for place, needle in zip(places, shuffled, strict=True):
        mixed += [*paragraphs[done:place], needle]
        done = place
    return mixed + list(paragraphs[done:])


def _copy_context(
    num_tokens: int, rng: random.Random, haystack: Haystack, count_tokens: CountTokens
) -> tuple[Parts, str]:
    """A text of which a passage is asked for again."""
    num_words = task_parts.PASSAGE_START + task_parts.PASSAGE_REST
    for _ in range(64):
        paragraphs = haystack.draw(num_tokens, rng)
        long_enough = [index for index, part in enumerate(paragraphs) if len(part.split()) >= num_words]
        if not long_enough:
            continue
        chosen = rng.choice(long_enough)
        parts = task_parts.passage_question(paragraphs[chosen], rng)
        # what the question takes is cut off at an end where the passage is not
        room = _room(parts, num_tokens, count_tokens)
        counts = [count_tokens(part) + haystack.separator_tokens for part in paragraphs]
        first, last = 0, len(paragraphs)
        while sum(counts[first:last]) > room and (chosen < last - 1 or first < chosen):
            if chosen < last - 1:
                last -= 1
            else:
                first += 1
        if sum(counts[first:last]) <= room:
            return parts, SEPARATOR.join(paragraphs[first:last])
    raise ValueError(f"{num_tokens} tokens hold no passage of {num_words} words")


def _list_context(
    task: str, num_tokens: int, rng: random.Random, count_tokens: CountTokens, names: Sequence[str]
) -> tuple[Parts, str]:
    """A list of words as long as fits; found by halving, each length with the same draws."""
    make_counts = task_parts.common_counts if task == "common_words" else task_parts.frequent_counts
    seed = rng.getrandbits(64)
    sizes: dict[str, int] = {}

    def size(word: str) -> int:
        if word not in sizes:
            sizes[word] = count_tokens(" " + word)
        return sizes[word]

    def draw(num_words: int) -> tuple[dict[str, int], Parts, int]:
        counts = make_counts(num_words, random.Random(seed), names)
        parts = task_parts.list_question(task, counts, random.Random(seed + 1))
        used = sum(count * size(word) for word, count in counts.items()) + count_tokens("Words:") + count_tokens(".")
        return counts, parts, _room(parts, num_tokens, count_tokens) - used

    low, high = 60, num_tokens
    if draw(low)[2] < 0:
        raise ValueError(f"{num_tokens} tokens do not hold a list of {low} words")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if draw(middle)[2] >= 0 else (low, middle)
    counts, parts, _ = draw(low)
    return parts, task_parts.word_list(counts, rng)
