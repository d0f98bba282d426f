"""Log probabilities of the engine in the three shapes that clients expect: completions, chat, and prompt.

Called by the reply builders of the two completion routes. JSON has no minus infinity: it is written as -9999, as
OpenAI does. What is told of one position is encoded at once: a long prompt's reply of megabytes, encoded in one call,
would keep the event loop waiting, in whatever thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

import msgspec

from vashista.engine.messages import TokenLogprobs
from vashista.server.schemas.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    ChatTopLogprob,
    CompletionLogprobs,
    PromptLogprobs,
    PromptToken,
)
from vashista.server.served_model import ServedModel

LOWEST = -9999.0
Position = TypeVar("Position")
_encoder = msgspec.json.Encoder()


class CompletionLogprobsWriter:
    """The completions shape for one choice; keeps the text offset, which runs on from chunk to chunk."""

    def __init__(self, model: ServedModel, num_top: int) -> None:
        self._model = model
        self._num_top = num_top
        self._offset = 0

    def write(self, entries: Iterable[TokenLogprobs | None], token_ids: Sequence[int]) -> CompletionLogprobs:
        """The next tokens. An entry is None for the first token of a prompt, which nothing predicts."""
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry, token_id in zip(entries, token_ids, strict=True):
            result.tokens.append(self._model.token_label(token_id))
            result.text_offset.append(self._offset)
            self._offset += len(self._model.tokenizer.token_text(token_id))
            result.token_logprobs.append(None if entry is None else finite(entry.logprob))
            result.top_logprobs.append(None if entry is None else encoded(self._top(entry)))
        return result

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in [*entry.top[: self._num_top], (entry.token_id, entry.logprob)]:
            top.setdefault(self._model.token_label(token_id), finite(logprob))
        return top


def join_completion_logprobs(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Consecutive parts as one."""
    return CompletionLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[value for part in parts for value in part.token_logprobs],
        top_logprobs=[value for part in parts for value in part.top_logprobs],
        text_offset=[value for part in parts for value in part.text_offset],
    )


def chat_logprobs(model: ServedModel, entries: Sequence[TokenLogprobs], num_top: int) -> ChatLogprobs:
    """The chat shape."""
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=model.token_label(entry.token_id),
                logprob=finite(entry.logprob),
                bytes=list(model.tokenizer.token_bytes(entry.token_id)),
                top_logprobs=[
                    ChatTopLogprob(
                        token=model.token_label(token_id),
                        logprob=finite(logprob),
                        bytes=list(model.tokenizer.token_bytes(token_id)),
                    )
                    for token_id, logprob in entry.top[:num_top]
                ],
            )
            for entry in entries
        ]
    )


def prompt_logprobs(model: ServedModel, entries: Iterable[TokenLogprobs | None], num_top: int) -> PromptLogprobs:
    """The shape of the field `prompt_logprobs`; the ranks of alternatives count from 1."""
    result: PromptLogprobs = []
    for entry in entries:
        if entry is None:
            result.append(None)
            continue
        candidates = {
            str(token_id): PromptToken(logprob=finite(logprob), rank=rank, decoded_token=model.token_label(token_id))
            for rank, (token_id, logprob) in enumerate(entry.top[:num_top], start=1)
        }
        candidates[str(entry.token_id)] = PromptToken(
            logprob=finite(entry.logprob), rank=entry.rank, decoded_token=model.token_label(entry.token_id)
        )
        result.append(encoded(candidates))
    return result


def encoded(position: Position) -> Position:
    """JSON that stands for the value in a reply: msgspec copies it as it is."""
    return cast(Position, msgspec.Raw(_encoder.encode(position)))


def finite(logprob: float) -> float:
    """The value, or LOWEST where JSON could not hold it."""
    return logprob if logprob > LOWEST else LOWEST
