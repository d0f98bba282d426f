"""What each task hides and asks: the fixed sentences, the names and numbers drawn for them, and the right answer.

`tasks.py` asks for the `Parts` of one task and builds the prompt around them; the training of the reference model asks
the same sentences many times over in one text. After the tasks of RULER (Hsieh et al., arXiv 2404.06654), with wording
of our own: short, the same every time, and with each name behind a space, so that a small model can learn it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from words import TRAINING_WORDS

NUM_DIGITS = 5
ORDINALS = ("first", "second", "third", "fourth")
NUM_LINKS = 4
NUM_CHAINS = 3
NUM_COMMON, COMMON_TIMES = 5, 10
"""Common words, and how often each is there for once that any other is."""
NUM_FREQUENT = 3
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PASSAGE_START, PASSAGE_REST, PASSAGE_STEP = 12, 16, 4
"""Words of a passage that are given, that are to follow, and that count as one answer."""


@dataclass(frozen=True)
class Parts:
    """One question and what its text must hold. `prefix + completion` is the whole answer."""

    needles: tuple[str, ...]
    """Sentences to hide, each a paragraph of its own."""
    question: str
    prefix: str
    completion: str
    answers: tuple[str, ...]
    chance: float = 0.0
    """The score of guessing among what the prompt names."""
    chat_question: str = ""
    """The question as a user's turn, where it is not `question`."""


def code(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=NUM_DIGITS))


def code_needle(name: str, value: str) -> str:
    return f"The code of {name} is {value}."


def code_question(name: str, value: str, others: Sequence[tuple[str, str]] = ()) -> Parts:
    """One code asked for, the others there to be confused with."""
    needles = tuple(code_needle(*pair) for pair in ((name, value), *others))
    return Parts(needles, f"what is the code of {name}?", f"the code of {name} is", f" {value}.", (value,))


def single(num_tokens: int, rng: random.Random, names: Sequence[str]) -> Parts:
    """One code hidden, one asked for."""
    return code_question(rng.choice(names), code(rng))


def multi_key(num_tokens: int, rng: random.Random, names: Sequence[str]) -> Parts:
    """One code hidden every 128 tokens, at least 4 and at most 100; one asked for."""
    num_keys = min(100, max(4, num_tokens // 128))
    pairs = [(name, code(rng)) for name in rng.sample(names, num_keys)]
    return code_question(*pairs[0], pairs[1:])


def multi_value(num_tokens: int, rng: random.Random, names: Sequence[str]) -> Parts:
    """A name with four numbered codes, all asked for, and three other names with as many."""
    asked, *others = rng.sample(names, 4)
    codes = {name: [code(rng) for _ in ORDINALS] for name in (asked, *others)}
    return value_question(asked, codes)


def value_question(asked: str, codes: dict[str, list[str]]) -> Parts:
    needles = tuple(
        f"The {ordinal} code of {name} is {value}."
        for name, values in codes.items()
        for ordinal, value in zip(ORDINALS, values, strict=True)
    )
    facts = [f"the {ordinal} code of {asked} is {value}" for ordinal, value in zip(ORDINALS, codes[asked], strict=True)]
    prefix = f"the {ORDINALS[0]} code of {asked} is"
    return Parts(
        needles,
        f"what are the codes of {asked}?",
        prefix,
        ", ".join(facts).removeprefix(prefix) + ".",
        tuple(codes[asked]),
    )


def multi_query(num_tokens: int, rng: random.Random, names: Sequence[str]) -> Parts:
    """Sixteen codes hidden, four asked for."""
    pairs = [(name, code(rng)) for name in rng.sample(names, 16)]
    return query_question(pairs[:4], pairs[4:])


def query_question(asked: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]] = ()) -> Parts:
    asked_names = [name for name, _ in asked]
    prefix = f"the code of {asked_names[0]} is"
    facts = [f"the code of {name} is {value}" for name, value in asked]
    return Parts(
        tuple(code_needle(*pair) for pair in (*asked, *others)),
        f"what are the codes of {', '.join(asked_names[:-1])} and {asked_names[-1]}?",
        prefix,
        ", ".join(facts).removeprefix(prefix) + ".",
        tuple(value for _, value in asked),
    )


def variable_tracking(num_tokens: int, rng: random.Random, names: Sequence[str]) -> Parts:
    """Three chains of four links; one is to be followed to its number."""
    drawn = rng.sample(names, NUM_LINKS * NUM_CHAINS)
    chains = [[*drawn[start : start + NUM_LINKS], code(rng)] for start in range(0, len(drawn), NUM_LINKS)]
    return chain_question(chains[0], chains[1:])


def chain_question(chain: Sequence[str], others: Sequence[Sequence[str]] = ()) -> Parts:
    """A chain: names, each with the value of the next, the last with a number."""
    links = [link for chain in (chain, *others) for link in pairwise(chain)]
    prefix = f"the value of {chain[0]} is"
    facts = [f"the value of {left} is {right}" for left, right in pairwise(chain)]
    return Parts(
        tuple(f"The value of {left} is {right}." for left, right in links),
        f"what is the value of {chain[0]}?",
        prefix,
        ", ".join(facts).removeprefix(prefix) + ".",
        tuple(chain[1:]),
        (NUM_LINKS - 1) / NUM_LINKS / (NUM_LINKS * NUM_CHAINS),
    )


def passkey(num_tokens: int, rng: random.Random, names: Sequence[str]) -> Parts:
    """A number hidden in one paragraph said over and over."""
    value = code(rng)
    needle = f"The pass key is {value}. Remember it. The pass key is {value}."
    return Parts((needle,), "what is the pass key?", "the pass key is", f" {value}.", (value,))


def common_counts(
    num_words: int, rng: random.Random, names: Sequence[str], others: Sequence[str] = TRAINING_WORDS
) -> dict[str, int]:
    """How often each word is there: five common `names`, ten times as often as each of up to 200 `others`."""
    pool = max(10, min(200, num_words // 15))
    common = rng.sample(names, NUM_COMMON)
    rare = rng.sample([word for word in others if word not in set(common)], pool)
    times = max(1.0, num_words / (pool + NUM_COMMON * COMMON_TIMES))
    return {word: round(times * COMMON_TIMES) for word in common} | {word: round(times) for word in rare}


def frequent_counts(
    num_words: int, rng: random.Random, names: Sequence[str], others: Sequence[str] = TRAINING_WORDS
) -> dict[str, int]:
    """How often each word is there: the word of rank r in proportion to 1/r^2, as in RULER; 100 ranks at most."""
    top = rng.sample(names, NUM_FREQUENT)
    rest = rng.sample([word for word in others if word not in set(top)], 100 - NUM_FREQUENT)
    counts = {}
    for rank, word in enumerate([*top, *rest], start=1):
        count = round(num_words * 0.61 / rank**2)
        if count or rank <= NUM_FREQUENT + 1:
            counts[word] = max(count, NUM_FREQUENT + 2 - rank, 1)
    return counts


def list_question(task: str, counts: dict[str, int], rng: random.Random) -> Parts:
    """The common words by the alphabet, or the frequent ones by frequency; no needles."""
    number, word = (NUM_COMMON, "five") if task == "common_words" else (NUM_FREQUENT, "three")
    adjective = "common" if task == "common_words" else "frequent"
    answers = list(counts)[:number]
    shown = sorted(answers) if task == "common_words" else answers
    what = f"the {word} most {adjective} words"
    completion = f" {', '.join(shown[:-1])} and {shown[-1]}."
    return Parts((), f"what are {what}?", f"{what} are", completion, tuple(answers), number / len(counts))


def word_list(counts: dict[str, int], rng: random.Random) -> str:
    """The words as one shuffled paragraph."""
    words = [word for word, count in counts.items() for _ in range(count)]
    rng.shuffle(words)
    return "Words: " + " ".join(words) + "."


def passage_question(paragraph: str, rng: random.Random) -> Parts:
    """A place inside a paragraph of enough words: its first words given, the next ones asked for."""
    words = paragraph.split()
    start = rng.randrange(len(words) - PASSAGE_START - PASSAGE_REST + 1)
    given = words[start : start + PASSAGE_START]
    rest = words[start + PASSAGE_START : start + PASSAGE_START + PASSAGE_REST]
    answers = tuple(" ".join(rest[at : at + PASSAGE_STEP]) for at in range(0, PASSAGE_REST, PASSAGE_STEP))
    return Parts(
        (),
        "how does the passage go on?",
        " ".join(given),
        " " + " ".join(rest),
        answers,
        chat_question=f"how does the passage go on that has the words: {' '.join(given)}",
    )


BUILDERS: dict[str, Callable[[int, random.Random, Sequence[str]], Parts]] = {
    "single": single,
    "multi_key": multi_key,
    "multi_value": multi_value,
    "multi_query": multi_query,
    "variable_tracking": variable_tracking,
    "passkey": passkey,
}
