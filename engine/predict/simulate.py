"""Runs the engine's queue forward until a request that is not yet in it has ended, by the scheduler's own rules.

Time goes from event to event: as long as nobody ends, arrives or reads a prompt, all running requests generate a token
a step, and n such steps take n times the first, a little more for each token of context, and what is left of the cold
that prompts leave behind (`engine/predict/features.py`), a geometric sum. A step with prompt chunks
is made as `Scheduler.schedule` makes it: decoding requests first, then prompts in the order of their rank, then waiting
requests while budget, places and pages last; when pages run out, the last rank gives its own back. The lengths of
outputs are not known: the mean of what is still to come stands for each (`engine/predict/lengths.py`), and requests of
the usual size keep coming at the recent rate. No torch here, and nothing of the engine's state but numbers.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable
from heapq import heapify, heappop, heappush

import msgspec

from vashista.engine.messages import SchedulerRules
from vashista.engine.pace import promised_chunk
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.features import COLD_KEEP, FEW_TOKENS, computed
from vashista.engine.predict.timeline import Point, Timeline
from vashista.engine.work import WorkModel

MAX_EVENTS = 600
"""After so many before its begin a request is taken to begin when all prompts ahead are read at full batches."""
MAX_OWN_EVENTS = 32
"""After so many since its first token its mean pace since then is taken to go on."""


class Job:
    """A request in the simulation. A *pair* is as in `engine/work.py`."""

    __slots__ = (
        "computed",
        "context",
        "context_pairs",
        "context_s",
        "fixed_pairs",
        "fixed_s",
        "has_begun",
        "joined",
        "known",
        "own_tokens",
        "rank",
        "remaining",
    )

    def __init__(
        self,
        rank: tuple[float, str],
        *,
        computed: int,
        known: int,
        remaining: float,
        costs: tuple[float, float, float, float],
        own_tokens: int = 0,
    ) -> None:
        self.rank = rank
        self.computed = computed
        """Tokens that are computed, or will come from the prefix cache."""
        self.known = known
        """Tokens to compute before the next one is sampled."""
        self.remaining = remaining
        """Tokens still to come, the next one included; their mean, where they are not known."""
        self.fixed_s, self.context_s, self.fixed_pairs, self.context_pairs = costs
        """What it adds to a step in which it decodes: seconds, and more for each token of context; pairs likewise."""
        self.own_tokens = own_tokens
        """Output tokens of a request that is predicted; 0 for the others."""
        self.context = 0
        """Of its first step as a decoding request, which is step number `joined`."""
        self.joined = 0.0
        self.has_begun = False


class Machine(msgspec.Struct, frozen=True):
    """Rules and costs of one engine."""

    rules: SchedulerRules
    coefficients: StepCoefficients
    work: WorkModel


class _Sums:
    """Over the requests that decode: what they add to a step."""

    __slots__ = ("context_pairs", "context_s", "fixed_pairs", "fixed_s", "growth_pairs", "growth_s", "num")

    def __init__(self) -> None:
        self.num = 0
        self.fixed_s = self.context_s = self.growth_s = 0.0
        self.fixed_pairs = self.context_pairs = self.growth_pairs = 0.0

    def add(self, job: Job, context: float, sign: int) -> None:
        self.num += sign
        self.fixed_s += sign * job.fixed_s
        self.context_s += sign * job.context_s * context
        self.growth_s += sign * job.context_s
        self.fixed_pairs += sign * job.fixed_pairs
        self.context_pairs += sign * job.context_pairs * context
        self.growth_pairs += sign * job.context_pairs

    def advance(self, num_steps: float) -> None:
        self.context_s += self.growth_s * num_steps
        self.context_pairs += self.growth_pairs * num_steps

    def pairs(self, num_steps: float) -> float:
        """Mean over the next steps."""
        return self.fixed_pairs + self.context_pairs + self.growth_pairs * (num_steps - 1) / 2


class Simulation:
    """One run: `add_running` and `add_waiting`, then `run`. It changes the jobs."""

    def __init__(
        self,
        machine: Machine,
        *,
        start_s: float,
        num_free_pages: float,
        cold: float = 0.0,
        idle: float = 0.0,
        max_own_events: int = MAX_OWN_EVENTS,
    ) -> None:
        """start_s: when the next step can begin; cold: of it, if it has few tokens; idle: of the first that reads."""
        self._max_own_events = max_own_events
        self._rules, self._work, self._costs = machine.rules, machine.work, machine.coefficients
        self._row_s = self._costs.count_s("num_rows")
        self._request_s = self._costs.count_s("num_requests")
        self._pair_s = self._costs.count_s("prompt_pairs")
        self._cold_s = self._costs.count_s("cold")
        self._split_s = self._costs.count_s("split")
        self._cold = cold
        self._idle_s = idle * self._costs.count_s("idle")
        self._free = num_free_pages
        self._now = start_s
        self._step = 0.0
        self._reading: list[Job] = []
        self._waiting: list[Job] = []
        self._ends: list[tuple[float, int, Job]] = []
        self._joins: list[tuple[float, int, Job]] = []
        self._count = 0
        self._all, self._own = _Sums(), _Sums()
        self._own_busy_s = 0.0
        self._num_own = self._num_own_begun = 0
        self._last_own: Job | None = None
        self.timeline = Timeline()

    def add_running(self, job: Job) -> None:
        """A request that holds pages."""
        if job.known - job.computed > 1:
            insort(self._reading, job, key=_rank)
        else:
            self._decode(job, job.known)

    def add_waiting(self, job: Job, at_s: float) -> None:
        """A request that waits from `at_s` on."""
        self._num_own += job.own_tokens > 0
        if at_s <= self._now:
            insort(self._waiting, job, key=_rank)
        else:
            self._count += 1
            heappush(self._joins, (at_s, self._count, job))

    def run(self, every_s: float = math.inf, newcomer: Callable[[float], Job] | None = None) -> Timeline:
        """Until the own requests have ended, while a newcomer joins `every_s`; it is made for the time it comes."""
        timeline, joins, left_before = self.timeline, self._joins, self._num_own
        next_s = self._now + every_s
        self._own_left = left_before
        while self._own_left:
            timeline.num_events += 1
            if timeline.num_events > MAX_EVENTS or timeline.num_points > self._max_own_events:
                self._extrapolate()
                break
            while joins and joins[0][0] <= self._now:
                insort(self._waiting, heappop(joins)[2], key=_rank)
            while next_s <= self._now and newcomer is not None:
                insort(self._waiting, newcomer(next_s), key=_rank)
                next_s += every_s
            if not self._all.num and not self._reading:
                self._free = float(self._rules.num_pages)  # nobody holds any; what is counted as we go is near it
            if self._reading or (self._waiting and self._fits(self._waiting[0])):
                self._mixed_step()
                continue
            until_s = min(next_s, joins[0][0]) if joins else next_s
            if self._all.num:
                self._decode_steps(until_s)
            else:
                assert until_s < math.inf, "nothing runs, nothing comes, and the own requests do not fit"
                self._now = until_s
        timeline.num_steps = self._step
        return timeline

    def _fits(self, job: Job) -> bool:
        """Whether a waiting request can start."""
        rules = self._rules
        if self._all.num + len(self._reading) >= rules.max_running_requests:
            return False
        return self._all.num < rules.max_batch_tokens and self._pages_to_start(job) <= self._free + 1e-9

    def _pages_to_start(self, job: Job) -> int:
        size = self._rules.page_size
        return -(-job.known // size) - job.computed // size

    def _mixed_step(self) -> None:
        """One step in which prompts are read too."""
        budget = self._rules.max_batch_tokens - self._all.num
        chunks: list[tuple[Job, int]] = []
        for job in self._reading:
            num_tokens = self._chunk(job, budget, chunks)
            if num_tokens > 0:
                chunks.append((job, num_tokens))
                budget -= num_tokens
        while budget > 0 and self._waiting and self._fits(self._waiting[0]):
            num_tokens = self._chunk(self._waiting[0], budget, chunks)
            if num_tokens == 0:
                break
            job = self._waiting.pop(0)
            self._free -= self._pages_to_start(job)
            if job.own_tokens and self._now < self.timeline.runs_s:
                self.timeline.runs_s = self._now
            insort(self._reading, job, key=_rank)
            chunks.append((job, num_tokens))
            budget -= num_tokens
        self._compute(chunks)
        for job, num_tokens in chunks:
            job.computed += num_tokens
            if job.computed == job.known:
                self._reading.remove(job)
                self._begin(job)
        self._end_due()

    def _chunk(self, job: Job, budget: int, chunks: list[tuple[Job, int]]) -> int:
        """Tokens of its prompt that the step reads beside these chunks, as `Scheduler` cuts them to keep its promise.

        That a request may wait for the promise before it starts is left out: it depends on how much others may
        generate at most, of which nothing is known here.
        """
        most, gap_s = min(job.known - job.computed, budget), self._rules.max_token_gap_s
        if gap_s is None or not self._all.num or most <= 0:
            return max(most, 0)
        return promised_chunk(
            lambda n: self._step_s([*chunks, (job, n)]) + self._costs.gap_s, most, gap_s, is_first=not chunks
        )

    def _step_s(self, chunks: list[tuple[Job, int]]) -> float:
        """Of all that decode, and these chunks; without what comes of the steps before."""
        sums = self._all
        num_tokens, num_single, num_rows, pairs = sums.num, sums.num, 0, 0
        for job, chunk in chunks:
            pairs += self._work.dense_pairs(job.computed, job.computed + chunk)
            num_tokens, num_rows = num_tokens + chunk, num_rows + (job.computed + chunk == job.known)
            num_single += chunk == 1
        num_computed, is_split = computed(num_single, num_tokens - num_single, self._rules.prompt_rows)
        seconds = self._costs.tokens_s(num_computed) + sums.fixed_s + sums.context_s + self._pair_s * pairs
        if is_split:
            seconds += self._split_s
        return seconds + len(chunks) * self._request_s + num_rows * self._row_s

    def _compute(self, chunks: list[tuple[Job, int]]) -> None:
        """Let a step with these chunks pass."""
        sums, work = self._all, self._work
        num_tokens, num_rows, pairs, own_work = sums.num, sums.num, 0, 0.0
        for job, chunk in chunks:
            end = job.computed + chunk
            more = work.dense_pairs(job.computed, end)
            is_last = end == job.known
            num_tokens, num_rows, pairs = num_tokens + chunk, num_rows + is_last, pairs + more
            if job.own_tokens:
                own_work += work.item(chunk, int(is_last), more)
        cold_s = self._cool(num_tokens, 1.0)
        seconds = self._step_s(chunks) + cold_s + self._idle_s
        self._idle_s = 0.0
        own_work += work.item(self._own.num, self._own.num, self._own.pairs(1))
        self._pass(1.0, seconds, own_work / work.item(num_tokens, num_rows, pairs + sums.pairs(1)))

    def _decode_steps(self, until_s: float) -> None:
        """Steps without prompts: until a request ends, pages run out, or the time when another one comes."""
        sums, size = self._all, self._rules.page_size
        if self._free * size < sums.num and len(self._ends) + len(self._reading) > 1:
            self._preempt()
            return
        first_s = self._costs.tokens_s(sums.num) + self._costs.gap_s + sums.fixed_s + sums.context_s
        cold_s = self._cold * self._cold_s if sums.num <= FEW_TOKENS else 0.0
        num_steps = max(self._ends[0][0] - self._step, 1e-6)
        if until_s < math.inf:
            num_steps = min(
                num_steps, max(1.0, math.ceil(_steps_in(until_s - self._now, first_s, sums.growth_s, cold_s)))
            )
        if len(self._ends) > 1:
            num_steps = min(num_steps, max(1.0, self._free * size / sums.num))
        cold_s = self._cool(sums.num, num_steps)
        seconds = num_steps * (first_s + sums.growth_s * (num_steps - 1) / 2) - num_steps * self._costs.gap_s + cold_s
        own, work = self._own, self._work
        share = 0.0
        if own.num:
            share = work.item(own.num, own.num, own.pairs(num_steps))
            share /= work.item(sums.num, sums.num, sums.pairs(num_steps))
        self._pass(num_steps, seconds, share, cold_s)
        self._end_due()

    def _cool(self, num_tokens: int, num_steps: float) -> float:
        """What is left of the cold costs so many steps of so many tokens: seconds in all."""
        if num_tokens > FEW_TOKENS:
            self._cold = 1.0
            return 0.0
        before, self._cold = self._cold, self._cold * COLD_KEEP**num_steps
        return self._cold_s * (before - self._cold) / (1.0 - COLD_KEEP)

    def _pass(self, num_steps: float, seconds: float, own_share: float, cold_s: float = 0.0) -> None:
        """Let steps pass that compute for `seconds`, `cold_s` of it for the cold."""
        passed_s = seconds + num_steps * self._costs.gap_s
        self._now += passed_s
        self._own_busy_s += seconds * own_share
        self._step += num_steps
        self._free -= self._all.num * num_steps / self._rules.page_size
        self._all.advance(num_steps)
        self._own.advance(num_steps)
        self._note(cold_s / passed_s if cold_s else 0.0)

    def _begin(self, job: Job) -> None:
        """Its prompt is read and its next token sampled."""
        job.remaining -= 1
        if job.own_tokens:
            self.timeline.first_s = min(self.timeline.first_s, self._now)
        if job.remaining > 0:
            self._decode(job, job.known + 1)
        else:
            self._free += -(-job.known // self._rules.page_size)
        if job.own_tokens:
            self._own_left -= job.remaining <= 0
            self._num_own_begun += not job.has_begun
            job.has_begun = True  # it may begin again, after it was preempted
            if self._num_own_begun == self._num_own and self._last_own in (None, job):
                self._last_own = job
                self.timeline.note(Point(job.own_tokens - job.remaining, self._now, self._own_busy_s))

    def _decode(self, job: Job, context: int) -> None:
        job.context, job.joined = context, self._step
        self._count += 1
        heappush(self._ends, (self._step + job.remaining, self._count, job))
        self._all.add(job, context, 1)
        if job.own_tokens:
            self._own.add(job, context, 1)

    def _end_due(self) -> None:
        """Take out the requests that have their last token."""
        ends = self._ends
        while ends and ends[0][0] <= self._step + 1e-9:
            job = heappop(ends)[2]
            self._leave(job)
            self._own_left -= job.own_tokens > 0

    def _leave(self, job: Job) -> float:
        """Take a decoding request out, and its pages; the context that its next token would have."""
        context = job.context + self._step - job.joined
        self._all.add(job, context, -1)
        if job.own_tokens:
            self._own.add(job, context, -1)
        self._free += (context - 1) / self._rules.page_size + 0.5  # its last page is half full on average
        return context

    def _preempt(self) -> None:
        """The last rank gives its pages back and waits. Most of what it computed it will find in the prefix cache."""
        place, victim = max(enumerate(self._ends), key=lambda entry: entry[1][2].rank)
        if self._reading and self._reading[-1].rank > victim[2].rank:
            job = self._reading.pop()
            self._free += -(-job.known // self._rules.page_size)
        else:
            end, _, job = self._ends.pop(place)
            heapify(self._ends)
            job.known = max(int(self._leave(job)), 1)
            job.remaining = max(end - self._step, 1.0)
        kept = min(job.computed, job.known - 1) if self._rules.prefix_caching else 0
        job.computed = kept // self._rules.page_size * self._rules.page_size
        insort(self._waiting, job, key=_rank)

    def _note(self, cold_share: float) -> None:
        """Write down how far the last of the own requests is."""
        job = self._last_own
        if job is not None and self._own.num:
            num_tokens = job.own_tokens - job.remaining + self._step - job.joined
            num_tokens = min(num_tokens, job.own_tokens)
            self.timeline.note(Point(num_tokens, self._now, self._own_busy_s, cold_share))

    def _extrapolate(self) -> None:
        """Too much lies ahead to go through: the rest takes what its tokens do at full and at the present batches."""
        timeline, costs, rules = self.timeline, self._costs, self._rules
        step_s = costs.tokens_s(self._all.num) + costs.gap_s + self._all.fixed_s + self._all.context_s
        if not timeline.num_points:
            jobs = [*self._reading, *self._waiting, *(job for _, _, job in self._joins)]
            jobs += [job for _, _, job in self._ends if job.own_tokens]
            num_own = max(job.own_tokens for job in jobs)
            ahead = sum(max(job.known - job.computed, 0) for job in jobs)
            self._now += ahead / rules.max_batch_tokens * costs.tokens_s(rules.max_batch_tokens)
            timeline.runs_s, timeline.first_s = min(timeline.runs_s, self._now), min(timeline.first_s, self._now)
            timeline.note(Point(1, self._now, self._own_busy_s))
        else:
            assert self._last_own is not None
            num_own = self._last_own.own_tokens
        begin, end = timeline.point(0), timeline.point(-1)
        pace_s, busy_s = step_s, step_s / max(self._all.num, 1)
        num_tokens = end.num_tokens - begin.num_tokens
        if num_tokens >= 4:
            pace_s, busy_s = (end.time_s - begin.time_s) / num_tokens, (end.busy_s - begin.busy_s) / num_tokens
        left = num_own - end.num_tokens
        timeline.note(Point(num_own, end.time_s + left * pace_s, end.busy_s + left * busy_s))


def _steps_in(seconds: float, first_s: float, growth_s: float, cold_s: float) -> float:
    """Steps that fit into the time, each `growth_s` longer than the one before, the first `cold_s` longer than that."""
    if growth_s * seconds < 1e-3 * first_s * first_s:
        num_steps = seconds / first_s
    else:
        b = first_s - growth_s / 2
        num_steps = (math.sqrt(b * b + 2 * growth_s * seconds) - b) / growth_s
    if cold_s < 1e-6 * first_s:
        return num_steps
    all_cold_s = cold_s / (1.0 - COLD_KEEP)
    for _ in range(8):  # Newton's method, from above
        kept = COLD_KEEP**num_steps
        off_s = num_steps * (first_s + growth_s * (num_steps - 1) / 2) + all_cold_s * (1.0 - kept) - seconds
        slope_s = first_s + growth_s * (num_steps - 0.5) - all_cold_s * kept * math.log(COLD_KEEP)
        num_steps = max(num_steps - off_s / slope_s, 0.0)
        if abs(off_s) < 1e-9 * first_s:
            break
    return num_steps


def _rank(job: Job) -> tuple[float, str]:
    return job.rank
