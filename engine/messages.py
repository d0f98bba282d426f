"""What travels between the server and the engine process, and the words both use.

Everything here is a msgspec Struct: immutable, typed, encoded as MessagePack by `engine/channel.py`. The server sends
`Submit`, `Abort` and `Stop`; the engine answers with one `Ready`, then one `StepReport` a step, or `Failed` before it
ends. Times are seconds of CLOCK_MONOTONIC, which both processes share. This file imports no torch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from vashista.engine.predict.coefficients import StepCoefficients


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    DEADLINE = "deadline"
    """It could not be done by its deadline any more, and was to be stopped then."""


class AttentionMode(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the tokens that a request generates attend to its context; a prompt always attends to all of it.

    Without a limit the request is dense. With one it is sparse: each KV head attends to its best tokens, at most
    `token_budget` of them, or as many as keep the dropped mass at `max_dropped_mass` on average.
    """

    token_budget: int | None = None
    max_dropped_mass: float | None = None
    """A share of the attention mass, above 0 and below 1."""

    @property
    def is_sparse(self) -> bool:
        """Whether tokens may be left out."""
        return self.token_budget is not None or self.max_dropped_mass is not None


DENSE = AttentionMode()


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens of one request are chosen and when it ends. Ranges are checked by the server at the edge."""

    seed: int
    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """1 is off; counts prompt and output tokens, as in transformers. The two penalties above count output tokens."""
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings that appears in it."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends after one of these; its text is left out like that of an end-of-sequence token."""
    min_tokens: int = 0
    """End-of-sequence and stop ids are masked, and stop strings ignored, until so many tokens are there."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Number of alternatives a token to report; 0 reports the chosen token alone; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens. Switches reading (not writing) of the prefix cache off for the request."""
    grammar: str | None = None
    """A llguidance grammar that the output must match (engine/grammar.py builds and checks it)."""


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A valid, tokenised request for the engine."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_s: float
    cache_salt: str = ""
    """Requests share cached pages only with requests of the same salt."""
    priority: int = 0
    """Lower runs first; equal priorities run in order of arrival."""
    due_s: float | None = None
    """When the request should be done, of one with a deadline; its place in the queue then follows from this alone."""
    stop_at_s: float | None = None
    """End it with the reason `deadline` as soon as it cannot be done by then."""
    attention: AttentionMode = DENSE
    """Must be dense where `Ready.attention` is."""
    is_streaming: bool = True
    """Whether each token is wanted at once; else news of it may come a few together."""


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Free everything the request holds within one step.

    It is answered with an event of the reason `abort`, behind which no share of a step comes for the request. An
    unknown id is no error: the request may just have ended.
    """

    request_id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the engine process."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, of the model's raw distribution (before penalties and temperature)."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most probable token."""
    top: list[tuple[int, float]] = []
    """The most probable (token id, logprob), best first."""


class SupportAudit(msgspec.Struct, frozen=True):
    """What was measured exactly, on a sample of the head-steps. Masses are shares, supports are tokens."""

    num_audits: int
    dropped_mass: float
    """Mean over the audits, the sample of all head-steps of the request that were sparse."""
    dropped_mass_low: float
    """Ends of a 95 % confidence interval of the mean (Student's t, within 0 and 1); 0 and 1 for a single audit."""
    dropped_mass_high: float
    dropped_mass_deviation: float
    """Standard deviation of the sample; 0 for a single audit."""
    dropped_mass_max: float
    effective_support: float
    """Mean of e to the entropy of the attention."""
    support_90: float
    """Mean number of tokens that hold 90 % of the mass."""
    support_99: float


class SupportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the attention of a sparse request left out. A head-step is one generated token in one KV head of one layer.

    Means are over all head-steps; those that ran dense dropped nothing. A query group counts with its worst head.
    """

    num_head_steps: int
    dense_share: float
    """Share of the head-steps that attended to everything."""
    tokens_attended: float
    tokens_visible: float
    dropped_mass_bound: float
    """Certain: the mean dropped mass is not above this. 1 says nothing."""
    dropped_mass_estimate: float | None
    """From the key summaries; may be wrong either way. None where the attention module keeps no summaries."""
    support_gap: float | None
    """Nats: log of the kept mass minus the greatest logit estimated among the dropped tokens; None if all ran
    dense, or without summaries."""
    audit: SupportAudit | None = None
    """None if no head-step was audited."""


class TokenEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step's news of one request."""

    request_id: str
    token_ids: list[int] = []
    text: str = ""
    """Text that became certain in this step: whole characters that can no longer be part of a stop string."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[msgspec.Raw] | None = None
    """As `engine/prompt_logprobs.py` packs them; with the first event only."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the request; None for end of sequence."""
    error_code: str | None = None
    error_message: str | None = None
    num_cached_tokens: int | None = None
    """Prompt tokens taken from the prefix cache; with the first event only."""
    scheduled_s: float | None = None
    """When the request first ran; with the first event only."""
    support: SupportReport | None = None
    """With the last event of a sparse request that generated a token after its first."""
    age_s: float = 0.0
    """How long the event was held before it was sent: not at all where the request is streamed."""


class EngineStats(msgspec.Struct, frozen=True):
    """The engine's state after a step. Counters run from the start of the process."""

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_pages_used: int = 0
    """Pages held by requests."""
    num_pages_cached: int = 0
    """Pages free to be taken but still holding a reusable prefix."""
    num_steps_total: int = 0
    num_preemptions_total: int = 0
    num_broken_gaps_total: int = 0
    """Steps that gave running streams their next token later than max_token_gap_s promises."""
    num_computed_tokens_total: int = 0
    step_s: float = 0.0
    busy_s_total: float = 0.0
    """Seconds in steps; the shares of all step reports add up to it."""
    step_ended_s: float = 0.0
    """When the last step ended; 0 before the first."""
    cold: float = 0.0
    """Of the next step, if it has few tokens: `StepFeatures.cold`."""
    step_error: float = 0.0
    """Mean relative error, without sign, of what was expected of the last steps."""
    power_w: float | None = None
    """What the device draws while it computes; None where nothing measures it."""
    power_source: Literal["nvml", "rapl"] | None = None
    """Who measured it."""


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """A step's news, or those of a few steps where nobody waits for them; without events while idle, once a second."""

    events: list[TokenEvent]
    stats: EngineStats
    shares: dict[str, float] = {}
    """Seconds of the steps by request id, for every request that was computed in them, events or none."""
    progress: dict[str, int] = {}
    """Computed tokens of the requests whose known tokens are not all computed; 0 of one that lost its pages."""
    coefficients: StepCoefficients | None = None
    """What steps take, where that has changed."""


class SchedulerRules(msgspec.Struct, frozen=True, kw_only=True):
    """By what the engine's scheduler makes its steps."""

    page_size: int
    num_pages: int
    max_running_requests: int
    max_batch_tokens: int
    prefix_caching: bool
    max_token_gap_s: float | None = None
    """The promise to running streams; None makes none."""
    prompt_rows: tuple[int, ...] = ()
    """Rows of the CUDA graphs for prompts, fewest first: to them a step's tokens of prompts are padded, and beside
    streams it is split into two graphs, one after the other. More tokens, or all where there is no graph, are computed
    as they are, together with the streams."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How far the model is loaded."""

    loaded_bytes: int
    total_bytes: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded: what the server must know to admit requests."""

    model_dir: str
    architecture: str
    num_parameters: int
    dtype: str
    device: str
    device_name: str
    attention: str
    """Name of the attention module; `dense` cannot run sparse requests."""
    has_support_profile: bool
    """Whether budgets for a dropped mass come from a measured profile of this model."""
    vocab_size: int
    max_context: int
    """Tokens of prompt and output together that one request may have."""
    page_size: int
    num_pages: int
    kv_bytes: int
    eos_token_ids: list[int]
    load_s: float
    rules: SchedulerRules | None = None
    """With these and the next, what a request will take can be told; None of an engine that does not say."""
    coefficients: StepCoefficients | None = None
    """What steps take, as far as it is known before the first."""
    dense_below: int = 0
    """Sparse requests attend in full to contexts of fewer tokens."""
    support_profile: str | None = None
    """File of the support profile, if there is one."""
    model_digest: str = ""
    """Of the model's files (`engine/model_digest.py`)."""


class Attempt(msgspec.Struct, frozen=True, tag=True):
    """Code of the engine's process tried to reach out; `engine/egress.py` saw it."""

    what: str
    """Of a small set of words: socket, connect, send, resolve, program."""
    detail: str
    """The address, name or program."""
    culprit: str
    """`file:line function`."""
    times: int = 1


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start or go on; it ends after this message."""

    code: str
    message: str


ToEngine = Submit | Abort | Stop
FromEngine = Ready | Progress | StepReport | Attempt | Failed
