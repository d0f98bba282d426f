"""What the suite asks: samples of every task at a context length as tokens, and passages of books for the loss.

`suite.py` calls `make_questions` and `make_texts`; both are functions of the seed alone. Making samples is much
tokenising, so that it is spread over processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from haystack import SEPARATOR, Haystack, read_books
from tasks import Sample, make_sample

from vashista.engine.model_config import load_model_config
from vashista.engine.tokenizer import Tokenizer

ROOM_TOKENS = 128
"""Of a context, left for the answer and for tokens that begin a text."""
QUESTION = SEPARATOR + "Question: "


@dataclass(frozen=True)
class Question:
    """One sample as tokens."""

    context: int
    index: int
    sample: Sample
    token_ids: list[int]
    question_start: int
    """The first token of the question, give or take one."""


@dataclass(frozen=True)
class Text:
    """A passage of which the last tokens are judged by their loss."""

    context: int
    token_ids: list[int]
    num_scored: int


@dataclass(frozen=True)
class Maker:
    """Makes samples for one model."""

    tokenizer: Tokenizer
    haystack: Haystack

    @classmethod
    def load(cls, model: str) -> Maker:
        """From a model folder."""
        tokenizer = Tokenizer.load(model, load_model_config(model).vocab_size)
        return cls(tokenizer, Haystack(read_books(), partial(count_tokens, tokenizer)))

    def question(self, task: str, context: int, index: int, seed: int) -> Question:
        """The sample of this number. Raises ValueError for a context that is too short for the task."""
        rng = random.Random(f"{seed}/{task}/{context}/{index}")
        count = partial(count_tokens, self.tokenizer)
        try:
            sample = make_sample(task, context - ROOM_TOKENS, rng, self.haystack, count)
        except ValueError as error:
            raise ValueError(
                f"task {task}, {ROOM_TOKENS} tokens of the context kept for the answer: {error}"
            ) from error
        token_ids = self.tokenizer.encode(sample.prompt, add_special_tokens=True)
        asked = sample.prompt[sample.prompt.rindex(QUESTION) :]
        start = len(token_ids) - count_tokens(self.tokenizer, asked)
        if len(token_ids) + sample.max_tokens > context:
            raise ValueError(f"task {task}: a sample of {len(token_ids)} tokens leaves no room in {context}")
        return Question(context, index, sample, token_ids, start)


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def make_questions(
    model: str, tasks: Sequence[str], context: int, num_samples: int, seed: int, num_workers: int
) -> Iterator[Question]:
    """`num_samples` of each task; in this process for no workers."""
    wanted = [(task, context, index, seed) for task in tasks for index in range(num_samples)]
    if num_workers == 0:
        maker = Maker.load(model)
        yield from (maker.question(*each) for each in wanted)
        return
    with ProcessPoolExecutor(num_workers, get_context("spawn"), _start, (model,)) as pool:
        yield from pool.map(_make, wanted)


_makers: list[Maker] = []


def _start(model: str) -> None:
    _makers.append(Maker.load(model))


def _make(wanted: tuple[str, int, int, int]) -> Question:
    return _makers[0].question(*wanted)


def make_texts(model: str, context: int, num_texts: int, num_scored: int) -> list[Text]:
    """The first tokens of each held-out book, of the next one too where a book is too short."""
    tokenizer = Tokenizer.load(model, load_model_config(model).vocab_size)
    books = read_books()
    texts = []
    for index in range(min(num_texts, len(books))):
        token_ids = tokenizer.encode("", add_special_tokens=True)
        for book in books[index:] + books[:index]:
            if len(token_ids) >= context:
                break
            token_ids += tokenizer.encode(book + SEPARATOR, add_special_tokens=False)
        texts.append(Text(context, token_ids[:context], min(num_scored, context // 2)))
    return texts
