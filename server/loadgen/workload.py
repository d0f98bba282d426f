"""What is sent: where prompts come from, how long they are, and which tokens they share.

`runner.py` draws every prompt of a load point from one Workload. A Workload is random words, windows of a text file, or
the lines of a JSONL file. The first two have wanted lengths: with the server's `/tokenize` (`target.py`) each prompt is
fitted until it has exactly that many tokens; without it a ratio measured from usage is used and the report tells how
many prompts came out exact. Prompts differ between requests and load points, so that a prefix cache helps only where
`num_prefix_tokens` says so; the same seed makes the same prompts.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Protocol

import msgspec

from vashista.engine.errors import WorkloadError
from vashista.server.loadgen.client import Prompt
from vashista.server.loadgen.lengths import LengthSpec

MAX_FILE_BYTES = 1 << 30
_MAX_FITS = 24
_FILLERS = ("the", "a", "of", "and", "to", "1", "x", ".", ",")
_NUM_CALIBRATION_WORDS = 200
_SYLLABLES = tuple(consonant + vowel for consonant in "bdfghklmnprst" for vowel in "aeiou")


class WordSource(Protocol):
    """Gives text of a wanted number of words."""

    def words(self, num_words: int, rng: random.Random) -> list[str]:
        """So many words in their order."""


class RandomWords:
    """Pronounceable random words of two or three syllables: 278,850 of them, unlike anything cached."""

    def words(self, num_words: int, rng: random.Random) -> list[str]:
        """Independent random words."""
        return ["".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3))) for _ in range(num_words)]


class TextFile:
    """Windows of a text at random places; the text is taken as a ring."""

    def __init__(self, text: str, *, name: str) -> None:
        self._words = text.split()
        if not self._words:
            raise WorkloadError(f"the data set {name} holds no words", param="dataset")

    def words(self, num_words: int, rng: random.Random) -> list[str]:
        """Consecutive words from a random place on."""
        start = rng.randrange(len(self._words))
        return [self._words[(start + offset) % len(self._words)] for offset in range(num_words)]


class Counter(Protocol):
    """Counts the tokens of a prompt, as the server does."""

    async def count(self, text: str) -> int:
        """Tokens of a request with this text."""


class Workload(Protocol):
    """A source of prompts."""

    async def draw(self, rng: random.Random) -> Prompt:
        """The next prompt."""


class JsonLines:
    """Prompts of a JSONL file, in the file's order, again from its start when they run out.

    A line is an object with `prompt` or `text` (a string), or `messages` (a list); `max_tokens` in it wins over the
    output length of the command line.
    """

    def __init__(self, data: str, *, name: str, output_len: LengthSpec, is_chat: bool) -> None:
        self._output_len = output_len
        self._rows = [
            _parse_row(line, f"{name}:{number}", is_chat)
            for number, line in enumerate(data.splitlines(), start=1)
            if line.strip()
        ]
        self._next = 0
        if not self._rows:
            raise WorkloadError(f"the data set {name} holds no lines", param="dataset")

    async def draw(self, rng: random.Random) -> Prompt:
        """The next line."""
        row = self._rows[self._next % len(self._rows)]
        self._next += 1
        max_tokens = row.get("max_tokens") or self._output_len.draw(rng)
        return Prompt(max_tokens, text=row.get("prompt", row.get("text")), messages=row.get("messages"))


def _parse_row(line: str, place: str, is_chat: bool) -> dict[str, Any]:
    try:
        row = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise WorkloadError(f"{place} is not JSON: {error}", param="dataset") from error
    fields = ("prompt", "text", "messages")
    if not isinstance(row, dict) or sum(field in row for field in fields) != 1:
        raise WorkloadError(f"{place} must be an object with one of {', '.join(fields)}", param="dataset")
    if "messages" in row:
        if not is_chat:
            raise WorkloadError(f"{place} holds messages, which need --endpoint chat", param="dataset")
        is_valid = isinstance(row["messages"], list) and bool(row["messages"])
    else:
        text = row.get("prompt", row.get("text"))
        is_valid = isinstance(text, str) and bool(text)
    if not is_valid:
        raise WorkloadError(f"{place} has an empty prompt or one of a wrong type", param="dataset")
    max_tokens = row.get("max_tokens", 1)
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise WorkloadError(f"{place} has max_tokens {max_tokens!r}; it must be an integer from 1", param="dataset")
    return row


class FittedText:
    """Text of wanted lengths in tokens, some of them shared by all prompts of a group."""

    def __init__(
        self,
        source: WordSource,
        counter: Counter | None,
        *,
        input_len: LengthSpec,
        output_len: LengthSpec,
        num_prefix_tokens: int = 0,
        num_prefixes: int = 1,
    ) -> None:
        if num_prefix_tokens >= input_len.low:
            raise WorkloadError(
                f"prefix_len {num_prefix_tokens} is part of the input and must be less than the least input length, "
                f"{input_len.low} of {input_len}",
                param="prefix_len",
            )
        self._source = source
        self._counter = counter
        self._input_len = input_len
        self._output_len = output_len
        self._num_prefix_tokens = num_prefix_tokens
        self._num_prefixes = num_prefixes
        self._prefixes: list[str] = []
        self._overhead = 0.0
        self._tokens_per_word = 1.5
        self._filler: str | None = None

    async def prepare(self, rng: random.Random, usage: Counter | None = None) -> None:
        """Learn tokens per word, from `/tokenize` or else by `usage`; make the shared prefixes."""
        counter = self._counter or usage
        if counter is not None:
            few = await counter.count(" ".join(self._source.words(_NUM_CALIBRATION_WORDS // 4, rng)))
            many = await counter.count(" ".join(self._source.words(_NUM_CALIBRATION_WORDS, rng)))
            slope = (many - few) / (_NUM_CALIBRATION_WORDS * 3 / 4)
            self._tokens_per_word = slope if slope > 0 else max(many / _NUM_CALIBRATION_WORDS, 0.1)
            self._overhead = max(many - self._tokens_per_word * _NUM_CALIBRATION_WORDS, 0.0)
        if self._counter is not None:
            self._filler = await self._find_filler(self._counter, rng)
            await self._check_least_length(self._counter)
        if self._num_prefix_tokens:
            wanted = self._num_prefix_tokens
            self._prefixes = [await self._fit("", wanted, rng) for _ in range(self._num_prefixes)]

    async def draw(self, rng: random.Random) -> Prompt:
        """A prompt of a drawn length."""
        wanted = self._input_len.draw(rng)
        prefix = rng.choice(self._prefixes) if self._prefixes else ""
        text = await self._fit(prefix, wanted, rng)
        return Prompt(self._output_len.draw(rng), text=text, num_tokens_asked=wanted)

    async def _fit(self, prefix: str, wanted: int, rng: random.Random) -> str:
        """Text of `wanted` tokens that starts with `prefix`; the nearest found where the tokenizer allows no better."""
        num_shared = self._num_prefix_tokens if prefix else self._overhead
        words = self._source.words(max(1, round((wanted - num_shared) / self._tokens_per_word)), rng)
        best, best_gap = _join(prefix, words), wanted
        if self._counter is None:
            return best
        for _ in range(_MAX_FITS):
            text = _join(prefix, words)
            gap = wanted - await self._counter.count(text)
            if abs(gap) < abs(best_gap):
                best, best_gap = text, gap
            if gap == 0:
                break
            if gap > 0:
                words += self._grow(gap, rng)
            elif len(words) > 1:
                del words[-min(len(words) - 1, max(1, int(-gap / self._tokens_per_word))) :]
            else:
                words = self._source.words(1, rng)
        return best

    def _grow(self, gap: int, rng: random.Random) -> list[str]:
        if self._filler is not None and gap <= 2 * self._tokens_per_word + 2:
            return [self._filler] * gap
        return self._source.words(max(1, int(gap / self._tokens_per_word)), rng)

    async def _find_filler(self, counter: Counter, rng: random.Random) -> str | None:
        """A word that costs exactly one token wherever it is added, to reach the last tokens of a length."""
        base = self._source.words(4, rng)
        num_base = await counter.count(" ".join(base))
        for filler in _FILLERS:
            if await counter.count(" ".join(base + [filler] * 8)) == num_base + 8:
                return filler
        return None

    async def _check_least_length(self, counter: Counter) -> None:
        least = await counter.count(self._filler or "a")
        if least > self._input_len.low:
            raise WorkloadError(
                f"input_len {self._input_len}: on this server and endpoint even a one-word prompt has {least} tokens",
                param="input_len",
            )


def _join(prefix: str, words: list[str]) -> str:
    body = " ".join(words)
    return f"{prefix} {body}" if prefix else body


def read_dataset(path: Path) -> str:
    """The text of a data set file. Raises WorkloadError when it is not readable UTF-8."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise WorkloadError(f"the data set {path} is larger than {MAX_FILE_BYTES} bytes", param="dataset")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise WorkloadError(f"the data set {path} cannot be read: {error}", param="dataset") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"the data set {path} is not UTF-8: {error}", param="dataset") from error
