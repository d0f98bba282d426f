"""A request inside the engine: one object for its whole life, from `submit` to its last `TokenEvent`. No torch here.

The scheduler owns `pages`, `num_computed_tokens` and `status`; the engine appends to `token_ids`. There is no prefill
phase: computed tokens catch up with known tokens, and whenever they have caught up a new token is sampled.
"""

from __future__ import annotations

from enum import Enum

from vashista.engine.messages import SamplingParams, Submit
from vashista.engine.pages import extend_hash

PRIORITY_SECONDS = 30.0
"""What one level of priority is worth in waiting time. Finite, so that a low priority delays but never starves."""
PATIENCE_S = 60.0
"""A request without a deadline has its place in the queue as if it had one of so many seconds (at priority 0)."""


def rank_of(submit: Submit) -> tuple[float, str]:
    """The place of a request in the queue, the lowest first: the time by which it should be done.

    It is fixed when the request comes and not before its arrival plus the least that a priority or a deadline can
    make of it; so from some moment on no newcomer gets before a request that waits, and what is before it ends.
    """
    due_s = submit.due_s
    if due_s is None:
        due_s = submit.arrival_s + PATIENCE_S + submit.priority * PRIORITY_SECONDS
    return due_s, submit.request_id


class Status(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """Known and computed tokens, pages and place in the queue of one request."""

    __slots__ = (
        "_root_hash",
        "id",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_published_pages",
        "page_hashes",
        "pages",
        "rank",
        "sampling",
        "scheduled_s",
        "status",
        "submit",
        "token_ids",
    )

    def __init__(self, submit: Submit, root_hash: bytes) -> None:
        self.id = submit.request_id
        self.submit = submit
        self.sampling: SamplingParams = submit.sampling
        self.token_ids = list(submit.prompt_token_ids)
        self.num_prompt_tokens = len(submit.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        self.pages: list[int] = []
        self.page_hashes: list[bytes] = []
        self.num_published_pages = 0
        self.status = Status.WAITING
        self.scheduled_s: float | None = None
        self.rank = rank_of(submit)
        self._root_hash = root_hash

    @property
    def num_known_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.token_ids)

    @property
    def num_tokens_at_most(self) -> int:
        """Prompt and output tokens when it has generated all that it may."""
        return self.num_prompt_tokens + self.sampling.max_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_sparse(self) -> bool:
        """Whether generated tokens attend to a part of the context only."""
        return self.submit.attention.is_sparse

    @property
    def num_shareable_tokens(self) -> int:
        """Known tokens whose keys and values do not depend on how this request attends; only these enter the cache."""
        return self.num_prompt_tokens if self.is_sparse else self.num_known_tokens

    @property
    def reads_cache(self) -> bool:
        """Whether cached pages may stand for computed ones: not while prompt positions must give log probabilities."""
        return self.sampling.prompt_logprobs is None or self.num_output_tokens > 0

    def update_hashes(self, page_size: int) -> list[bytes]:
        """Hashes of all full pages of shareable tokens, computed as far as they are not yet."""
        for page in range(len(self.page_hashes), self.num_shareable_tokens // page_size):
            parent = self.page_hashes[-1] if self.page_hashes else self._root_hash
            self.page_hashes.append(extend_hash(parent, self.token_ids[page * page_size : (page + 1) * page_size]))
        return self.page_hashes
