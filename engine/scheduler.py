"""Decides what each step computes: which requests run, with how many tokens, on which pages. No torch here.

The engine calls `schedule` for a `Batch`, runs it, and calls `complete` with it. Requests run in the order of their
rank (engine/request.py: the time by which they should be done). Decoding requests come first in a step, so that a long
prompt never halts running streams; the rest of the token budget goes to prompts, in chunks. When pages run out, the
request of the last rank gives all of its pages back and is recomputed later (mostly from the prefix cache). The
first-ranked request is never preempted and every request fits the cache alone, so everything ends and nobody starves.

With a `Pace` running streams have a promise: the chunks beside them are cut so that no step is expected to take longer
than the promised gap, and a request starts only if the promise can be kept to the end: pages for all that it may
generate are there, so that nobody is preempted, and even the last step of all that run is expected to be within it.
A request that waits for that holds back those behind it, and what runs ends, so it starts in the end.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from vashista.engine.messages import SchedulerRules
from vashista.engine.pace import LEAST_CHUNK, Pace, promised_chunk
from vashista.engine.pages import PageAllocator
from vashista.engine.request import Request, Status


@dataclass(slots=True)
class BatchItem:
    """Tokens `start` to `start + num_tokens` of a request, computed in this step."""

    request: Request
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """Context length after the step."""
        return self.start + self.num_tokens

    @property
    def is_generated(self) -> bool:
        """Whether it computes what the request itself said, not its prompt."""
        return self.start >= self.request.num_prompt_tokens

    @property
    def is_caught_up(self) -> bool:
        """Whether all known tokens are computed after this step, so that the next one can be sampled."""
        return self.end == self.request.num_known_tokens


@dataclass(slots=True)
class Batch:
    """One step: what to compute, and who lost its pages for it."""

    items: list[BatchItem] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    expected_s: float | None = None
    """What the step should take; None where no stream has a promise."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(item.num_tokens for item in self.items)


class StepEstimate(Protocol):
    """Seconds that a step is expected to take, as items are added to it."""

    def add(self, item: BatchItem) -> None:
        """The step computes this, too."""

    def seconds(self, extra: BatchItem | None = None) -> float:
        """Of all items, and one more.

        Does not fall as an item has a longer context, nor as it has more tokens, but where a step is no longer split.
        """


@dataclass(frozen=True)
class Promise:
    """The promised gap, and what says how long a step would take."""

    pace: Pace
    estimate: Callable[[], StepEstimate]
    """Makes the estimate of an empty step."""


class Scheduler:
    """Waiting and running requests and their pages."""

    def __init__(
        self,
        pages: PageAllocator,
        *,
        page_size: int,
        max_running_requests: int,
        max_batch_tokens: int,
        prefix_caching: bool = True,
        promise: Promise | None = None,
    ) -> None:
        assert max_batch_tokens >= max_running_requests, "every running request must get a token in each step"
        self.pages = pages
        self.page_size = page_size
        self.max_running_requests = max_running_requests
        self.max_batch_tokens = max_batch_tokens
        self.prefix_caching = prefix_caching
        self.promise = promise
        self.num_preemptions_total = 0
        self._waiting: list[Request] = []  # sorted by rank
        self._running: list[Request] = []  # sorted by rank
        self._requests: dict[str, Request] = {}

    @property
    def rules(self) -> SchedulerRules:
        """What the predictor must know to run the queue forward."""
        return SchedulerRules(
            page_size=self.page_size,
            num_pages=self.pages.num_pages,
            max_running_requests=self.max_running_requests,
            max_batch_tokens=self.max_batch_tokens,
            prefix_caching=self.prefix_caching,
            max_token_gap_s=None if self.promise is None else self.promise.pace.max_gap_s,
        )

    @property
    def num_waiting(self) -> int:
        """Requests that hold no pages."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return len(self._running)

    @property
    def requests(self) -> Iterable[Request]:
        """All requests that have not ended."""
        return self._requests.values()

    def get(self, request_id: str) -> Request | None:
        """The request of this id, if it has not ended."""
        return self._requests.get(request_id)

    def num_cached_tokens(self, request: Request) -> int:
        """Tokens that a waiting request would find in the prefix cache if it started now."""
        return self.pages.count_cached(self._wanted_hashes(request))[0] * self.page_size

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def add(self, request: Request) -> None:
        """Queue a request whose prompt and output fit the cache alone (the engine has checked)."""
        assert request.id not in self._requests
        self._requests[request.id] = request
        insort(self._waiting, request, key=_rank)

    def finish(self, request: Request) -> None:
        """Take a request out, whatever its state, and free its pages."""
        del self._requests[request.id]
        (self._running if request.status is Status.RUNNING else self._waiting).remove(request)
        self._release(request)
        request.status = Status.FINISHED

    def schedule(self) -> Batch:
        """The next step. Empty only if nothing is waiting or running."""
        batch = Batch()
        budget = self.max_batch_tokens
        decoding = [r for r in self._running if r.num_known_tokens - r.num_computed_tokens == 1]
        prefilling = [r for r in self._running if r.num_known_tokens - r.num_computed_tokens > 1]
        for request in decoding:
            self._continue(request, _chunk(request, budget - batch.num_tokens), batch)
        limit = self._chunk_limit(batch)
        for request in prefilling:
            num_tokens = _chunk(request, budget - batch.num_tokens)
            if limit is not None:
                num_tokens = limit.chunk(request, num_tokens)
            if self._continue(request, num_tokens, batch) and limit is not None:
                limit.add(batch.items[-1])
        if not batch.preempted:
            self._admit(batch, budget - batch.num_tokens, limit)
        batch.expected_s = limit.seconds if limit is not None else None
        return batch

    def complete(self, batch: Batch) -> None:
        """Book a step as computed: advance the requests and publish the pages that became full."""
        for item in batch.items:
            request = item.request
            if request.status is not Status.RUNNING:
                continue  # ended while the step ran
            request.num_computed_tokens = item.end
            if not self.prefix_caching:
                continue
            hashes = request.update_hashes(self.page_size)
            num_full = min(item.end, request.num_shareable_tokens) // self.page_size
            for page in range(request.num_published_pages, num_full):
                self.pages.publish(request.pages[page], hashes[page])
                request.num_published_pages = page + 1

    def check(self) -> None:
        """Assert that requests and pages balance. For tests."""
        self.pages.check([request.pages for request in self._running])
        assert all(not r.pages and r.status is Status.WAITING for r in self._waiting)
        assert all(r.status is Status.RUNNING for r in self._running)
        assert len(self._requests) == len(self._waiting) + len(self._running)
        assert self._running == sorted(self._running, key=_rank)
        assert self._waiting == sorted(self._waiting, key=_rank)
        for request in self._running:
            assert request.num_computed_tokens <= len(request.pages) * self.page_size

    def _continue(self, request: Request, num_tokens: int, batch: Batch) -> bool:
        """Compute the next tokens of a running request, if it is to have some and keeps its pages."""
        if request.status is not Status.RUNNING or num_tokens <= 0:  # preempted above, for one of a better rank
            return False
        if not self._grow(request, request.num_computed_tokens + num_tokens, batch):
            return False
        batch.items.append(BatchItem(request, request.num_computed_tokens, num_tokens))
        return True

    def _admit(self, batch: Batch, budget: int, limit: _ChunkLimit | None) -> None:
        """Start waiting requests while budget, places and pages last, and the promise can be kept."""
        computing = self._pages_being_computed()
        for request in list(self._waiting):
            if budget <= 0 or len(self._running) >= self.max_running_requests:
                return
            hashes = self._wanted_hashes(request)
            num_cached, num_unheld = self.pages.count_cached(hashes)
            if num_cached < len(hashes) and hashes[num_cached] in computing:
                continue  # its next page is being computed for another request: wait and share it
            usable = hashes[:num_cached]
            num_fresh = self.num_pages_for(request.num_known_tokens) - len(usable)
            num_available = self.pages.num_available - num_unheld
            if num_fresh > num_available or not self._can_promise(request, num_available - num_fresh):
                return
            num_tokens = _chunk(request, budget, len(usable) * self.page_size)
            if limit is not None:
                num_tokens = limit.chunk(request, num_tokens, len(usable) * self.page_size)
                if num_tokens == 0:
                    return
            self._start(request, usable)
            pages = self.pages.allocate(num_fresh, request.pages[-1] if request.pages else None)
            assert pages is not None, "counted above"
            request.pages += pages
            batch.items.append(BatchItem(request, request.num_computed_tokens, num_tokens))
            if limit is not None:
                limit.add(batch.items[-1])
            budget -= num_tokens
            computing.update(self._missing_hashes(request))

    def _chunk_limit(self, batch: Batch) -> _ChunkLimit | None:
        """What the running streams of the step leave to prompts; None if no stream has a promise."""
        if self.promise is None or not any(item.request.num_output_tokens for item in batch.items):
            return None
        estimate = self.promise.estimate()
        for item in batch.items:
            estimate.add(item)
        return _ChunkLimit(estimate, self.promise.pace.limit_s)

    def _can_promise(self, request: Request, num_left: int) -> bool:
        """Whether all that run keep their pace to the end with this request, which leaves so many pages."""
        if self.promise is None or not self._running:
            return True
        everyone = [*self._running, request]
        num_growing = sum(self.num_pages_for(r.num_tokens_at_most) - len(r.pages) for r in self._running)
        num_growing += self.num_pages_for(request.num_tokens_at_most) - self.num_pages_for(request.num_known_tokens)
        if num_growing > num_left:
            return False
        estimate = self.promise.estimate()
        for each in everyone:
            estimate.add(BatchItem(each, each.num_tokens_at_most - 1, 1))
        longest = max(everyone, key=lambda r: r.num_prompt_tokens)
        chunk = min(LEAST_CHUNK, longest.num_prompt_tokens)
        last = BatchItem(longest, longest.num_prompt_tokens - chunk, chunk)
        return estimate.seconds(last) <= self.promise.pace.limit_s

    def _wanted_hashes(self, request: Request) -> list[bytes]:
        """Of the pages that a waiting request may take from the cache: its last token is computed, for the logits."""
        if not self.prefix_caching or not request.reads_cache:
            return []
        return request.update_hashes(self.page_size)[: (request.num_known_tokens - 1) // self.page_size]

    def _start(self, request: Request, cached_hashes: list[bytes]) -> None:
        self._waiting.remove(request)
        insort(self._running, request, key=_rank)
        request.status = Status.RUNNING
        request.pages = self.pages.match(cached_hashes)
        request.num_computed_tokens = len(request.pages) * self.page_size
        request.num_published_pages = len(request.pages)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens

    def _pages_being_computed(self) -> set[bytes]:
        hashes: set[bytes] = set()
        if self._waiting and self.prefix_caching:
            for request in self._running:
                hashes.update(self._missing_hashes(request))
        return hashes

    def _missing_hashes(self, request: Request) -> list[bytes]:
        """Hashes of the request's full pages that are not yet computed."""
        if not self.prefix_caching:
            return []
        return request.update_hashes(self.page_size)[request.num_published_pages :]

    def _grow(self, request: Request, num_tokens: int, batch: Batch) -> bool:
        """Give the request pages for `num_tokens`, taking them from later ranks; False if it was preempted itself."""
        num_missing = self.num_pages_for(num_tokens) - len(request.pages)
        if num_missing <= 0:
            return True
        while True:
            pages = self.pages.allocate(num_missing, request.pages[-1] if request.pages else None)
            if pages is not None:
                request.pages += pages
                return True
            victim = self._running[-1]
            self._preempt(victim, batch)
            if victim is request:
                return False

    def _preempt(self, request: Request, batch: Batch) -> None:
        self._running.remove(request)
        self._release(request)
        request.status = Status.WAITING
        insort(self._waiting, request, key=_rank)
        batch.items = [item for item in batch.items if item.request is not request]
        batch.preempted.append(request)
        self.num_preemptions_total += 1

    def _release(self, request: Request) -> None:
        self.pages.free(request.pages)
        request.pages = []
        request.num_computed_tokens = 0
        request.num_published_pages = 0


class _ChunkLimit:
    """What may be computed beside the running streams of one step."""

    def __init__(self, estimate: StepEstimate, limit_s: float) -> None:
        self._estimate = estimate
        self._limit_s = limit_s
        self._is_untouched = True

    @property
    def seconds(self) -> float:
        """The step as it is."""
        return self._estimate.seconds()

    def add(self, item: BatchItem) -> None:
        """The step computes this chunk, too."""
        self._is_untouched = False
        self._estimate.add(item)

    def chunk(self, request: Request, most: int, start: int | None = None) -> int:
        """Tokens of the request that fit, at most `most`; the first chunk of a step is never too small to go on."""
        first = request.num_computed_tokens if start is None else start
        return promised_chunk(
            lambda n: self._estimate.seconds(BatchItem(request, first, n)),
            most,
            self._limit_s,
            is_first=self._is_untouched,
        )


def _chunk(request: Request, budget: int, start: int | None = None) -> int:
    """Tokens the next step computes, from `start` on or from where the request stands. What a sparse one generated is
    computed token by token, also a second time: the way a token attended is part of its keys and values.
    """
    first = request.num_computed_tokens if start is None else start
    num_tokens = min(request.num_known_tokens - first, budget)
    if request.is_sparse:
        num_left = request.num_prompt_tokens - first
        return min(num_tokens, num_left if num_left > 0 else 1)
    return num_tokens


def _rank(request: Request) -> tuple[float, str]:
    return request.rank
