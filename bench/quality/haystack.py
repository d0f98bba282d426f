"""Book text in which tasks hide what they ask for: clean paragraphs, and draws of so many tokens of them.

`tasks.py` draws from a `Haystack`; the suite fills it with the held-out books (books.jsonl.xz beside this file), the
training of the reference model with the books it trains on. `clean_text` gives both the same plain text.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

BOOKS = Path(__file__).with_name("books.jsonl.xz")
SEPARATOR = "\n\n"
_EDITS = (
    (re.compile("\r\n?"), "\n"),
    (re.compile("[\ufeff\u2060\u200a\u00ad]"), ""),
    (re.compile("\u00a0"), " "),
    (re.compile("[\u2018\u2019]"), "'"),
    (re.compile("[\u201c\u201d]"), '"'),
    (re.compile("\u2014"), "--"),
    (re.compile("&amp;"), "&"),
    (re.compile(r"(?m)^[ \t]*(?:[*_-][ \t]*){3,}$"), ""),  # rules between sections
    (re.compile(r"(?m)^[ \t]*(?:#+|>+)[ \t]*"), ""),  # headings, quotes
    (re.compile(r"\\([^\w\s])"), r"\1"),
    (re.compile(r"\*"), ""),
    (re.compile(r"(?<![^\W_])_+|_+(?![^\W_])"), ""),  # emphasis; an underscore inside a word stays
    (re.compile(r"[ \t]+"), " "),
    (re.compile(r" *\n *"), "\n"),
    (re.compile(r"\n{2,}"), SEPARATOR),
)


def clean_text(text: str) -> str:
    """The text without Markdown marks, with plain quotes, one blank line between paragraphs and no other space."""
    for pattern, replacement in _EDITS:
        text = pattern.sub(replacement, text)
    return text.strip()


def read_books(path: Path = BOOKS) -> list[str]:
    """The clean text of each book of a .jsonl.xz file."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [clean_text(json.loads(line)["text"]) for line in lines]


class Haystack:
    """Paragraphs of books, and how many tokens each has by one tokenizer."""

    def __init__(self, books: Iterable[str], count_tokens: Callable[[str], int]) -> None:
        """books: clean texts; `count_tokens` counts without tokens at the begin or end of a text."""
        self._books = [[part for part in book.split(SEPARATOR) if part] for book in books]
        self._counts: dict[tuple[int, int], int] = {}
        self._count_tokens = count_tokens
        self._separator = count_tokens("a" + SEPARATOR + "a") - 2 * count_tokens("a")
        if not any(self._books):
            raise ValueError("a haystack needs at least one paragraph")

    @property
    def separator_tokens(self) -> int:
        """Tokens of the blank line between two paragraphs."""
        return self._separator

    def draw(self, num_tokens: int, rng: random.Random) -> list[str]:
        """Consecutive paragraphs of at most `num_tokens` tokens in all, from a random place.

        The last one is cut off behind a word where less of it fits, so that the sum comes near; where a book ends, the
        next follows. Each counts with the blank line after it.
        """
        book = rng.randrange(len(self._books))
        place = rng.randrange(max(1, len(self._books[book])))
        chosen: list[str] = []
        room = num_tokens - self._separator
        while room > 0:
            while place >= len(self._books[book]):
                book, place = (book + 1) % len(self._books), 0
            paragraph, count = self._books[book][place], self._count(book, place)
            if count > room:
                chosen += self._cut(paragraph, room)
                break
            chosen.append(paragraph)
            room -= count + self._separator
            place += 1
        return chosen

    def _cut(self, paragraph: str, room: int) -> list[str]:
        """The paragraph's first words of at most `room` tokens, as a list that is empty if there are none."""
        words = paragraph.split(" ")
        low, high = 0, len(words)
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._count_tokens(" ".join(words[:middle])) <= room
            low, high = (middle, high) if fits else (low, middle)
        return [" ".join(words[:low])] if low else []

    def _count(self, book: int, place: int) -> int:
        key = (book, place)
        if key not in self._counts:
            self._counts[key] = self._count_tokens(self._books[book][place])
        return self._counts[key]
