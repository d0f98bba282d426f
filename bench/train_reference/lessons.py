"""Texts that teach recall: a book's text with facts hidden between its paragraphs and questions about them later on.

A `Lesson` is built segment by segment; each segment's tokens share a weight in the loss. The sentences are those of the
suite's tasks (bench/quality/task_parts.py), with the training's words as names. `batches.py` draws lessons of a stage's
length; the share of each kind is its business.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import suite_path  # noqa: F401
import task_parts
from corpus import Corpus, Ids
from names import Names
from stages import ANSWER, LIST, PASSAGE, TEXT
from task_parts import Parts
from tasks import chat_question, reply_text
from tokenizer import ASSISTANT, BEGIN, CONTROL_TOKENS, END, USER
from tokenizers import Tokenizer

FRAME, FACT = 1.0, 0.0
"""Weights of the fixed words of questions, and of facts, which nobody can foresee; `stages.py` has the others."""
MIN_PASSAGE = task_parts.PASSAGE_START + task_parts.PASSAGE_REST
MIN_LIST = 256
SINGLE_LIST_SHARE = 0.55
"""Of the lessons with lists of words: one list alone."""


class Lesson:
    """Token ids with the weight that each has as a prediction; as long as it grows, cut off at the end."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self.ids: list[int] = []
        self.weights: list[float] = []

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, segment: str | Ids | list[int], weight: float) -> Lesson:
        """Append a text, or ids."""
        ids = self._encode(segment) if isinstance(segment, str) else [int(token) for token in segment]
        self.ids += ids
        self.weights += [weight] * len(ids)
        return self

    def control(self, token: str, weight: float = FRAME) -> Lesson:
        self.ids.append(CONTROL_TOKENS.index(token))
        self.weights.append(weight)
        return self


class Teacher:
    """Draws lessons out of a corpus; one a process."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self.corpus = corpus
        self._tokenizer = tokenizer
        self._books = [book for book in corpus.books if book.num_tokens > 4096]
        self._sizes = np.cumsum([book.num_tokens for book in self._books])
        (self.paragraph_end,) = self.encode("\n\n")
        self.names = Names(corpus, self.decode)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Ids) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def lesson(self) -> Lesson:
        return Lesson(self.encode)

    def book_text(self, num_tokens: int, rng: random.Random, from_paragraph: bool = False) -> Ids:
        """Consecutive tokens of one book, fewer where it ends; a long book is drawn more often."""
        book = self._books[int(np.searchsorted(self._sizes, rng.randrange(int(self._sizes[-1])), side="right"))]
        tokens = self.corpus.of(book)
        start = rng.randrange(max(1, len(tokens) - num_tokens))
        if from_paragraph:
            ends = np.flatnonzero(tokens[start : start + 2048] == self.paragraph_end)
            start += int(ends[0]) + 1 if len(ends) else 0
        return np.asarray(tokens[start : start + num_tokens])

    def paragraphs(self, num_tokens: int, rng: random.Random) -> list[Ids]:
        """Whole paragraphs of one book, each with the blank line after it, of about `num_tokens` tokens in all."""
        tokens = self.book_text(num_tokens, rng, from_paragraph=True)
        ends = np.flatnonzero(tokens == self.paragraph_end) + 1
        return [part for part in np.split(tokens, ends) if len(part) and part[-1] == self.paragraph_end]

    def plain(self, num_tokens: int, rng: random.Random) -> Lesson:
        """Book text alone."""
        lesson = self.lesson()
        if rng.random() < 0.5:
            lesson.control(BEGIN, 0.0)
        while len(lesson) < num_tokens:
            lesson.add(self.book_text(num_tokens - len(lesson), rng), TEXT)
            if len(lesson) < num_tokens:
                lesson.control(END).control(BEGIN, 0.0)
        return lesson

    def word_list(self, task: str, num_tokens: int, rng: random.Random) -> Lesson:
        """Lists of words, each with the question for its common or frequent ones; book text fills the rest.

        One list as long as the lesson, or several short ones: more answers in as many tokens.
        """
        lesson = self.lesson()
        in_chat = self._open(lesson, rng)
        is_single = rng.random() < SINGLE_LIST_SHARE
        longest = num_tokens if is_single else max(MIN_LIST, int(num_tokens ** rng.uniform(0.7, 0.95)))
        num_lists = 0
        while num_lists == 0 or (num_tokens - len(lesson) > MIN_LIST and not is_single):
            if num_lists and in_chat:
                lesson.control(USER, 0.0)
            elif num_lists:
                lesson.add("\n\n", FRAME)
            room = (min(longest, num_tokens - len(lesson)) - 64) * rng.uniform(0.75, 1.0)
            self._list_question(lesson, task, room, in_chat, rng)
            num_lists += 1
        return self._fill(lesson, num_tokens, rng)

    def _list_question(self, lesson: Lesson, task: str, room: float, in_chat: bool, rng: random.Random) -> None:
        """One list of about `room` tokens and its question."""
        make_counts = task_parts.common_counts if task == "common_words" else task_parts.frequent_counts
        names = self.names.draw(300, rng)
        counts = make_counts(max(60, int(room / 1.3)), rng, names, names)
        size = sum(count * len(self.encode(" " + word)) for word, count in counts.items())
        if size > room:
            counts = {word: max(1, int(count * room / size)) for word, count in counts.items()}
        parts = task_parts.list_question(task, counts, rng)
        lesson.add(task_parts.word_list(counts, rng), FACT)
        self._ask(lesson, parts, in_chat)

    def repeat(self, num_tokens: int, rng: random.Random) -> Lesson:
        """Book text whose passages come again, word for word: soon or much later, as they are or after a question."""
        lesson = self.lesson().control(BEGIN, 0.0)
        seen: list[Ids] = []
        for paragraph in self.paragraphs(num_tokens, rng):
            if len(lesson) >= num_tokens:
                break
            lesson.add(paragraph, TEXT)
            if len(paragraph) > 2 * task_parts.PASSAGE_START:
                seen.append(paragraph)
            while seen and rng.random() < 0.4:
                again = seen[-1 - int(len(seen) * rng.random() ** 2)]
                text = self.decode(again).strip()
                if rng.random() < 0.3 and "\n" not in text and len(text.split()) >= MIN_PASSAGE:
                    self._ask(lesson, task_parts.passage_question(text, rng), False, "")
                    lesson.add("\n\n", FRAME)
                    continue
                again = again[rng.randrange(len(again) // 2) :]
                lesson.add(again[: task_parts.PASSAGE_START], FACT).add(again[task_parts.PASSAGE_START :], PASSAGE)
        return self._fill(lesson, num_tokens, rng)

    def recall(self, num_tokens: int, rng: random.Random) -> Lesson:
        """Facts between paragraphs, questions later; in a chat, all questions are at the end, as turns."""
        lesson = self.lesson()
        in_chat = self._open(lesson, rng)
        questions = self._draw_facts(num_tokens, rng)
        needles = [(needle, index) for index, parts in enumerate(questions) for needle in parts.needles]
        cost = sum(len(self.encode(needle)) + 1 for needle, _ in needles)
        cost += sum(len(self.encode(parts.question + parts.prefix + parts.completion)) + 8 for parts in questions)
        if rng.random() < 0.08:
            noise = np.array(self.encode(task_parts.NOISE + "\n\n"), dtype=np.uint16)
            paragraphs, text_weight = [noise] * (max(0, num_tokens - cost - 16) // len(noise)), FACT
        else:
            paragraphs, text_weight = self.paragraphs(max(64, int((num_tokens - cost) * 0.97) - 16), rng), TEXT
        num_paragraphs = len(paragraphs)
        # A question's place is after its last needle; some are asked soon, some at the very end.
        facts_at: dict[int, list[str]] = {}
        last: dict[int, int] = {}
        for needle, index in needles:
            place = int(num_paragraphs * rng.random() ** 1.3)
            facts_at.setdefault(place, []).append(needle)
            last[index] = max(last.get(index, 0), place)
        asked_at: dict[int, list[Parts]] = {}
        for index, parts in enumerate(questions):
            first = last.get(index, 0) + 1
            place = num_paragraphs if in_chat or rng.random() < 0.4 else rng.randint(first, num_paragraphs + 1)
            asked_at.setdefault(min(place, num_paragraphs), []).append(parts)
        seen: list[Ids] = []
        for place in range(num_paragraphs + 1):
            rng.shuffle(facts_at.get(place, []))
            for needle in facts_at.get(place, []):
                lesson.add(needle + "\n\n", FACT)
            if place < num_paragraphs:
                lesson.add(paragraphs[place], text_weight)
                seen.append(paragraphs[place])
            if place < num_paragraphs and not in_chat:
                for parts in asked_at.get(place, []):
                    self._remind(lesson, parts, rng)
        final = asked_at.get(num_paragraphs, [])
        if text_weight == TEXT:
            final += self._passages(seen, num_tokens, rng)
        rng.shuffle(final)
        self._finish(lesson, final, in_chat, rng)
        return self._fill(lesson, num_tokens, rng)

    def _open(self, lesson: Lesson, rng: random.Random) -> bool:
        """Begin a text; True where it is a user's turn."""
        in_chat = rng.random() < 0.35
        if in_chat or rng.random() < 0.85:
            lesson.control(BEGIN, 0.0)
        if in_chat:
            lesson.control(USER, 0.0)
        return in_chat

    def _draw_facts(self, num_tokens: int, rng: random.Random) -> list[Parts]:
        """The questions of a lesson with their needles, as many as its length bears."""
        budget = max(3, min(130, round(6 * (num_tokens / 512) ** 0.8)))
        names = self.names.draw(40 + 5 * budget, rng)
        theme = rng.random()
        questions: list[Parts] = []
        num_facts = 0
        while num_facts < budget:
            kind = rng.random() if theme < 0.4 else (theme - 0.4) / 0.6
            if kind < 0.45:
                questions.append(task_parts.code_question(names.pop(), task_parts.code(rng)))
            elif kind < 0.6:
                pairs = [(names.pop(), task_parts.code(rng)) for _ in range(rng.choice((2, 3, 4, 4)))]
                questions.append(task_parts.query_question(pairs))
            elif kind < 0.78:
                name = names.pop()
                questions.append(task_parts.value_question(name, {name: [task_parts.code(rng) for _ in range(4)]}))
            else:
                length = 4 if num_tokens > 512 else rng.choice((1, 2, 3, 4, 4))
                chain = [names.pop() for _ in range(length)] + [task_parts.code(rng)]
                questions.append(task_parts.chain_question(chain))
            num_facts += len(questions[-1].needles)
        if rng.random() < 0.3:
            questions.append(task_parts.passkey(num_tokens, rng, ()))
        return questions

    def _remind(self, lesson: Lesson, parts: Parts, rng: random.Random) -> None:
        """Inside a text: the question, or the needle once more."""
        if rng.random() < 0.5:
            lesson.add(f"Question: {parts.question} Answer: {parts.prefix}", FRAME)
            add_answer(lesson, parts)
            lesson.add("\n\n", FRAME)
            return
        for needle in parts.needles:
            head, _, value = needle.removesuffix(".").rpartition(" ")
            if "Remember" in head:  # the pass key is said twice already
                continue
            lesson.add(head, FRAME).add(" " + value, ANSWER).add(".\n\n", FRAME)

    def _passages(self, seen: list[Ids], num_tokens: int, rng: random.Random) -> list[Parts]:
        """Passages of the text to repeat: one in 512 tokens at times, some twelve in 32,768."""
        wanted = int(num_tokens**0.5 / 14 + rng.random()) if rng.random() < 0.6 else 0
        found: list[Parts] = []
        for paragraph in rng.sample(seen, min(len(seen), 4 * wanted)):
            text = self.decode(paragraph).strip()
            if len(found) < wanted and "\n" not in text and len(text.split()) >= MIN_PASSAGE:
                found.append(task_parts.passage_question(text, rng))
        return found

    def _finish(self, lesson: Lesson, questions: list[Parts], in_chat: bool, rng: random.Random) -> None:
        if not in_chat:
            for index, parts in enumerate(questions):
                self._ask(lesson, parts, False, "" if index == 0 else "\n\n")
            return
        for index, parts in enumerate(questions):
            if index == 0:
                self._ask(lesson, parts, True, "")
            else:
                lesson.control(USER, 0.0).add(chat_question(parts), FACT)
                self._reply(lesson, parts)

    def _ask(self, lesson: Lesson, parts: Parts, in_chat: bool, before: str = "\n\n") -> None:
        if in_chat:
            lesson.add(before + chat_question(parts), FACT)
            self._reply(lesson, parts)
        else:
            lesson.add(f"{before}Question: {parts.question} Answer: {parts.prefix}", FRAME)
            add_answer(lesson, parts)

    def _reply(self, lesson: Lesson, parts: Parts) -> None:
        lesson.control(END, 0.0).control(ASSISTANT, 0.0)
        lesson.add(reply_text(parts).removesuffix(parts.completion), FRAME)
        add_answer(lesson, parts)
        lesson.control(END)

    def _fill(self, lesson: Lesson, num_tokens: int, rng: random.Random) -> Lesson:
        """Book text as a new text behind a lesson that is shorter than its sequence."""
        while len(lesson) < num_tokens:
            if lesson.ids[-1] != CONTROL_TOKENS.index(END):
                lesson.control(END)
            lesson.control(BEGIN, 0.0)
            lesson.add(self.book_text(num_tokens - len(lesson), rng, from_paragraph=True), TEXT)
        return lesson


def add_answer(lesson: Lesson, parts: Parts) -> None:
    """The completion: what the text must give weighs much, the words between little."""
    weight = PASSAGE if parts.chat_question else ANSWER if parts.needles else LIST
    rest = parts.completion
    for answer in sorted(parts.answers, key=lambda answer: rest.find(" " + answer)):
        before, found, after = rest.partition(" " + answer)
        lesson.add(before, FRAME).add(found, weight)
        rest = after
    lesson.add(rest, FRAME)
