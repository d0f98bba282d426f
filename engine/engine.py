"""The engine: requests in, token events out, one `step` at a time.

`engine/process.py` runs it in a process of its own; tests and `vashista complete` run the same class in theirs. A step
is: the scheduler chooses a batch, the runner computes it, the sampler draws, the output streams turn tokens into text
and decide who ends. Not thread-safe.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

from vashista.engine.attention.interface import Reserving
from vashista.engine.attention.policy import RequestPolicy, load_profile, make_policy, profile_path
from vashista.engine.busy_time import BusyTime
from vashista.engine.config import EngineConfig
from vashista.engine.deadlines import Deadlines
from vashista.engine.energy import Counter, PowerMeter, cpu_counter, gpu_counter
from vashista.engine.errors import (
    AttentionModeError,
    CacheCapacityError,
    ContextLengthError,
    EmptyPromptError,
    InvalidRequestError,
    NotEnoughMemoryError,
    SettingsError,
    StepMemoryError,
    TokenOutOfVocabularyError,
)
from vashista.engine.grammar import GrammarFactory
from vashista.engine.main_memory import is_shortage, shortage_named, shortage_text
from vashista.engine.messages import (
    EngineStats,
    FinishReason,
    Ready,
    Submit,
    TokenEvent,
    TokenLogprobs,
)
from vashista.engine.model_config import load_model_config
from vashista.engine.model_digest import model_digest
from vashista.engine.output import Ending, OutputStream
from vashista.engine.pace import Pace
from vashista.engine.pages import PageAllocator, root_hash
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.step_time import StepTimeModel, guess_of
from vashista.engine.prompt_logprobs import packed
from vashista.engine.request import Request
from vashista.engine.room_ahead import RoomAhead
from vashista.engine.runner import Progress, Runner, StepOutput
from vashista.engine.sampler import SamplingRow, choose, log_probabilities
from vashista.engine.scheduler import Batch, BatchItem, Promise, Scheduler, StepEstimate
from vashista.engine.step import Selection, to_device
from vashista.engine.step_estimate import ModelledStep
from vashista.engine.support import SpanSupport, SupportTally
from vashista.engine.tokenizer import Tokenizer
from vashista.engine.warm_up import warm_up
from vashista.engine.work import WorkModel

GPU_BATCH_TOKENS = 8192
CPU_BATCH_TOKENS = 512
MAX_SHORTAGES = 3
"""Steps in a row that may run out of memory before the engine ends."""


@dataclass(slots=True)
class _Choice:
    """The next tokens of some items, which the device may still be choosing."""

    items: list[BatchItem]
    logits: torch.Tensor
    """[len(items), vocab_size], float32, as the model gave them where somebody asks for log probabilities."""
    tokens: torch.Tensor
    """[len(items)], int64, as `choose` makes them."""


class Engine:
    """A loaded model that answers requests."""

    @shortage_named()
    def __init__(
        self, config: EngineConfig, progress: Progress | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Loads the model. Raises ModelError, SettingsError or one of their children."""
        started_s = clock()
        self._clock = clock
        model_config = load_model_config(config.model_dir)
        self._tokenizer = Tokenizer.load(config.model_dir, model_config.vocab_size)
        self._eos_token_ids = frozenset(model_config.eos_token_ids)
        self._grammars = GrammarFactory(self._tokenizer, model_config.vocab_size, self._eos_token_ids)
        self._profile = load_profile(config)
        self._runner = Runner(config, model_config, progress)
        self._policy = make_policy(config, self._runner.attention_shape, self._profile)
        attention = self._runner.attention
        self._room_ahead = RoomAhead(attention.stretches() if isinstance(attention, Reserving) else [])
        work = WorkModel.of(model_config)
        digest = model_digest(config.model_dir)
        self.step_times = StepTimeModel(self._first_guess(config, work, digest), work)
        prompt_rows = self._runner.model.prompt_rows

        def estimate() -> ModelledStep:
            return ModelledStep(self.step_times.coefficients, work, self._policy.whole_share, prompt_rows)

        self._scheduler = _make_scheduler(config, self._runner, estimate)
        self._deadlines = Deadlines(self._scheduler, estimate)
        self._streams: dict[str, OutputStream] = {}
        self._num_steps_total = self._num_computed_tokens_total = 0
        self._step_s = 0.0
        self._was_busy = False
        self._step_ended_s = 0.0
        self._num_shortages = 0
        self._busy = BusyTime(work, prompt_rows)
        self.progress: dict[str, int] = {}
        """After the last step: computed tokens of the requests that are not caught up, 0 of those that were preempted.
        """
        self._power = PowerMeter(_energy_counter(self._runner.device))
        if self._runner.device.type == "cuda":
            warm_up(self._runner, config.max_running_requests)
        self.ready = Ready(
            model_dir=config.model_dir,
            architecture=model_config.architecture,
            num_parameters=self._runner.num_parameters,
            dtype=str(self._runner.dtype).removeprefix("torch."),
            device=str(self._runner.device),
            device_name=self._runner.device_name,
            attention=self._runner.attention.name,
            has_support_profile=self._profile is not None,
            vocab_size=model_config.vocab_size,
            max_context=self._runner.max_context,
            page_size=config.page_size,
            num_pages=self._runner.num_pages,
            kv_bytes=self._runner.kv_bytes,
            eos_token_ids=list(model_config.eos_token_ids),
            load_s=clock() - started_s,
            rules=msgspec.structs.replace(self._scheduler.rules, prompt_rows=prompt_rows),
            coefficients=self.step_times.coefficients,
            dense_below=self._policy.options.dense_below,
            support_profile=str(profile_path(config)) if self._profile is not None else None,
            model_digest=digest,
        )

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self._streams)

    @property
    def stats(self) -> EngineStats:
        """The state after the last step."""
        pages, promise = self._scheduler.pages, self._scheduler.promise
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_pages=pages.num_pages,
            num_pages_used=pages.num_held,
            num_pages_cached=pages.num_cached,
            num_steps_total=self._num_steps_total,
            num_preemptions_total=self._scheduler.num_preemptions_total,
            num_broken_gaps_total=0 if promise is None else promise.pace.num_broken_total,
            num_computed_tokens_total=self._num_computed_tokens_total,
            step_s=self._step_s,
            busy_s_total=self._busy.total_s,
            step_ended_s=self._step_ended_s,
            cold=self._busy.cold,
            step_error=self.step_times.error,
            power_w=self._power.power_w,
            power_source=self._power.source,
        )

    @property
    def shares(self) -> dict[str, float]:
        """Seconds of the last step by request id."""
        return self._busy.shares

    def submit(self, submit: Submit) -> None:
        """Queue a request. Raises InvalidRequestError or a child if it can never run; the server checks before."""
        self._check(submit)
        salt = submit.cache_salt
        request = Request(submit, root_hash(self.ready.model_dir, salt=salt))
        stream = OutputStream.start(request, self._tokenizer, self._grammars, self._eos_token_ids)
        if request.is_sparse:
            shape = self._runner.attention_shape
            stream.policy = self._start_policy(submit)
            stream.support = SupportTally(shape.num_layers * shape.num_kv_heads)
        self._scheduler.add(request)
        self._deadlines.add(request)
        self._streams[request.id] = stream

    def abort(self, request_id: str) -> None:
        """End a request and free its pages now. An unknown id is ignored: it may just have ended."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._scheduler.finish(stream.request)

    def step(self) -> list[TokenEvent]:
        """Compute one batch and report what is new."""
        started_s = self._clock()
        ended = [self._end_late(request) for request in self._deadlines.late(started_s)]
        batch = self._scheduler.schedule()
        self.progress = {request.id: 0 for request in batch.preempted}
        for request in batch.preempted:
            self._streams[request.id].restart()
        if not batch.items:
            self._busy.rest()
            self._was_busy = False
            return ended
        if self._was_busy:
            self.step_times.observe_gap(started_s - self._step_ended_s)
        for item in batch.items:
            if item.request.scheduled_s is None:
                item.request.scheduled_s = started_s
        shortage = None
        try:
            works, events = self._compute(batch, started_s)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            shortage = shortage_text(error)
        if shortage is not None:  # and not while the exception lives, which keeps the tensors of the step
            return ended + self._fail_step(batch, shortage)
        events = ended + events
        self._num_shortages = 0
        self._num_steps_total += 1
        self._num_computed_tokens_total += batch.num_tokens
        before_s, self._step_ended_s = self._step_ended_s, self._clock()
        if batch.expected_s is not None and self._was_busy and self._scheduler.promise is not None:
            self._scheduler.promise.pace.observe(batch.expected_s, self._step_ended_s - before_s)
        self._step_s = self._step_ended_s - started_s
        self._was_busy = self.has_work
        self._busy.book(works, self._step_s)
        self.step_times.observe(self._busy.features, self._step_s)
        self._power.observe(self._busy.total_s)
        return events

    def _compute(self, batch: Batch, started_s: float) -> tuple[dict[str, float], list[TokenEvent]]:
        """The step itself: each request's work, and the events."""
        output = self._runner.execute(batch, _needs_all_rows, self._select)
        choice = self._choose(batch, output)  # launched while the device is still at the layers
        support = output.take_support()
        pause_s = 0.0 if self._was_busy else started_s - self._step_ended_s
        works = self._busy.weigh(batch, support, _needs_all_rows, pause_s)
        self._scheduler.complete(batch)
        self._tally(batch, support)
        self.progress |= {item.request.id: item.end for item in batch.items if not item.is_caught_up}
        return works, self._collect(batch, output, choice)

    def _fail_step(self, batch: Batch, shortage: str) -> list[TokenEvent]:
        """End the requests of a step that there was no memory for: the others, the weights and the cache stay.

        Raises NotEnoughMemoryError where step after step fails, so that a new process may do better.
        """
        self._num_shortages += 1
        if self._num_shortages > MAX_SHORTAGES:
            raise NotEnoughMemoryError(f"{self._num_shortages} steps in a row ran out of memory: {shortage}.")
        for item in batch.items:
            self.abort(item.request.id)
        gc.collect()
        if self._runner.device.type == "cuda":
            torch.cuda.empty_cache()
        self._busy.rest()
        self._was_busy = False
        self._step_ended_s = self._clock()
        said = f"no memory for a step of {batch.num_tokens} tokens of {len(batch.items)} requests"
        sys.stderr.write(f"engine: {said}: {shortage}\n")
        return [
            TokenEvent(
                item.request.id,
                finish_reason=FinishReason.ERROR,
                error_code=StepMemoryError.code,
                error_message=f"The engine had {said}.",
            )
            for item in batch.items
        ]

    def make_room(self) -> bool:
        """Between steps, while there is nothing to do: a little of what later steps need; False if that is there."""
        return self._room_ahead.extend(self._scheduler.pages.num_ever_held)

    def keep_room(self) -> None:
        """After a step: a little of the same, if later steps would soon have to take it themselves, all at once.

        What that takes is none of the pause between two steps, whose length predictions rest on.
        """
        if self._room_ahead.is_short(self._scheduler.pages.num_ever_held):
            started_s = self._clock()
            self.make_room()
            self._step_ended_s += self._clock() - started_s

    def check(self) -> None:
        """Assert that requests, streams and pages balance. For tests."""
        self._scheduler.check()
        assert {request.id for request in self._scheduler.requests} == set(self._streams)

    def _first_guess(self, config: EngineConfig, work: WorkModel, digest: str) -> StepCoefficients:
        """What steps take: as an earlier engine learnt it here, as it was calibrated, or as its like does."""
        device, dtype = self._runner.device, str(self._runner.dtype).removeprefix("torch.")
        name, saved = self._runner.device_name, config.step_times
        if saved is not None and (saved.model_digest, saved.device_name, saved.dtype) == (digest, name, dtype):
            return saved.coefficients
        times = None if self._profile is None else self._profile.devices.get(name)
        if times is not None and times.dtype != dtype:
            times = None
        return guess_of(work, device=device.type, dtype=dtype, times=times)

    def _start_policy(self, submit: Submit) -> RequestPolicy:
        """Of a sparse request; the seed of one that draws nothing must not change what it says."""
        seed = submit.sampling.seed if submit.sampling.temperature > 0.0 else 0
        return self._policy.start(submit.attention, submit.prompt_token_ids, seed)

    def _select(self, item: BatchItem) -> Selection | None:
        """What an item may attend to: generated tokens of sparse requests only."""
        policy = self._streams[item.request.id].policy
        if policy is None or not item.is_generated:
            return None
        return policy.select(item.end)

    def _tally(self, batch: Batch, supports: dict[str, SpanSupport]) -> None:
        """Book what the sparse requests of the step left out, and let their budgets learn from it."""
        for item in batch.items:
            stream = self._streams[item.request.id]
            if stream.policy is None or stream.support is None or not item.is_generated:
                continue
            support = supports.get(item.request.id)
            if support is None:
                stream.support.add_dense(self._runner.attention_shape.num_visible(item.end))
            else:
                stream.support.add(support)
                stream.policy.learn(support)

    def _choose(self, batch: Batch, output: StepOutput) -> _Choice | None:
        """Launch the choice of the next tokens, for the items that have caught up and want one."""
        items = [item for item in batch.items if item.is_caught_up and item.request.sampling.max_tokens > 0]
        if not items:
            return None
        rows = [output.rows[item.request.id][-1] for item in items]
        hidden = output.hidden
        if rows != list(range(hidden.shape[0])):
            hidden = hidden[to_device(rows, hidden.device)]
        logits = self._runner.logits(hidden)
        raw = logits.clone() if any(item.request.sampling.logprobs is not None for item in items) else logits
        return _Choice(items, raw, choose(logits, [self._sampling_row(item.request) for item in items]))

    def _collect(self, batch: Batch, output: StepOutput, choice: _Choice | None) -> list[TokenEvent]:
        """Make the events of the items that have caught up; waits for the device."""
        for item in batch.items:
            if _needs_all_rows(item):
                self._add_prompt_logprobs(item, output)
        events = [
            self._finish(item.request, "", Ending(FinishReason.LENGTH))
            for item in batch.items
            if item.is_caught_up and item.request.sampling.max_tokens == 0
        ]
        if choice is None:
            return events
        tokens: list[int] = choice.tokens.tolist()
        requests = [item.request for item in choice.items]
        logprobs = _sampled_logprobs(choice.logits, tokens, requests)
        for request, token in zip(requests, tokens, strict=True):
            events.append(self._advance(request, token, logprobs.get(request.id)))
        return events

    def _advance(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> TokenEvent:
        """Append a sampled token and make its event."""
        if token < 0:
            return self._fail(request)
        request.token_ids.append(token)
        text, ending = self._streams[request.id].push(token)
        if ending is not None:
            return self._finish(request, text, ending, [token], logprobs)
        return self._event(request, [token], text, logprobs)

    def _finish(
        self,
        request: Request,
        text: str,
        ending: Ending,
        token_ids: list[int] | None = None,
        logprobs: TokenLogprobs | None = None,
    ) -> TokenEvent:
        event = self._event(request, token_ids or [], text, logprobs, ending)
        del self._streams[request.id]
        self._scheduler.finish(request)
        return event

    def _end_late(self, request: Request) -> TokenEvent:
        """End a request that misses its deadline, with the text that was held back."""
        detokenizer = self._streams[request.id].detokenizer
        text = detokenizer.flush()
        if detokenizer.matched_stop is not None:
            return self._finish(request, text, Ending(FinishReason.STOP, detokenizer.matched_stop))
        return self._finish(request, text, Ending(FinishReason.DEADLINE))

    def _fail(self, request: Request) -> TokenEvent:
        """No token has a finite logit: the masks exclude all of them, or the model computed NaN."""
        constrained = self._streams[request.id].matcher is not None
        self.abort(request.id)
        return TokenEvent(
            request.id,
            finish_reason=FinishReason.ERROR,
            error_code="invalid_grammar" if constrained else "internal_error",
            error_message="The grammar allows no further token of this model's vocabulary."
            if constrained
            else "The model gave no finite logits.",
        )

    def _event(
        self,
        request: Request,
        token_ids: list[int],
        text: str,
        logprobs: TokenLogprobs | None,
        ending: Ending | None = None,
    ) -> TokenEvent:
        stream = self._streams[request.id]
        is_first = not stream.has_reported
        stream.has_reported = True
        return TokenEvent(
            request.id,
            token_ids=token_ids,
            text=text,
            logprobs=[logprobs] if logprobs is not None else None,
            prompt_logprobs=stream.prompt_logprobs if is_first and stream.prompt_logprobs else None,
            finish_reason=ending.reason if ending else None,
            stop_reason=ending.stop_reason if ending else None,
            support=stream.support.report() if ending and stream.support else None,
            num_cached_tokens=request.num_cached_tokens if is_first else None,
            scheduled_s=request.scheduled_s if is_first else None,
        )

    def _sampling_row(self, request: Request) -> SamplingRow:
        stream = self._streams[request.id]
        allowed = None
        if stream.matcher is not None:
            mask = torch.from_numpy(stream.matcher.allowed_tokens())
            allowed = mask.to(self._runner.device, non_blocking=True)
        forbidden = stream.forbidden_token_ids()
        return SamplingRow(request.sampling, request.token_ids, request.num_prompt_tokens, forbidden, allowed)

    def _add_prompt_logprobs(self, item: BatchItem, output: StepOutput) -> None:
        """Log probabilities of the prompt tokens that follow the item's positions."""
        request, stream = item.request, self._streams[item.request.id]
        num_top = request.sampling.prompt_logprobs
        assert num_top is not None
        if not stream.prompt_logprobs:
            stream.prompt_logprobs += packed([None], 0)
        rows = output.rows[request.id]
        rows = rows[: min(item.end, request.num_prompt_tokens - 1) - item.start]
        position = item.start + 1
        for part in self._runner.chunks(rows):
            token_ids = request.token_ids[position : position + len(part)]
            logits = self._runner.logits(output.hidden[part.start : part.stop])
            stream.prompt_logprobs += packed(log_probabilities(logits, token_ids, [num_top] * len(part)), num_top)
            position += len(part)

    def _check(self, submit: Submit) -> None:
        ready, prompt, max_tokens = self.ready, submit.prompt_token_ids, submit.sampling.max_tokens
        if submit.request_id in self._streams:
            raise InvalidRequestError(f"The request id {submit.request_id} is in use.")
        if not prompt:
            raise EmptyPromptError("The prompt has no tokens.")
        if min(prompt) < 0 or max(prompt) >= ready.vocab_size:
            raise TokenOutOfVocabularyError(f"Token ids run from 0 to {ready.vocab_size - 1}.")
        if submit.attention.is_sparse and ready.attention == "dense":
            raise AttentionModeError("This engine's attention is dense; it keeps no key summaries.")
        num_tokens = len(prompt) + max_tokens
        if num_tokens > ready.max_context:
            raise ContextLengthError(
                f"{len(prompt)} prompt tokens and max_tokens {max_tokens} exceed the context of {ready.max_context}."
            )
        if self._scheduler.num_pages_for(num_tokens) > ready.num_pages:
            raise CacheCapacityError(
                f"{len(prompt)} prompt tokens and max_tokens {max_tokens} need "
                f"{self._scheduler.num_pages_for(num_tokens)} KV pages; there are {ready.num_pages}."
            )


def _make_scheduler(config: EngineConfig, runner: Runner, estimate: Callable[[], StepEstimate]) -> Scheduler:
    default = GPU_BATCH_TOKENS if runner.device.type == "cuda" else CPU_BATCH_TOKENS
    max_batch_tokens = config.max_batch_tokens or max(default, config.max_running_requests)
    if max_batch_tokens < config.max_running_requests:
        raise SettingsError(
            f"max_batch_tokens is {max_batch_tokens}, but each of max_running_requests={config.max_running_requests} "
            "needs a token in every step."
        )
    return Scheduler(
        PageAllocator(runner.num_pages),
        page_size=config.page_size,
        max_running_requests=config.max_running_requests,
        max_batch_tokens=max_batch_tokens,
        prefix_caching=config.prefix_caching,
        promise=None if config.max_token_gap_s is None else Promise(Pace(config.max_token_gap_s), estimate),
    )


def _energy_counter(device: torch.device) -> Counter | None:
    if device.type == "cuda":
        return gpu_counter(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return cpu_counter()


def _needs_all_rows(item: BatchItem) -> bool:
    """Whether the item computes prompt positions whose log probabilities were asked for and not yet reported."""
    request = item.request
    return request.sampling.prompt_logprobs is not None and request.num_output_tokens == 0


def _sampled_logprobs(logits: torch.Tensor, tokens: list[int], requests: list[Request]) -> dict[str, TokenLogprobs]:
    """Log probabilities of the sampled tokens, for the requests that asked for them."""
    asked = [i for i, r in enumerate(requests) if r.sampling.logprobs is not None and tokens[i] >= 0]
    if not asked:
        return {}
    rows = logits[torch.tensor(asked, device=logits.device)]
    num_top = [requests[i].sampling.logprobs or 0 for i in asked]
    logprobs = log_probabilities(rows, [tokens[i] for i in asked], num_top)
    return {requests[i].id: value for i, value in zip(asked, logprobs, strict=True)}
