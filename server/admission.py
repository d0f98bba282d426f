"""Turns a valid wire request into engine requests, or says why it cannot run: the last gate before the engine.

The completion routes call `admit`; the result goes to `server/generation.py`. What admission lets through, the engine
runs: the prompt is tokenised and fits the context, the KV cache and the queue, ids are in the vocabulary, the grammar
compiles. Long prompts and grammars are worked on in a thread.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from vashista.engine.chat_template import require_chat_template
from vashista.engine.errors import (
    CacheCapacityError,
    ContextLengthError,
    EmptyPromptError,
    InvalidRequestError,
    TokenOutOfVocabularyError,
    VashistaError,
)
from vashista.engine.grammar import GrammarFactory, compile_response_format
from vashista.engine.messages import AttentionMode, Ready, SamplingParams, Submit
from vashista.server.attention_mode import attention_mode
from vashista.server.books import Books
from vashista.server.chat_prompts import messages_for_template
from vashista.server.engine_client import EngineClient
from vashista.server.forecaster import Forecaster
from vashista.server.foresight import Foresight
from vashista.server.keys import Key
from vashista.server.metrics import Metrics
from vashista.server.quotas import Hold, Quotas
from vashista.server.sampling_params import (
    asked_max_tokens,
    check_limits,
    default_max_tokens,
    first_seed,
    sampling_params,
)
from vashista.server.schemas.chat import ChatRequest
from vashista.server.schemas.completions import CompletionRequest
from vashista.server.schemas.fields import VashistaOptions
from vashista.server.schemas.predict import SizeRequest
from vashista.server.schemas.responses import Adapted
from vashista.server.served_model import ServedModel
from vashista.server.settings import Settings
from vashista.server.terms import Run, Terms
from vashista.server.turns import Turns
from vashista.server.waiting_room import Place, WaitingRoom

INLINE_CHARS = 4096
"""Texts up to this length are tokenised on the event loop (about 1 ms); a thread costs 0.1 ms and a context switch."""
INLINE_IDS = 1 << 16
"""So many token ids are compared with the vocabulary on the event loop (about 1 ms)."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request; `text` is None where the client sent token ids."""

    text: str | None
    token_ids: list[int]


@dataclass(frozen=True)
class Admitted:
    """What one HTTP request became. Choice i belongs to prompt i // num_choices and runs as submits[i]."""

    prompts: list[Prompt]
    submits: list[Submit]
    places: list[Place]
    num_choices: int
    hold: Hold | None = None
    """What it holds of the limits of its key."""
    foresight: Foresight | None = None
    """What it was expected to take; None where nothing could be said."""
    adapted: Adapted | None = None
    """That it attends to fewer tokens than it asked for."""


@dataclass(frozen=True)
class Asked:
    """A request that could run."""

    prompts: list[Prompt]
    num_choices: int
    options: VashistaOptions | None
    run: Run

    @property
    def submits(self) -> list[Submit]:
        """One for each choice of each prompt."""
        return self.run.submits

    @property
    def prompt_sizes(self) -> list[int]:
        """Prompt tokens of each engine request."""
        return [len(submit.prompt_token_ids) for submit in self.submits]

    @property
    def most_tokens(self) -> int:
        """Tokens that count for a key's limits, at most: each prompt once."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
        return num_prompt + sum(submit.sampling.max_tokens for submit in self.submits)


@dataclass(frozen=True)
class Preview:
    """What admission would say."""

    run: Run
    refusal: VashistaError | None


class Admission:
    """Admits requests for one model and one engine."""

    def __init__(
        self,
        settings: Settings,
        model: ServedModel,
        engine: EngineClient,
        room: WaitingRoom,
        books: Books,
        quotas: Quotas,
        forecaster: Forecaster,
        metrics: Metrics,
    ) -> None:
        self._metrics = metrics
        self._terms = Terms(settings, forecaster)
        self._forecaster = forecaster
        self._quotas = quotas
        self._books = books
        self._settings = settings
        self._model = model
        self._engine = engine
        self._room = room
        self._encoding = Turns()
        self._grammars = GrammarFactory(model.tokenizer, model.config.vocab_size, model.config.eos_token_ids)

    async def admit(
        self, request: CompletionRequest | ChatRequest, arrival_s: float, key: Key | None = None
    ) -> Admitted:
        """The request, ready to be submitted, with its places in the queue taken. A named error when it cannot run."""
        self._room.check_open()
        self._books.check()
        self._quotas.check(key)
        asked = await self._prepare(request, arrival_s)
        # From here on nothing is awaited until the requests are submitted.
        run = self._terms.meet(asked.options, asked.run)
        hold = self._quotas.admit(key, asked.most_tokens)
        try:
            places = self._room.enter(asked.prompt_sizes)
        except VashistaError:
            if hold is not None:
                hold.cancel()
            raise
        if run.adapted is not None:
            self._metrics.adapted.inc()
        return Admitted(asked.prompts, run.submits, places, asked.num_choices, hold, run.foresight, run.adapted)

    async def preview(
        self, request: CompletionRequest | ChatRequest | SizeRequest, arrival_s: float, key: Key | None = None
    ) -> Preview:
        """What `admit` would do now, and what the request would take, without taking anything.

        Raises what is wrong with the request itself, and EngineNotReadyError; what only this moment or this key stands
        against is the preview's refusal.
        """
        if isinstance(request, SizeRequest):
            asked = self._of_size(request, arrival_s)
        else:
            asked = await self._prepare(request, arrival_s)
        try:
            self._room.check_open()
            self._books.check()
            run = self._terms.meet(asked.options, asked.run)
        except InvalidRequestError:
            raise
        except VashistaError as error:
            return Preview(asked.run, error)
        return Preview(run, self._refusal(asked, key))

    def _refusal(self, asked: Asked, key: Key | None) -> VashistaError | None:
        """The error of `admit`, in its order."""
        try:
            hold = self._quotas.admit(key, asked.most_tokens)
            if hold is not None:
                hold.cancel()
            self._room.check(asked.prompt_sizes)
        except VashistaError as error:
            return error
        return None

    async def _prepare(self, request: CompletionRequest | ChatRequest, arrival_s: float) -> Asked:
        """Everything that needs no place in the queue."""
        self._model.check_name(request.model)
        ready = self._engine.check_ready()
        check_limits(request, self._settings, self._model)
        attention = attention_mode(request, self._settings, ready)
        if isinstance(request, ChatRequest):
            prompts = [await self._chat_prompt(request, ready.max_context)]
        else:
            prompts = await self._prompts(request, ready.max_context)
        max_tokens = [self._max_tokens(request, prompt, ready) for prompt in prompts]
        grammar = await self._grammar(request)
        self._engine.check_ready()  # it may have gone away meanwhile
        submits = self._submits(request, prompts, max_tokens, attention, grammar, arrival_s)
        foresight = self._forecaster.predict(submits, time.monotonic(), arrival_s=arrival_s)
        return Asked(prompts, request.num_choices, request.vashista, Run(submits, foresight))

    def _of_size(self, request: SizeRequest, arrival_s: float) -> Asked:
        """A request of which only the size is known; its prompt is in no cache."""
        self._model.check_name(request.model)
        ready = self._engine.check_ready()
        num_choices = request.n or 1
        if num_choices > self._settings.max_n:
            raise InvalidRequestError(
                f"n: at most {self._settings.max_n} on this server, got {num_choices}.", param="n"
            )
        if request.prompt_tokens + request.max_tokens > ready.max_context:
            raise ContextLengthError(
                f"prompt_tokens is {request.prompt_tokens} and max_tokens is {request.max_tokens}, together "
                f"{request.prompt_tokens + request.max_tokens}; the context of this model is {ready.max_context}.",
                param="prompt_tokens",
            )
        _check_capacity(request.prompt_tokens, request.max_tokens, ready)
        attention = attention_mode(request, self._settings, ready)
        prompt = Prompt(None, [0] * request.prompt_tokens)
        submits = [
            Submit(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=prompt.token_ids,
                sampling=SamplingParams(seed=choice, max_tokens=request.max_tokens),
                arrival_s=arrival_s,
                cache_salt=uuid.uuid4().hex,
                priority=request.priority or 0,
                due_s=_due_s(request.vashista, arrival_s),
                attention=attention,
            )
            for choice in range(num_choices)
        ]
        run = Run(submits, self._forecaster.predict(submits, time.monotonic()))
        return Asked([prompt], num_choices, request.vashista, run)

    def _submits(
        self,
        request: CompletionRequest | ChatRequest,
        prompts: Sequence[Prompt],
        max_tokens: Sequence[int],
        attention: AttentionMode,
        grammar: str | None,
        arrival_s: float,
    ) -> list[Submit]:
        """One for each choice of each prompt."""
        seed = first_seed(request)
        due_s = _due_s(request.vashista, arrival_s)
        return [
            Submit(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=prompt.token_ids,
                sampling=sampling_params(request, self._model, max_tokens=count, seed=seed + choice, grammar=grammar),
                arrival_s=arrival_s,
                cache_salt=request.cache_salt or "",
                priority=request.priority or 0,
                due_s=due_s,
                stop_at_s=due_s if request.vashista is not None and request.vashista.stop_at_deadline else None,
                attention=attention,
                is_streaming=bool(request.stream),
            )
            for prompt, count in zip(prompts, max_tokens, strict=True)
            for choice in range(request.num_choices)
        ]

    async def encode(
        self, texts: Sequence[str], most: int, *, add_special_tokens: bool, param: str = "prompt"
    ) -> list[list[int]]:
        """Token ids of each text; ContextLengthError when one has more than twice as many as `most`."""

        def work() -> list[list[int]]:
            found = []
            for text in texts:
                ids = self._model.tokenizer.encode_at_most(text, most, add_special_tokens)
                if ids is None:
                    raise ContextLengthError(
                        f"A text of {len(text)} characters has more than {2 * most} tokens, where at most {most} are "
                        "taken; it was not counted to its end.",
                        param=param,
                    )
                found.append(ids)
            return found

        num_chars = sum(map(len, texts))
        if num_chars <= INLINE_CHARS:
            return work()
        # One at a time: a text takes a hundred times its size in memory.
        async with self._encoding.of(num_chars):
            return await asyncio.to_thread(work)

    async def _chat_prompt(self, request: ChatRequest, max_context: int) -> Prompt:
        template = require_chat_template(self._model.chat_template)
        text = await template.render(
            await messages_for_template(request.messages),
            request.chat_template_kwargs or {},
            opens_turn=request.add_generation_prompt is not False,
            is_unfinished=bool(request.continue_final_message),
        )
        (token_ids,) = await self.encode([text], max_context, add_special_tokens=False, param="messages")
        if not token_ids:
            raise EmptyPromptError("The messages have no tokens.", param="messages")
        return Prompt(text, token_ids)

    async def _prompts(self, request: CompletionRequest, max_context: int) -> list[Prompt]:
        num_requests = len(request.prompt) * request.num_choices
        if num_requests > self._room.max_requests:
            raise InvalidRequestError(
                f"prompt: {len(request.prompt)} prompts with n = {request.num_choices} are {num_requests} requests; at "
                f"most {self._room.max_requests} fit into the queue.",
                param="prompt",
            )
        texts = [value for value in request.prompt if isinstance(value, str) and value]
        encoded = iter(await self.encode(texts, max_context, add_special_tokens=True))
        if sum(len(value) for value in request.prompt if not isinstance(value, str)) <= INLINE_IDS:
            self._check_ids(request, max_context)
        else:
            await asyncio.to_thread(self._check_ids, request, max_context)
        prompts = []
        for index, value in enumerate(request.prompt):
            prompt = Prompt(None, value)
            if isinstance(value, str):
                prompt = Prompt(value, next(encoded) if value else [])
            if not prompt.token_ids:
                raise EmptyPromptError(f"{_prompt_name(request, index)} has no tokens.", param="prompt")
            prompts.append(prompt)
        return prompts

    def _check_ids(self, request: CompletionRequest, max_context: int) -> None:
        """TokenOutOfVocabularyError names the prompt; one that is too long is refused for that, whatever its ids."""
        for index, value in enumerate(request.prompt):
            if isinstance(value, str) or len(value) > max_context:
                continue
            try:
                self._model.tokenizer.check_ids(value)
            except TokenOutOfVocabularyError as error:
                name = _prompt_name(request, index)
                raise TokenOutOfVocabularyError(f"{name}: {error.message}", param="prompt") from None

    def _max_tokens(self, request: CompletionRequest | ChatRequest, prompt: Prompt, ready: Ready) -> int:
        """The tokens that may be generated: as asked, or the default as far as the context has room."""
        num_prompt, limit = len(prompt.token_ids), ready.max_context
        asked = asked_max_tokens(request)
        scores_only = asked == 0
        if scores_only and not _reports_prompt(request):
            raise InvalidRequestError(
                "max_tokens: 0 is only allowed with echo or prompt_logprobs; ask for at least 1.", param="max_tokens"
            )
        if num_prompt > limit or (num_prompt == limit and not scores_only):
            raise ContextLengthError(
                f"The prompt has {num_prompt} tokens; the context of this model is {limit}, so a prompt may have at "
                f"most {limit - 1} to leave room for one token.",
                param="messages" if isinstance(request, ChatRequest) else "prompt",
            )
        room = limit - num_prompt
        max_tokens = min(default_max_tokens(request, self._settings), room) if asked is None else asked
        if max_tokens > room:
            raise ContextLengthError(
                f"The prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together "
                f"{num_prompt + max_tokens}; the context of this model is {limit}. "
                f"With this prompt max_tokens may be at most {room}.",
                param="max_tokens",
            )
        if (request.min_tokens or 0) > max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {request.min_tokens}, more than max_tokens, which is {max_tokens}.", param="min_tokens"
            )
        _check_capacity(num_prompt, max_tokens, ready)
        return max_tokens

    async def _grammar(self, request: CompletionRequest | ChatRequest) -> str | None:
        if request.response_format is None:
            return None
        response_format = request.response_format.model_dump(by_alias=True, exclude_none=True)
        grammar = compile_response_format(response_format)
        if grammar is not None:
            await asyncio.to_thread(self._grammars.validate, grammar)
        return grammar


def _prompt_name(request: CompletionRequest, index: int) -> str:
    return "prompt" if len(request.prompt) == 1 else f"prompt.{index}"


def _due_s(options: VashistaOptions | None, arrival_s: float) -> float | None:
    return None if options is None or options.deadline_s is None else arrival_s + options.deadline_s


def _reports_prompt(request: CompletionRequest | ChatRequest) -> bool:
    return request.prompt_logprobs is not None or bool(isinstance(request, CompletionRequest) and request.echo)


def _check_capacity(num_prompt: int, max_tokens: int, ready: Ready) -> None:
    num_tokens = num_prompt + max_tokens
    capacity = ready.num_pages * ready.page_size
    if -(-num_tokens // ready.page_size) > ready.num_pages:
        raise CacheCapacityError(
            f"The prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together {num_tokens}; the KV cache "
            f"of this server holds {capacity} ({ready.num_pages} pages of {ready.page_size}).",
            param="max_tokens",
        )
