"""Text to token ids and back, for one model folder.

The server tokenises prompts and answers /tokenize with it, the engine turns output into text with it. It wraps the
tokenizers library for encoding; decoding is made of the tokens' exact bytes (`engine/token_bytes.py`), so that a whole
text, a stream and the `bytes` of logprobs never disagree. No torch here.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from vashista.engine.errors import InvalidRequestError, TokenizerError, TokenOutOfVocabularyError
from vashista.engine.model_folder import check_folder, read_text
from vashista.engine.token_bytes import TokenBytes

FILE_NAME = "tokenizer.json"
CHARS_A_TOKEN = 4
"""Of usual text; where `encode_at_most` begins to look."""


class BytesDecoder(Protocol):
    """What `new_utf8_decoder` returns."""

    def decode(self, data: bytes, final: bool = False) -> str:
        """Characters that are complete; with `final`, U+FFFD for what is left."""


def new_utf8_decoder() -> BytesDecoder:
    """Bytes to characters piece by piece; whatever is not UTF-8 becomes U+FFFD, never lost."""
    return codecs.getincrementaldecoder("utf-8")("replace")


class Tokenizer:
    """One model's tokenizer. Made by `load`; safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int) -> None:
        self._backend = backend
        self._token_bytes = TokenBytes(backend.decoder)
        self._bytes_of: dict[int, bytes] = {}
        self.vocab_size = vocab_size
        """Of the model. It may exceed the tokenizer's: the ids above stand for no text."""
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        """Ids of control tokens, which text leaves out."""
        self.num_leading_spaces = self._token_bytes.num_leading_spaces
        """Spaces that decoding takes off the start of a whole text."""

    @classmethod
    def load(cls, folder: str | Path, vocab_size: int) -> Tokenizer:
        """The folder's tokenizer.json; TokenizerError when it is missing, damaged or too large for the vocabulary."""
        path = check_folder(folder) / FILE_NAME
        if not path.exists():
            raise TokenizerError(f"{FILE_NAME} is missing in the model folder {path.parent}.")
        text = read_text(path)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
            backend.encode("a")  # a post-processor may name tokens that are not there
        except BaseException as error:  # the library raises bare Exception, and its panics are not even that
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise TokenizerError(f"{path} is not a tokenizer that the tokenizers library reads: {error}.") from error
        # A file saved with these would cut or pad prompts unasked.
        backend.no_truncation()
        backend.no_padding()
        highest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= highest < vocab_size:
            raise TokenizerError(
                f"{FILE_NAME} has token ids up to {highest}, but the model's vocabulary is {vocab_size}."
            )
        return cls(backend, vocab_size)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of the text.

        `add_special_tokens` applies the post-processor of tokenizer.json (a beginning-of-sequence token where the
        publisher wants one). Control tokens spelled out in the text become control tokens, as in transformers.
        InvalidRequestError when the text has unpaired surrogates, which no UTF-8 text has.
        """
        try:
            # Not `encode`: that holds the interpreter's lock, so that a text of 15 MB halts the whole server for 20 s.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return encoding.ids
        except (TypeError, UnicodeEncodeError) as error:
            surrogate = next((place for place, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
            if surrogate is None:
                raise
            raise InvalidRequestError(
                f"The text has an unpaired surrogate at character {surrogate}; it must be valid Unicode."
            ) from error

    def encode_at_most(self, text: str, most: int, add_special_tokens: bool = True) -> list[int] | None:
        """The same; None when they are clearly more than `most`: a beginning of the text has twice as many.

        A text takes a hundred times its size in memory, and a second a megabyte, so that one of 15 MB is not worth
        counting to say that it is too long. Twice, as a word that is cut may have more tokens than the whole one.
        """
        size = CHARS_A_TOKEN * most
        while size < len(text):
            if len(self.encode(text[:size], add_special_tokens)) > 2 * most:
                return None
            size *= 4
        return self.encode(text, add_special_tokens)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of the tokens; bytes that are not UTF-8 become U+FFFD.

        TokenOutOfVocabularyError for an id outside the model's vocabulary.
        """
        ids = self.visible(token_ids) if skip_special_tokens else token_ids
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return self.without_leading_spaces(text)

    def visible(self, token_ids: Iterable[int]) -> list[int]:
        """The ids without those of control tokens."""
        return [token_id for token_id in token_ids if token_id not in self.special_ids]

    def without_leading_spaces(self, text: str) -> str:
        """The text without the space that the tokenizer puts before a whole text."""
        kept = text.lstrip(" ")
        return text[min(len(text) - len(kept), self.num_leading_spaces) :]

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token, control tokens included; b"" for an id that the tokenizer does not use."""
        found = self._bytes_of.get(token_id)
        if found is None:
            self.check_ids((token_id,))
            token = self._backend.id_to_token(token_id)
            found = self._bytes_of[token_id] = b"" if token is None else self._token_bytes.of(token)
        return found

    def token_text(self, token_id: int) -> str:
        """One token alone as text, with U+FFFD where it holds a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """The id of a token spelled as in tokenizer.json, such as `<|eot_id|>`."""
        return self._backend.token_to_id(token)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """TokenOutOfVocabularyError unless every id is in the model's vocabulary."""
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
            raise TokenOutOfVocabularyError(
                f"Token id {wrong} is not in the vocabulary; ids from 0 to {self.vocab_size - 1} are."
            )

    def to_json(self) -> str:
        """tokenizer.json as the library holds it, without truncation and padding."""
        return self._backend.to_str()
