"""Output that must match a JSON schema: from `response_format` to the tokens allowed next, by llguidance.

The server compiles the `response_format` of a request to a grammar and tries it (`GrammarFactory.validate`), so that a
schema nobody can serve is a 400 and never reaches the engine. The engine makes one `GrammarMatcher` a request, masks
the logits with it and feeds it each sampled token. No torch here.

Schemas come from clients: their size is bounded here, nesting, states and work a step inside llguidance (its default
limits), and `$ref` to files or hosts is never followed.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from vashista.engine.errors import GrammarError
from vashista.engine.tokenizer import Tokenizer

MAX_SCHEMA_BYTES = 256 * 1024
MAX_CACHED_GRAMMARS = 64
NUM_PROBED_TOKENS = 8
"""Tokens that `validate` walks into a grammar. Those that are too complex fail at the first one or two, once their
first property or pattern is entered."""

WHITESPACE = r"[ \n\t]{0,16}"
"""Between JSON tokens. JSON allows any number of blanks, and weak models then print nothing else until max_tokens."""


def compile_response_format(response_format: Mapping[str, Any] | None) -> str | None:
    """The llguidance grammar of an OpenAI `response_format`; None where it asks for plain text.

    GrammarError for an unknown type, a missing or oversized schema, or one that is not an object.
    """
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return _grammar({"type": "object"})
        case {"type": "json_schema", "json_schema": {"schema": dict() as schema}}:
            return _grammar(schema)
        case {"type": "json_schema"}:
            raise GrammarError(
                "response_format.json_schema.schema is missing or not an object; it must be a JSON schema.",
                param="response_format",
            )
        case _:
            kind = response_format.get("type")
            raise GrammarError(
                f"response_format.type is {kind!r}; possible are text, json_object and json_schema.",
                param="response_format",
            )


def _grammar(schema: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise GrammarError(f"The JSON schema is not valid JSON: {error}.", param="response_format") from error
    if len(text) > MAX_SCHEMA_BYTES:
        raise GrammarError(
            f"The JSON schema has {len(text)} bytes; at most {MAX_SCHEMA_BYTES} are possible.", param="response_format"
        )
    try:
        grammar: str = llguidance.LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_pattern": WHITESPACE, "whitespace_flexible": True}
        )
    except ValueError as error:
        raise _refused(str(error)) from error
    return grammar


class GrammarMatcher:
    """Where one request stands in its grammar."""

    def __init__(
        self, matcher: Any, vocab_size: int, eos_token_ids: NDArray[np.int64], ll_eos_token_ids: NDArray[np.int64]
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._ll_eos_token_ids = ll_eos_token_ids

    @property
    def is_finished(self) -> bool:
        """Whether the output is complete and can only end."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def is_accepting(self) -> bool:
        """Whether the output is complete, though it might go on."""
        return bool(self._matcher.is_accepting())

    @property
    def error(self) -> str | None:
        """Why the matcher can go no further: a limit was hit, or a token was forced that the grammar does not allow."""
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def allowed_tokens(self) -> NDArray[np.bool_]:
        """[vocab_size] bool: the ids that may come next; end-of-sequence ids where the output is complete.

        Nothing is allowed once there is an `error`.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, dtype=np.bool_)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        # llguidance knows only end-of-sequence tokens that the tokenizer spells, and stands one in where there is none
        allowed[self._ll_eos_token_ids] = False
        allowed[self._eos_token_ids] = self.is_accepting
        return allowed

    def consume(self, token_id: int) -> bool:
        """Take one token of the output. False, and an `error` from then on, when the grammar does not allow it."""
        return bool(self._matcher.consume_token(token_id))

    def replay(self, token_ids: Iterable[int]) -> bool:
        """Start over and take these tokens, as for a request that is computed again."""
        self._matcher.reset()
        return all(self.consume(token_id) for token_id in token_ids)

    def fork(self) -> GrammarMatcher:
        """An independent matcher in the same state."""
        return GrammarMatcher(self._matcher.deep_copy(), self._vocab_size, self._eos_token_ids, self._ll_eos_token_ids)


class GrammarFactory:
    """Makes matchers for one tokenizer; compiled grammars are kept, the last used first. Safe from several threads.

    The tables of the vocabulary are built with the first grammar, so that servers without such requests do not pay.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = np.array(sorted(eos_token_ids), dtype=np.int64)
        self._ll_tokenizer: Any = None
        self._compiled: OrderedDict[str, GrammarMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: str) -> GrammarMatcher:
        """A matcher at the start of the grammar. GrammarError with llguidance's message when it cannot be compiled."""
        with self._lock:
            pristine = self._compiled.get(grammar)
            if pristine is None:
                pristine = self._compiled[grammar] = self._compile(grammar)
                if len(self._compiled) > MAX_CACHED_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return pristine.fork()

    def validate(self, grammar: str) -> None:
        """Compile the grammar and walk some tokens into it. GrammarError when either hits an error or a limit."""
        matcher = self.matcher(grammar)
        for _ in range(NUM_PROBED_TOKENS):
            allowed = matcher.allowed_tokens()
            if matcher.error is not None:
                raise _refused(matcher.error)
            allowed[self._eos_token_ids] = False
            token_id = int(allowed.argmax())
            if matcher.is_finished or not allowed[token_id]:
                if matcher.is_accepting:
                    return
                raise _refused("no token of this model's vocabulary can go on")
            matcher.consume(token_id)

    def _compile(self, grammar: str) -> GrammarMatcher:
        if self._ll_tokenizer is None:
            self._ll_tokenizer = self._build_ll_tokenizer()
        matcher = llguidance.LLMatcher(self._ll_tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        ll_eos_token_ids = np.array(self._ll_tokenizer.eos_tokens, dtype=np.int64)
        return GrammarMatcher(matcher, self._vocab_size, self._eos_token_ids, ll_eos_token_ids)

    def _build_ll_tokenizer(self) -> Any:
        spelled = [int(token_id) for token_id in self._eos_token_ids if self._tokenizer.token_bytes(int(token_id))]
        # It insists on one; a control token is never part of a JSON text, so nothing is lost by it.
        stand_in = sorted(self._tokenizer.special_ids)[:1]
        try:
            return llguidance.LLTokenizer(
                self._tokenizer.to_json(),
                n_vocab=self._vocab_size,
                eos_token=spelled or stand_in or None,
                slices=llguidance.LLTokenizer.json_slices(),
            )
        except ValueError as error:
            raise _refused(f"llguidance cannot use this model's tokenizer: {error}") from error


def _refused(message: str) -> GrammarError:
    return GrammarError(
        f"The response_format cannot be compiled into a grammar: {_first_line(message)}.", param="response_format"
    )


def _first_line(message: str) -> str:
    """llguidance appends its parser's state, which says nothing to a client; regex errors take several lines."""
    text = " ".join(message.split("<state>", maxsplit=1)[0].split())
    return text if len(text) <= 500 else text[:497] + "..."
