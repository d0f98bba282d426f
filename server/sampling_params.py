"""From the request's fields to the engine's `SamplingParams`: limits of this server, defaults of this model.

Ranges that hold everywhere are in the schemas; here are those that depend on settings and vocabulary. Called by
`server/admission.py` alone.
"""

from __future__ import annotations

import secrets

from vashista.engine.errors import InvalidRequestError, TokenOutOfVocabularyError, TooManyStopsError
from vashista.engine.messages import SamplingParams
from vashista.server.schemas.chat import ChatRequest
from vashista.server.schemas.completions import CompletionRequest
from vashista.server.schemas.sampling import SamplingFields
from vashista.server.served_model import ServedModel
from vashista.server.settings import Settings

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default of /v1/completions."""
SEED_MODULUS = 1 << 63
MAX_STOP_CHARS = 1024


def check_limits(request: SamplingFields, settings: Settings, model: ServedModel) -> None:
    """Everything that needs no prompt. Raises InvalidRequestError or a child."""
    if request.num_choices > settings.max_n:
        raise InvalidRequestError(f"n: at most {settings.max_n} on this server, got {request.num_choices}.", param="n")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options: only allowed with stream: true.", param="stream_options")
    stops = {request.stop_name: len(request.stop or ()), "stop_token_ids": len(request.stop_token_ids or ())}
    for name, count in stops.items():
        if count > settings.max_stops:
            raise TooManyStopsError(f"{name}: at most {settings.max_stops} on this server, got {count}.", param=name)
    if any(len(stop) > MAX_STOP_CHARS for stop in request.stop or ()):
        message = f"{request.stop_name}: a stop string has at most {MAX_STOP_CHARS} characters."
        raise InvalidRequestError(message, param=request.stop_name)
    asked = {"prompt_logprobs": request.prompt_logprobs, **_logprobs_fields(request)}
    for name, value in asked.items():
        if value is not None and value > settings.max_logprobs:
            message = f"{name}: at most {settings.max_logprobs} on this server, got {value}."
            raise InvalidRequestError(message, param=name)
    _check_token_ids("stop_token_ids", request.stop_token_ids or [], model)
    _check_token_ids("logit_bias", [int(key) for key in request.logit_bias or {}], model)
    if isinstance(request, ChatRequest):
        _check_chat(request)


def sampling_params(
    request: SamplingFields, model: ServedModel, *, max_tokens: int, seed: int, grammar: str | None
) -> SamplingParams:
    """The parameters of one choice."""
    defaults = model.config.generation_defaults
    return SamplingParams(
        seed=seed % SEED_MODULUS,
        max_tokens=max_tokens,
        temperature=_first(request.temperature, defaults.temperature, 1.0),
        top_p=_first(request.top_p, defaults.top_p, 1.0),
        top_k=max(0, int(_first(request.top_k, defaults.top_k, 0))),
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias={int(key): bias for key, bias in (request.logit_bias or {}).items()},
        stop=tuple(request.stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        min_tokens=request.min_tokens or 0,
        ignore_eos=bool(request.ignore_eos),
        logprobs=num_logprobs(request),
        prompt_logprobs=num_prompt_logprobs(request),
        grammar=grammar,
    )


def asked_max_tokens(request: SamplingFields) -> int | None:
    """The number of tokens that the request names, None when it names none."""
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens
    assert isinstance(request, ChatRequest | CompletionRequest)
    return request.max_tokens


def default_max_tokens(request: SamplingFields, settings: Settings) -> int:
    """What a request gets that names none, if the context has so much left."""
    return settings.default_max_tokens if isinstance(request, ChatRequest) else COMPLETION_MAX_TOKENS


def num_logprobs(request: SamplingFields) -> int | None:
    """Alternatives to report for each generated token; None reports nothing."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    assert isinstance(request, CompletionRequest)
    return request.logprobs


def num_prompt_logprobs(request: SamplingFields) -> int | None:
    """The same for the prompt's tokens, which echo with logprobs needs too."""
    echoed = num_logprobs(request) if isinstance(request, CompletionRequest) and request.echo else None
    asked = [count for count in (echoed, request.prompt_logprobs) if count is not None]
    return max(asked, default=None)


def first_seed(request: SamplingFields) -> int:
    """The seed of choice 0; the others count up from it."""
    return secrets.randbits(62) if request.seed is None else request.seed


def _logprobs_fields(request: SamplingFields) -> dict[str, int | None]:
    if isinstance(request, ChatRequest):
        return {"top_logprobs": request.top_logprobs}
    assert isinstance(request, CompletionRequest)
    return {"logprobs": request.logprobs}


def _check_chat(request: ChatRequest) -> None:
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequestError("top_logprobs: only allowed with logprobs: true.", param="top_logprobs")
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other: a reply either goes on with the last "
            "message or begins a new one.",
            param="continue_final_message",
        )
    both = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(both) > 1:
        raise InvalidRequestError(
            f"max_tokens is {request.max_tokens} and max_completion_tokens is {request.max_completion_tokens}; they "
            "are two names of one thing: send one.",
            param="max_tokens",
        )


def _check_token_ids(name: str, token_ids: list[int], model: ServedModel) -> None:
    try:
        model.tokenizer.check_ids(token_ids)
    except TokenOutOfVocabularyError as error:
        raise TokenOutOfVocabularyError(f"{name}: {error.message}", param=name) from None


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
