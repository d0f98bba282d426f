"""What a request would take if it came now, before any correction: the queue run forward with it at its place.

`server/forecaster.py` owns one `Predictor`, keeps its parts up to date, and puts intervals around what it says.
No torch, no clock: times are those that the caller gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vashista.engine.busy_time import is_shaped
from vashista.engine.messages import AttentionMode, SchedulerRules, Submit
from vashista.engine.predict.arrivals import Arrivals
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.expected_support import SupportForecast
from vashista.engine.predict.lengths import OutputLengths
from vashista.engine.predict.queue import Entry, QueueMirror
from vashista.engine.predict.simulate import Job, Machine, Simulation
from vashista.engine.predict.timeline import Timeline
from vashista.engine.request import PATIENCE_S, rank_of
from vashista.engine.work import GROUP_TOKENS, WorkModel

CONTEXT_STEP = 128
"""Costs of a decoding request are computed anew after so many tokens of context, where they bend."""
Costs = tuple[float, float, float, float]
"""Seconds, seconds per token of context, pairs, pairs per token of context: of a decode step."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one HTTP request, uncorrected; seconds from the moment it was made."""

    timeline: Timeline
    now_s: float
    num_tokens: int
    regime: str
    """How loaded the engine is and how the request attends; errors are told apart by it."""
    newcomers_per_s: float

    @property
    def ttft_s(self) -> float:
        """Until the first token."""
        return max(self.timeline.first_s - self.now_s, 1e-6)

    def total_s(self, num_tokens: int) -> float:
        """Until the last of so many tokens."""
        return max(self.timeline.at(num_tokens)[0] - self.now_s, 1e-6)

    def time_per_token_s(self, num_tokens: int) -> float:
        """Mean of the tokens after the first; num_tokens: at least 2."""
        first_s = self.timeline.points[0].time_s
        return max(self.timeline.at(num_tokens)[0] - first_s, 1e-9) / (num_tokens - 1)

    def busy_s(self, num_tokens: int) -> float:
        """The request's share of the engine's time."""
        return max(self.timeline.at(num_tokens)[1], 1e-9)


class Predictor:
    """For one model on one engine."""

    def __init__(
        self, work: WorkModel, rules: SchedulerRules, coefficients: StepCoefficients, support: SupportForecast
    ):
        self.work = work
        self.rules = rules
        self.support = support
        self.lengths = OutputLengths()
        self.arrivals = Arrivals()
        self.pickup_s = 3e-4
        """From the moment a request is sent to an idle engine until its first step begins."""
        self._costs: dict[tuple[AttentionMode, int, bool, bool], Costs] = {}
        self._num_heads = sum(count for _, count in work.windows)
        self.set_coefficients(coefficients)

    @property
    def coefficients(self) -> StepCoefficients:
        """What steps take now."""
        return self._machine.coefficients

    def set_coefficients(self, coefficients: StepCoefficients) -> None:
        """The engine has learnt."""
        self._machine = Machine(self.rules, coefficients, self.work)
        self._costs.clear()

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
        simulation = Simulation(
            self._machine,
            start_s=min(queue.ended_s, now_s) if len(queue) else now_s,
            num_free_pages=float(self.rules.num_pages - queue.num_pages_used),
            cold=queue.cold,
        )
        self._add_queue(simulation, queue)
        for index, submit in enumerate(submits):
            job = self._own_job(submit, num_cached[index] if num_cached else 0, delay_s)
            simulation.add_waiting(job, now_s + delay_s + self.pickup_s)
        rate = self.arrivals.rate(now_s)
        timeline = simulation.run(1.0 / rate, self._newcomer) if rate > 0.0 else simulation.run()
        return Forecast(
            timeline=timeline,
            now_s=now_s + delay_s,
            num_tokens=max(1, *(submit.sampling.max_tokens for submit in submits)),
            regime=_regime(queue, submits[0].attention),
            newcomers_per_s=rate,
        )

    def drain_s(self, queue: QueueMirror, now_s: float) -> float:
        """Until everybody who waits now would have begun, if nobody else came: for a Retry-After."""
        probe = Job((math.inf, ""), computed=0, known=1, remaining=1, costs=(0.0, 0.0, 0.0, 0.0), own_tokens=1)
        start_s = min(queue.ended_s, now_s) if len(queue) else now_s
        free = float(self.rules.num_pages - queue.num_pages_used)
        simulation = Simulation(self._machine, start_s=start_s, num_free_pages=free, cold=queue.cold)
        self._add_queue(simulation, queue)
        simulation.add_waiting(probe, now_s)
        return max(0.0, simulation.run().runs_s - now_s)

    def _add_queue(self, simulation: Simulation, queue: QueueMirror) -> None:
        lengths = self.lengths
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
        key = (mode, context // CONTEXT_STEP, is_drawn, is_shaped)
        found = self._costs.get(key)
        if found is None:
            if len(self._costs) > 4096:
                self._costs.clear()
            found = self._costs[key] = self._measure(mode, context, is_drawn, is_shaped)
        return found

    def _measure(self, mode: AttentionMode, context: int, is_drawn: bool, is_shaped: bool) -> Costs:
        """Of a decode step near this context."""
        c = self.coefficients
        fixed_s = c.count_s("num_rows") + c.count_s("num_requests")
        fixed_s += is_drawn * c.count_s("num_drawn") + is_shaped * c.count_s("num_shaped")
        growing = sum(count for window, count in self.work.windows if window is None or window > context)
        standing = float(sum(count * window for window, count in self.work.windows if window and window <= context))
        support = self.support.at(mode, context)
        if support.dense_share >= 1.0:
            pair_s = c.count_s("decode_pairs")
            return fixed_s + pair_s * standing, pair_s * growing, standing, float(growing)
        kept = support.tokens_attended * self._num_heads
        scored_s = c.count_s("scored_pairs")
        standing, growing_pairs = standing / GROUP_TOKENS, growing / GROUP_TOKENS
        fixed_s += c.count_s("num_sparse") + c.count_s("kept_pairs") * kept + scored_s * standing
        return fixed_s, scored_s * growing_pairs, kept + standing, growing_pairs


def _cached(entry: Entry) -> int:
    return min(entry.num_cached, entry.num_known - 1)


def _regime(queue: QueueMirror, mode: AttentionMode) -> str:
    """idle: nobody is there; busy: others run; queued: it waits for a place, or behind others' prompts."""
    kind = "sparse" if mode.is_sparse else "dense"
    if not len(queue):
        return f"idle {kind}"
    return f"{'queued' if queue.num_waiting else 'busy'} {kind}"
