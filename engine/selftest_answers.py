"""What a sound installation computes with one model: `selftest.json` beside the model, made once and shipped with it.

`vashista selftest --write` makes it (`engine/selftest_write.py`), `vashista selftest` compares. It holds the SHA-256 of
the files that decide what the model says, greedy continuations of a few prompts on the CPU in float32 with the log
probability of each token, and codes that the model recalls out of a long prompt.

A continuation ends before the first token whose lead over the next best is below `MIN_LEAD`: every processor and
number of threads rounds a little differently, and where two tokens are nearly equal that would decide. No torch here.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime
from pathlib import Path

import msgspec

from vashista.engine.chat_template import ChatTemplate
from vashista.engine.errors import SelftestAnswersError, SelftestModelError
from vashista.engine.model_folder import check_folder
from vashista.engine.tokenizer import Tokenizer
from vashista.engine.whole_file import write_whole

FILE_NAME = "selftest.json"
VERSION = 1
MAX_FILE_BYTES = 1 << 20
MIN_LEAD = 0.05
"""Nats by which a greedy token leads. float32 on other instruction sets moved none by more than 1e-4."""
TEXT_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "model.safetensors.index.json",
)  # fmt: skip
CHAT_DATE = datetime(2026, 1, 1)
"""What a chat template takes for today."""


class KnownAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and its greedy continuation."""

    prompt: str
    is_chat: bool = False
    """The prompt is a user's message, put into the model's chat template."""
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]


class RecallAnswers(msgspec.Struct, frozen=True, kw_only=True):
    """Codes hidden among the paragraphs of the bundled sample text."""

    num_tokens: int
    """Tokens of the passage, at most."""
    needle: str
    """`{name}` and `{code}` stand for themselves."""
    question: str
    """What follows the passage, up to the code."""
    codes: dict[str, str]
    """All that are hidden, evenly spread."""
    asked: list[str]
    """Names whose codes the model recalls, in full attention and with `token_budget`."""
    token_budget: int


class SelftestAnswers(msgspec.Struct, frozen=True, kw_only=True):
    """See the module's text."""

    version: int = VERSION
    files: dict[str, str]
    """SHA-256 by name."""
    known: list[KnownAnswer]
    recall: RecallAnswers | None
    """None: the model recalled no code when this was written."""

    @classmethod
    def load(cls, path: Path) -> SelftestAnswers:
        """Raises SelftestAnswersError for a file that is missing, unreadable, damaged, or of another version."""
        try:
            if not path.is_file():
                state = "is not a plain file" if path.exists() else "does not exist"
                raise SelftestAnswersError(f"The file of known answers {path} {state}.")
            if path.stat().st_size > MAX_FILE_BYTES:
                raise SelftestAnswersError(f"{path} is larger than {MAX_FILE_BYTES} bytes; no known answers are.")
            data = path.read_bytes()
        except OSError as error:
            raise SelftestAnswersError(f"{path} cannot be read: {error.strerror or error}.") from error
        try:
            version = msgspec.json.decode(data, type=_Version).version
            if version != VERSION:
                raise SelftestAnswersError(f"{path} is of version {version}; this program reads version {VERSION}.")
            answers = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SelftestAnswersError(f"{path} does not hold known answers: {error}.") from error
        problem = answers.problem()
        if problem:
            raise SelftestAnswersError(f"{path} does not hold known answers: {problem}.")
        return answers

    def save(self, path: Path) -> None:
        """Write it whole or not at all; raises OSError."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    def problem(self) -> str:
        """What contradicts itself; "" for nothing."""
        recall = self.recall
        checks = (
            (bool(self.files), "it names no file"),
            (all("/" not in name and name not in {"", ".", ".."} for name in self.files), "a file is not a plain name"),
            (bool(self.known), "it holds no continuation"),
            (all(len(k.token_ids) == len(k.logprobs) >= 1 for k in self.known), "tokens and log probabilities differ"),
            (all(k.prompt_token_ids for k in self.known), "a prompt has no tokens"),
            (recall is None or (recall.asked and set(recall.asked) <= set(recall.codes)), "a code asked is not there"),
            (recall is None or (recall.num_tokens >= 1 and recall.token_budget >= 1), "a number of tokens is below 1"),
        )  # fmt: skip
        return next((problem for is_right, problem in checks if not is_right), "")


class _Version(msgspec.Struct):
    version: int


def list_files(folder: Path) -> list[str]:
    """Names of a model's files that decide what it says. Raises ModelFolderError."""
    names = sorted(entry.name for entry in check_folder(folder).iterdir())
    return [name for name in names if name in TEXT_FILES or name.endswith(".safetensors")]


def digest_files(folder: Path) -> dict[str, str]:
    """SHA-256 of those files, by name. Raises ModelFolderError, SelftestModelError."""
    return {name: digest_file(folder / name) for name in list_files(folder)}


def digest_file(path: Path) -> str:
    """SHA-256 of a plain file. Raises SelftestModelError."""
    try:
        if not path.is_file():
            raise SelftestModelError(
                f"{path.name} is {'no plain file' if path.exists() else 'missing'} in {path.parent}."
            )
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SelftestModelError(f"{path} cannot be read: {error.strerror or error}.") from error


def encode_prompt(folder: Path, tokenizer: Tokenizer, prompt: str, is_chat: bool) -> list[int]:
    """Token ids as the server makes them. Raises SelftestModelError where there is no chat template."""
    if not is_chat:
        return tokenizer.encode(prompt, add_special_tokens=True)
    template = ChatTemplate.load(folder, now=lambda: CHAT_DATE)
    if template is None:
        raise SelftestModelError(f"{folder} has no chat template; known answers were written with one.")
    return tokenizer.encode(template.render([{"role": "user", "content": prompt}]), add_special_tokens=False)


def hide_codes(tokenizer: Tokenizer, text: str, recall: RecallAnswers) -> list[int]:
    """The passage's tokens: paragraphs of the text with the needles between them, `recall.num_tokens` at most.

    Raises SelftestModelError for a text that is too short.
    """
    needles = [recall.needle.format(name=name, code=code) for name, code in recall.codes.items()]
    room = recall.num_tokens - sum(len(tokenizer.encode(needle, add_special_tokens=False)) for needle in needles)
    parts = _cut(tokenizer, text, room - 8 * len(needles))  # pieces that meet may be cut otherwise
    for index, needle in reversed(list(enumerate(needles))):
        parts.insert(round(len(parts) * (index + 0.5) / len(needles)), needle)
    return tokenizer.encode("".join(parts), add_special_tokens=True)[: recall.num_tokens]


def _cut(tokenizer: Tokenizer, text: str, num_tokens: int) -> list[str]:
    """Paragraphs from the start of the text, the last one cut behind a word: at most so many tokens, and few less."""
    chosen: list[str] = []
    room = num_tokens
    for part in text.split("\n\n"):
        counts = [len(tokenizer.encode(word, add_special_tokens=False)) for word in re.findall(r"\s*\S+", part)]
        room -= 2
        if sum(counts) >= room:
            words = re.findall(r"\s*\S+", part)
            fitting = next(index for index in range(len(counts) + 1) if sum(counts[: index + 1]) >= room)
            return [*chosen, "".join(words[:fitting]) + "\n\n"]
        chosen.append(part + "\n\n")
        room -= sum(counts)
    raise SelftestModelError(f"The sample text has {num_tokens - room} tokens of this model; {num_tokens} are needed.")
