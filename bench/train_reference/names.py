"""The names of facts in lessons: the training's word list, and any word of the books.

Names out of a short list are learned as single tokens; a word that was never a name is then misspelled (`glacier`
becomes `glacial`). Names out of all words of the books teach to copy what is written, token by token. `lessons.py`
draws from here.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

import suite_path  # noqa: F401
from corpus import Corpus, Ids
from words import HELD_OUT_WORDS, TRAINING_WORDS

_SAMPLE_TOKENS = 2_000_000
_CHUNKS = 200
_WORD = re.compile(r"(?<![\w'-])[a-z]{4,12}(?![\w'-])")
_LEAST_COUNT = 2
LISTED_SHARE = 0.35
"""Of the lessons: names of the training's list alone; the others draw from the words of the books too."""


class Names:
    """Draws the names of one lesson at a time; the same words in every worker."""

    def __init__(self, corpus: Corpus, decode: Callable[[Ids], str]) -> None:
        counts: Counter[str] = Counter()
        step = max(1, len(corpus.tokens) // _CHUNKS)
        for start in range(0, len(corpus.tokens), step):
            counts.update(_WORD.findall(decode(corpus.tokens[start : start + _SAMPLE_TOKENS // _CHUNKS])))
        listed = set(TRAINING_WORDS)
        spared = set(HELD_OUT_WORDS)
        found = sorted(word for word, count in counts.items() if count >= _LEAST_COUNT)
        self.words = (*TRAINING_WORDS, *(word for word in found if word not in spared and word not in listed))
        """No held-out word is among them."""

    def draw(self, number: int, rng: random.Random) -> list[str]:
        """So many different names, from the list or from all words."""
        pool = TRAINING_WORDS if rng.random() < LISTED_SHARE else self.words
        return rng.sample(pool, min(number, len(pool)))
