"""What the server answers, as msgspec structs: encoded directly, and the source of the responses in /openapi.json."""

from __future__ import annotations

from typing import Literal

import msgspec

from vashista.engine.messages import AttentionMode, SupportReport
from vashista.engine.predict.prediction import Measured, Prediction
from vashista.server.prices import Cost


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all bodies."""


class ErrorBody(Response, frozen=True, kw_only=True):
    """OpenAI's error object, and what to do about it."""

    message: str
    type: str
    param: str | None
    code: str
    remedy: str
    request_id: str | None = None
    prediction: Prediction | msgspec.UnsetType = msgspec.UNSET
    """What was said of a request that is refused for it."""


class ErrorResponse(Response, frozen=True, kw_only=True):
    """The body of every reply that is not a success."""

    error: ErrorBody


class AnthropicErrorBody(Response, frozen=True, kw_only=True):
    """Anthropic's error object, and what to do about it."""

    type: str
    message: str
    param: str | None
    code: str
    remedy: str
    prediction: Prediction | msgspec.UnsetType = msgspec.UNSET


class AnthropicErrorResponse(Response, frozen=True, kw_only=True):
    """The same for the paths of Anthropic's protocol."""

    type: Literal["error"] = "error"
    error: AnthropicErrorBody
    request_id: str | None


class PromptTokensDetails(Response, frozen=True, kw_only=True):
    """What is special about the prompt's tokens."""

    cached_tokens: int


class AskedAttention(Response, frozen=True, kw_only=True, omit_defaults=True):
    """How a request was to attend, in the form in which requests say it."""

    mode: Literal["dense", "sparse"]
    token_budget: int | None = None
    max_dropped_mass: float | None = None

    @classmethod
    def of(cls, asked: AttentionMode) -> AskedAttention:
        """The same, said as a request would."""
        mode: Literal["dense", "sparse"] = "sparse" if asked.is_sparse else "dense"
        return cls(mode=mode, token_budget=asked.token_budget, max_dropped_mass=asked.max_dropped_mass)


class Adapted(Response, frozen=True, kw_only=True):
    """How a request attends that would else have missed its deadline or its limit of cost."""

    asked: AskedAttention
    """What it asked for, or what the server does with requests that ask for nothing."""
    token_budget: int
    expected_dropped_mass: float


class VashistaUsage(Response, frozen=True, kw_only=True, omit_defaults=True):
    """What goes beyond the OpenAI protocol."""

    support: SupportReport | None = None
    """What the attention left out, over all choices; of sparse requests that generated a token after the first."""
    cost: Cost | None = None
    """What the request took; at its end."""
    prediction: Prediction | None = None
    """What was said of it before it ran; None where nothing could be said."""
    outcome: Measured | None = None
    """What the prediction is to be compared with; at its end."""
    adapted: Adapted | None = None
    """Of a request with `adapt` that attends to fewer tokens than it asked for."""


class Usage(Response, frozen=True, kw_only=True, omit_defaults=True):
    """Tokens that the request took. The prompt of n choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    vashista: VashistaUsage | None = None
    """At the end of the request."""


class PromptToken(Response, frozen=True, kw_only=True):
    """One candidate at one position of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]
"""For each token of the prompt, token id -> candidate; the first has none."""


class CompletionLogprobs(Response, frozen=True, kw_only=True):
    """Log probabilities of a completion, as four lists of equal length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


Reason = Literal["stop", "length", "deadline"]


class CompletionChoice(Response, frozen=True, kw_only=True):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Response, frozen=True, kw_only=True):
    """The reply of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatTopLogprob(Response, frozen=True, kw_only=True):
    """One alternative at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(Response, frozen=True, kw_only=True):
    """One chosen token and its alternatives."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(Response, frozen=True, kw_only=True):
    """Log probabilities of a chat reply."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(Response, frozen=True, kw_only=True):
    """The reply of the model."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Response, frozen=True, kw_only=True):
    """One reply."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason
    stop_reason: str | int | None = None


class ChatCompletion(Response, frozen=True, kw_only=True):
    """The reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "deadline"]


class TextBlock(Response, frozen=True, kw_only=True):
    """The text of a message."""

    type: Literal["text"] = "text"
    text: str


class MessageUsage(Response, frozen=True, kw_only=True, omit_defaults=True):
    """Tokens that a message took. `input_tokens` and `cache_read_input_tokens` together are the prompt."""

    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    vashista: VashistaUsage | None = None
    """As in `Usage`."""


class Message(Response, frozen=True, kw_only=True):
    """The reply of /v1/messages."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock]
    stop_reason: StopReason | None
    """None at the start of a stream."""
    stop_sequence: str | None
    usage: MessageUsage


class ModelCard(Response, frozen=True, kw_only=True):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    digest: str | None = None
    digest_kind: Literal["signed_manifest", "sampled"] = "sampled"
    signed_by: str | None = None


class ModelList(Response, frozen=True, kw_only=True):
    """The reply of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(Response, frozen=True, kw_only=True):
    """The reply of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Response, frozen=True, kw_only=True):
    """The reply of /detokenize."""

    prompt: str


class Health(Response, frozen=True, kw_only=True):
    """The reply of /health: the server process answers."""

    status: Literal["ok"] = "ok"


class Readiness(Response, frozen=True, kw_only=True):
    """The reply of /ready: requests can be answered now."""

    status: Literal["ready"] = "ready"
    model: str
    architecture: str
    num_parameters: int
    dtype: str
    device: str
    device_name: str
    attention: str
    max_context: int
    page_size: int
    num_pages: int
    kv_bytes: int
    load_s: float


class Version(Response, frozen=True, kw_only=True):
    """The reply of /version."""

    version: str


class AdmissionVerdict(Response, frozen=True, kw_only=True):
    """Whether a request would be let in now."""

    would_admit: bool
    error: ErrorBody | None
    """With which it would be refused."""
    retry_after_s: float | None
    """When to try again, where waiting helps."""


class PredictReply(Response, frozen=True, kw_only=True):
    """The reply of /v1/predict."""

    object: Literal["prediction"] = "prediction"
    model: str
    admission: AdmissionVerdict
    prediction: Prediction | None
    """None where the engine does not say what its steps take."""
    adapted: Adapted | None = None
    """How it would attend, where that is not as it asked."""
