"""What a request has said so far: text, stops, grammar and log probabilities of its output tokens.

The engine keeps one `OutputStream` beside each `Request` and gives it every sampled token; it answers with the text
that became certain and with whether, and why, the request ends here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from vashista.engine.attention.policy import RequestPolicy
from vashista.engine.detokenizer import StreamDetokenizer
from vashista.engine.grammar import GrammarFactory, GrammarMatcher
from vashista.engine.messages import FinishReason
from vashista.engine.request import Request
from vashista.engine.support import SupportTally
from vashista.engine.tokenizer import Tokenizer


@dataclass(slots=True)
class Ending:
    """Why a request ends."""

    reason: FinishReason
    stop_reason: str | int | None = None


@dataclass(slots=True)
class OutputStream:
    """Everything derived from a request's output tokens."""

    request: Request
    detokenizer: StreamDetokenizer
    matcher: GrammarMatcher | None
    stop_token_ids: frozenset[int]
    """Ids that end the request: of end of sequence, unless ignored, and its own."""
    eos_token_ids: frozenset[int]
    prompt_logprobs: list[msgspec.Raw] = field(default_factory=list)
    """Packed."""
    has_reported: bool = False
    """Whether an event of this request was sent already."""
    policy: RequestPolicy | None = None
    """Of a sparse request, like `support`."""
    support: SupportTally | None = None

    @classmethod
    def start(
        cls, request: Request, tokenizer: Tokenizer, grammars: GrammarFactory, eos_token_ids: frozenset[int]
    ) -> OutputStream:
        """The stream of a request that has said nothing yet. Raises GrammarError."""
        sampling = request.sampling
        eos = frozenset() if sampling.ignore_eos else eos_token_ids
        prompt_tail = request.token_ids[: request.num_prompt_tokens]
        return cls(
            request=request,
            detokenizer=StreamDetokenizer(tokenizer, sampling.stop, sampling.min_tokens, prompt_tail),
            matcher=grammars.matcher(sampling.grammar) if sampling.grammar is not None else None,
            stop_token_ids=eos | frozenset(sampling.stop_token_ids),
            eos_token_ids=eos,
        )

    def restart(self) -> None:
        """Forget what the steps of a preempted request reported: they come again."""
        self.prompt_logprobs.clear()
        if self.policy is not None and self.support is not None:
            self.policy.reset()
            self.support.reset()

    def forbidden_token_ids(self) -> list[int]:
        """Ids that may not come next because min_tokens are not there yet.

        A grammar that is complete allows nothing but the end; it goes before min_tokens.
        """
        if self.request.num_output_tokens >= self.request.sampling.min_tokens or self.matcher is not None:
            return []
        return sorted(self.stop_token_ids)

    def push(self, token_id: int) -> tuple[str, Ending | None]:
        """Take one sampled token, already in the request; the text that is now certain, and the end if it is."""
        request = self.request
        text, ending = "", None
        if token_id in self.stop_token_ids:
            own = token_id not in self.eos_token_ids
            ending = Ending(FinishReason.STOP, token_id if own else None)
        else:
            text = self.detokenizer.push(token_id)
            if self.detokenizer.matched_stop is not None:
                return text, Ending(FinishReason.STOP, self.detokenizer.matched_stop)
            if self.matcher is not None:
                self.matcher.consume(token_id)
                if self.matcher.is_finished:
                    ending = Ending(FinishReason.STOP)
        if ending is None and request.num_output_tokens >= request.sampling.max_tokens:
            ending = Ending(FinishReason.LENGTH)
        if ending is not None:
            text += self.detokenizer.flush()
            if self.detokenizer.matched_stop is not None:
                ending = Ending(FinishReason.STOP, self.detokenizer.matched_stop)
        return text, ending
