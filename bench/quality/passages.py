"""What the quality benchmark reads: passages of books, and passages with hidden codes and questions about them.

books.jsonl.xz holds parts of 13 public-domain books (README.md beside it) that are in no training set of ours. A
recall passage hides sentences `The code of NAME is DDDDD.` among a book's paragraphs; a question repeats a name and is
answered by its five digits, one token each.
"""

from __future__ import annotations

import json
import lzma
import random
from dataclasses import dataclass
from pathlib import Path

from vashista.engine.tokenizer import Tokenizer

BOOKS = Path(__file__).with_name("books.jsonl.xz")
NAMES = (
    "elephant", "river", "castle", "garden", "window", "mountain", "bottle", "candle", "pocket", "letter",
    "soldier", "kitchen", "bridge", "forest", "hammer", "island", "jacket", "ladder", "market", "needle",
    "orange", "pencil", "rabbit", "saddle", "ticket", "violin", "wagon", "button", "carpet", "dragon", "engine",
    "feather", "glacier", "harbor", "insect", "jungle", "kettle", "lantern", "mirror", "napkin", "ocean",
    "parrot", "quarry", "ribbon", "shovel", "temple", "umbrella", "valley", "walnut", "anchor", "basket",
    "camera", "desert", "eagle", "falcon", "guitar", "hotel", "igloo", "jewel", "kitten", "lemon", "monkey",
)  # fmt: skip
QUESTION = "\n\nQuestion: what is the code of {name}? Answer: the code of {name} is "
NUM_DIGITS = 5


@dataclass(frozen=True)
class Sequence:
    """Tokens of which those from `start` on are played one at a time; `scored` of the last ones are judged."""

    passage: int
    token_ids: list[int]
    start: int
    scored: int


def read_books() -> list[str]:
    """The text of each book."""
    with lzma.open(BOOKS, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def text_sequences(tokenizer: Tokenizer, num_passages: int, context: int, num_scored: int) -> list[Sequence]:
    """The first `context` tokens of the books; the last `num_scored` of them are judged by their loss."""
    sequences = []
    for index, text in enumerate(read_books()[:num_passages]):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        check_length(len(token_ids), context)
        sequences.append(Sequence(index, token_ids[:context], context - num_scored, num_scored))
    return sequences


def recall_sequences(
    tokenizer: Tokenizer, num_passages: int, context: int, num_questions: int, page_size: int
) -> list[Sequence]:
    """Questions about codes hidden in passages; the passage itself ends at a page border below `context`."""
    sequences = []
    for index, text in enumerate(read_books()[:num_passages]):
        rng = random.Random(1000 * context + index)
        names = rng.sample(NAMES, 2 * num_questions)
        codes = {name: f"{rng.randrange(10**NUM_DIGITS):0{NUM_DIGITS}d}" for name in names}
        passage = hide(tokenizer, text, codes, (context - 64) // page_size * page_size, rng)
        for name in names[:num_questions]:
            question = tokenizer.encode(QUESTION.format(name=name), add_special_tokens=False)
            digits = [tokenizer.encode(digit, add_special_tokens=False)[-1] for digit in codes[name]]
            sequences.append(Sequence(index, [*passage, *question, *digits], len(passage), NUM_DIGITS))
    return sequences


def hide(tokenizer: Tokenizer, text: str, codes: dict[str, str], num_tokens: int, rng: random.Random) -> list[int]:
    """`num_tokens` tokens of a text with the codes between its paragraphs, all of them inside."""
    pieces = [tokenizer.encode(part + "\n\n", add_special_tokens=False) for part in text.split("\n\n")]
    needles = [
        tokenizer.encode(f"The code of {name} is {code}.\n\n", add_special_tokens=False) for name, code in codes.items()
    ]
    room = num_tokens - sum(map(len, needles)) - 64
    chosen: list[list[int]] = []
    total = 0
    for piece in pieces:
        if total + len(piece) > room:
            break
        chosen.append(piece)
        total += len(piece)
    check_length(sum(map(len, pieces)), room)
    for needle in needles:
        chosen.insert(rng.randrange(len(chosen) + 1), needle)
    token_ids = [token for piece in chosen for token in piece]
    rest = pieces[len(chosen) - len(needles)]
    while len(token_ids) < num_tokens:
        token_ids += rest[: num_tokens - len(token_ids)]
    return token_ids


def check_length(num_there: int, num_wanted: int) -> None:
    """SystemExit unless the books are long enough."""
    if num_there < num_wanted:
        raise SystemExit(f"a passage of {num_wanted} tokens was asked for; the books give {num_there}")
