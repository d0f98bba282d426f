"""Decides what each step computes: which requests run, with how many tokens, on which pages. No torch here.

The engine calls `schedule` for a `Batch`, runs it, and calls `complete` with it. Requests run in the order of their
rank (arrival, shifted by priority). Decoding requests come first in a step, so that a long prompt never halts running
streams; the rest of the token budget goes to prompts, in chunks. When pages run out, the request of the last rank
gives all of its pages back and is recomputed later (mostly from the prefix cache). The first-ranked request is never
preempted and every request fits the cache alone, so everything ends and nobody starves.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from vashista.engine.messages import SchedulerRules
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

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(item.num_tokens for item in self.items)


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
    ) -> None:
        assert max_batch_tokens >= max_running_requests, "every running request must get a token in each step"
        self.pages = pages
        self.page_size = page_size
        self.max_running_requests = max_running_requests
        self.max_batch_tokens = max_batch_tokens
        self.prefix_caching = prefix_caching
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
        for request in decoding + prefilling:
            if request.status is not Status.RUNNING:
                continue  # preempted above, for a request of a better rank
            num_tokens = _chunk(request, budget)
            if num_tokens > 0 and self._grow(request, request.num_computed_tokens + num_tokens, batch):
                batch.items.append(BatchItem(request, request.num_computed_tokens, num_tokens))
                budget = self.max_batch_tokens - batch.num_tokens
        if not batch.preempted:
            self._admit(batch, budget)
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

    def _admit(self, batch: Batch, budget: int) -> None:
        """Start waiting requests while budget, places and pages last."""
        computing = self._pages_being_computed()
        for request in list(self._waiting):
            if budget <= 0 or len(self._running) >= self.max_running_requests:
                return
            usable: list[bytes] = []
            num_unheld = 0
            if self.prefix_caching and request.reads_cache:
                # At least one token is computed: its logits are needed.
                usable = request.update_hashes(self.page_size)[: (request.num_known_tokens - 1) // self.page_size]
                num_cached, num_unheld = self.pages.count_cached(usable)
                if num_cached < len(usable) and usable[num_cached] in computing:
                    continue  # its next page is being computed for another request: wait and share it
                usable = usable[:num_cached]
            num_fresh = self.num_pages_for(request.num_known_tokens) - len(usable)
            if num_fresh > self.pages.num_available - num_unheld:
                return
            self._start(request, usable)
            pages = self.pages.allocate(num_fresh, request.pages[-1] if request.pages else None)
            assert pages is not None, "counted above"
            request.pages += pages
            num_tokens = _chunk(request, budget)
            batch.items.append(BatchItem(request, request.num_computed_tokens, num_tokens))
            budget -= num_tokens
            computing.update(self._missing_hashes(request))

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


def _chunk(request: Request, budget: int) -> int:
    """Tokens the next step computes. What a sparse request generated is computed token by token, also a second time:
    the way a token attended is part of its keys and values.
    """
    num_tokens = min(request.num_known_tokens - request.num_computed_tokens, budget)
    if request.is_sparse:
        num_left = request.num_prompt_tokens - request.num_computed_tokens
        return min(num_tokens, num_left if num_left > 0 else 1)
    return num_tokens


def _rank(request: Request) -> tuple[float, str]:
    return request.rank
