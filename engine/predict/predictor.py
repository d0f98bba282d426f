"""What a request would take if it came now, before any correction: the queue run forward with it at its place.

`server/forecaster.py` owns one `Predictor`, keeps its parts up to date, and puts intervals around what it says.
No torch, no clock: times are those that the caller gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from vashista.engine.busy_time import is_shaped
from vashista.engine.messages import AttentionMode, SchedulerRules, Submit
from vashista.engine.predict.arrivals import Arrivals
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.conformal import ALONE
from vashista.engine.predict.decode_costs import Costs, DecodeCosts
from vashista.engine.predict.expected_support import SupportForecast
from vashista.engine.predict.features import idle_of
from vashista.engine.predict.forward import Forward, Given, Start, load, packed, write_costs
from vashista.engine.predict.kind_table import KindTable
from vashista.engine.predict.lengths import OutputLengths
from vashista.engine.predict.queue import Entry, QueueMirror
from vashista.engine.predict.simulate import Job, Machine, Simulation
from vashista.engine.predict.timeline import Timeline
from vashista.engine.request import PATIENCE_S, rank_of
from vashista.engine.work import WorkModel

HITCH_SHARE = 0.25
"""Of a step full of others' prompts, a token's hitch. Replayed over 19 loaded cells, 0.1 to 0.6 of it cover and are as
wide about alike: docs/prediction-findings.md."""


class Forecast(msgspec.Struct, frozen=True):
    """Of one HTTP request, uncorrected; seconds from the moment it was made."""

    timeline: Timeline
    now_s: float
    num_tokens: int
    regime: str
    """How loaded the engine is and how the request attends; errors are told apart by it."""
    newcomers_per_s: float
    num_arrived: int
    """Requests that had come before."""
    num_steps: int
    """Steps that had taught how long steps take."""
    hitch_s: float
    """How much longer a token may take however little was foreseen, as `Bounds` has it; 0 where nobody is expected."""

    @property
    def is_idle(self) -> bool:
        """Whether nobody else was in the engine."""
        return self.regime == ALONE or self.regime.startswith("idle")

    def regimes_of(self, num_tokens: int, num_arrived: int) -> tuple[str, ...]:
        """What its outcome is an outcome of, its own regime first; num_arrived: requests by its end, it among them.

        Where others were expected but none before its end, and none came, it went as for one that is ALONE.
        """
        is_first = num_arrived == self.num_arrived + 1 and self.newcomers_per_s * self.total_s(num_tokens) < 1.0
        return (self.regime, ALONE) if self.regime != ALONE and self.is_idle and is_first else (self.regime,)

    @property
    def ttft_s(self) -> float:
        """Until the first token."""
        return max(self.timeline.first_s - self.now_s, 1e-6)

    def total_s(self, num_tokens: int) -> float:
        """Until the last of so many tokens."""
        return max(self.timeline.at(num_tokens)[0] - self.now_s, 1e-6)

    def time_per_token_s(self, num_tokens: int) -> float:
        """Mean of the tokens after the first; num_tokens: at least 2."""
        first_s = self.timeline.point(0).time_s
        return max(self.timeline.at(num_tokens)[0] - first_s, 1e-9) / (num_tokens - 1)

    def busy_s(self, num_tokens: int) -> float:
        """The request's share of the engine's time."""
        return max(self.timeline.at(num_tokens)[1], 1e-9)


class Predictor:
    """For one model on one engine."""

    def __init__(
        self,
        work: WorkModel,
        rules: SchedulerRules,
        coefficients: StepCoefficients,
        support: SupportForecast,
        *,
        is_plain: bool = False,
    ):
        """is_plain: to run the queue forward in Python although there is compiled code for it."""
        self.work = work
        self.rules = rules
        self.support = support
        self.lengths = OutputLengths()
        self.arrivals = Arrivals()
        self.pickup_s = 3e-4
        """From the moment a request is sent to an idle engine until its first step begins."""
        self._costs = DecodeCosts(work, support)
        self._kinds = KindTable(self._costs)
        self._forward: Forward | None = None if is_plain else load()
        self._packed = packed(rules, work)
        self.set_coefficients(coefficients)

    @property
    def is_compiled(self) -> bool:
        """Whether the queue is run forward by compiled code."""
        return self._forward is not None and self._packed is not None

    @property
    def coefficients(self) -> StepCoefficients:
        """What steps take now."""
        return self._machine.coefficients

    def set_coefficients(self, coefficients: StepCoefficients) -> None:
        """The engine has learnt."""
        self._machine = Machine(self.rules, coefficients, self.work)
        self._longest_step_s = coefficients.tokens_s(self.rules.max_batch_tokens)
        if self._packed is not None:
            write_costs(self._packed, coefficients)

    def forecast(
        self,
        queue: QueueMirror,
        submits: Sequence[Submit],
        now_s: float,
        num_cached: Sequence[int] = (),
        *,
        delay_s: float = 0.0,
    ) -> Forecast:
        """If these were sent to the engine now, or so much later: then times count from then.

        num_cached: of each, prompt tokens expected from the prefix cache.
        """
        own = [
            (self._own_job(submit, num_cached[index] if num_cached else 0, delay_s), now_s + delay_s + self.pickup_s)
            for index, submit in enumerate(submits)
        ]
        rate = self.arrivals.rate(now_s)
        timeline = self._run(queue, now_s, own, 1.0 / rate if rate > 0.0 else math.inf)
        regime = _regime(queue, submits[0].attention, rate)
        return Forecast(
            timeline=timeline,
            now_s=now_s + delay_s,
            num_tokens=max(1, *(submit.sampling.max_tokens for submit in submits)),
            regime=regime,
            newcomers_per_s=rate,
            num_arrived=self.arrivals.num_requests,
            num_steps=self.coefficients.num_steps,
            hitch_s=0.0 if regime == ALONE else HITCH_SHARE * self._longest_step_s,
        )

    def drain_s(self, queue: QueueMirror, now_s: float) -> float:
        """Until everybody who waits now would have begun, if nobody else came: for a Retry-After."""
        probe = Job((math.inf, ""), computed=0, known=1, remaining=1, costs=(0.0, 0.0, 0.0, 0.0), own_tokens=1)
        return max(0.0, self._run(queue, now_s, [(probe, now_s)], math.inf).runs_s - now_s)

    def _run(self, queue: QueueMirror, now_s: float, own: list[tuple[Job, float]], every_s: float) -> Timeline:
        """The queue run forward with own jobs, which wait from their times on."""
        pause_s = 0.0
        if not len(queue):  # before its first step an engine has been idle for long
            pause_s = max(min(at_s for _, at_s in own) - queue.ended_s, 0.0) if queue.ended_s else math.inf
        start = Start(
            now_s=min(queue.ended_s, now_s) if len(queue) else now_s,
            num_free_pages=float(self.rules.num_pages - queue.num_pages_used),
            cold=queue.cold,
            idle=idle_of(pause_s),
            every_s=every_s,
        )
        if self._forward is not None and self._packed is not None:
            given = _given(queue, own)
            newcomer = self._newcomer(0.0) if every_s < math.inf else None
            return self._forward.run(
                self._packed, start, given, newcomer, queue=queue, kinds=self._kinds, lengths=self.lengths
            )
        simulation = Simulation(
            self._machine, start_s=start.now_s, num_free_pages=start.num_free_pages, cold=start.cold, idle=start.idle
        )
        self._add_queue(simulation, queue)
        for job, at_s in own:
            simulation.add_waiting(job, at_s)
        return simulation.run(every_s, self._newcomer) if every_s < math.inf else simulation.run()

    def _add_queue(self, simulation: Simulation, queue: QueueMirror) -> None:
        lengths = self.lengths
        self._costs.remember(len(queue.kinds))
        for entry in queue.ordered:
            known = entry.num_prompt + entry.num_output
            if entry.never_stops:
                remaining: float = entry.max_tokens - entry.num_output
            else:
                remaining = lengths.remaining(entry.num_output, entry.max_tokens)
            remaining = remaining if remaining > 1.0 else 1.0
            costs = self._costs_of(entry.attention, known + int(remaining) // 2, entry.is_drawn, entry.is_shaped)
            if entry.is_running:
                job = Job(entry.rank, computed=entry.num_computed, known=known, remaining=remaining, costs=costs)
                simulation.add_running(job)
            else:
                job = Job(entry.rank, computed=_cached(entry), known=known, remaining=remaining, costs=costs)
                simulation.add_waiting(job, entry.submitted_s)

    def _own_job(self, submit: Submit, num_cached: int, delay_s: float) -> Job:
        sampling, num_prompt = submit.sampling, len(submit.prompt_token_ids)
        num_tokens = max(1, sampling.max_tokens)
        costs = self._costs_of(
            submit.attention, num_prompt + num_tokens // 2, sampling.temperature > 0, is_shaped(sampling)
        )
        due_s, name = rank_of(submit)
        return Job(
            (due_s + delay_s, name),
            computed=num_cached,
            known=num_prompt,
            remaining=num_tokens,
            costs=costs,
            own_tokens=num_tokens,
        )

    def _newcomer(self, at_s: float) -> Job:
        """A request as they usually come."""
        num_prompt, max_tokens = self.arrivals.usual_size
        remaining = max(1.0, self.lengths.remaining(0, round(max_tokens)))
        known = max(1, round(num_prompt))
        costs = self._costs_of(AttentionMode(), known + int(remaining) // 2, True, False)
        return Job((at_s + PATIENCE_S, ""), computed=0, known=known, remaining=remaining, costs=costs)

    def _costs_of(self, mode: AttentionMode, context: int, is_drawn: bool, is_shaped: bool) -> Costs:
        return self._costs.of(self.coefficients, mode, context, is_drawn=is_drawn, is_shaped=is_shaped)


def _given(queue: QueueMirror, own: list[tuple[Job, float]]) -> list[Given]:
    """With the places of the own jobs among those of the same due time: behind those before, between themselves."""
    order = sorted(range(len(own)), key=lambda index: own[index][0].rank)
    parts = {index: (1 + place) / (1 + len(own)) for place, index in enumerate(order)}
    return [Given(job, at_s, queue.place_of(job.rank) - 1 + parts[index]) for index, (job, at_s) in enumerate(own)]


def _cached(entry: Entry) -> int:
    return min(entry.num_cached, entry.num_known - 1)


def _regime(queue: QueueMirror, mode: AttentionMode, newcomers_per_s: float) -> str:
    """ALONE: nobody is there or expected; idle: nobody is there; busy: others run; queued: it waits for a place, or
    behind others' prompts. Dense and sparse ones are told apart where others may meet them. Alone they are not:
    replayed over recorded cells the intervals of either were no narrower, and guesses for twice as long."""
    kind = "sparse" if mode.is_sparse else "dense"
    if not len(queue):
        return f"idle {kind}" if newcomers_per_s > 0.0 else ALONE
    return f"{'queued' if queue.num_waiting else 'busy'} {kind}"
