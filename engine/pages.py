"""The pages of the KV cache: who holds which, which still carry a prefix worth reusing. No torch here.

A page is in one of three states: *free* (nothing in it), *held* (by one or more requests), *cached* (held by nobody,
but its tokens are known by hash and can be taken up again). The scheduler calls `match`, `allocate`, `publish` and
`free`; the attention backends only see page numbers. Invariant, checked by `check`: free + held + cached = all pages.

Neighbouring pages are preferred, so that a request's cache is a few long runs: the CPU backend attends to each run
without copying it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b

FREE, HELD, CACHED = 0, 1, 2
_GROWTH_PAGES = 8
"""Room left between runs where possible, so that decoding requests keep growing in place."""


def root_hash(model: str, adapter: str = "", salt: str = "") -> bytes:
    """The hash before a request's first page: requests share pages only if model, adapter and salt agree."""
    parts = [part.encode() for part in (model, adapter, salt)]
    return blake2b(b"".join(len(part).to_bytes(8, "little") + part for part in parts), digest_size=16).digest()


def extend_hash(parent: bytes, token_ids: list[int]) -> bytes:
    """The hash of a full page: of everything before it, and of its own tokens."""
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=16).digest()


class PageAllocator:
    """Owns the state of `num_pages` pages. Not thread-safe: one engine, one thread."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0
        self.num_pages = num_pages
        self._state = bytearray(num_pages)
        self._num_holders = [0] * num_pages
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_free = num_pages
        self.num_ever_held = 0
        """Pages up to the last that was ever held."""

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out: free ones and cached ones."""
        return self._num_free + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds but that carry a reusable prefix."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages held by requests."""
        return self.num_pages - self.num_available

    def count_cached(self, hashes: list[bytes]) -> tuple[int, int]:
        """Length of the longest known prefix of `hashes`, and how many of its pages nobody holds."""
        num_known = num_unheld = 0
        for page_hash in hashes:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            num_known += 1
            num_unheld += self._state[page] == CACHED
        return num_known, num_unheld

    def match(self, hashes: list[bytes]) -> list[int]:
        """Take up the longest known prefix of `hashes`; the caller holds the returned pages."""
        pages = []
        for page_hash in hashes:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            if self._state[page] == CACHED:
                del self._cached[page]
                self._state[page] = HELD
            self._num_holders[page] += 1
            pages.append(page)
        return pages

    def allocate(self, num_pages: int, after: int | None = None) -> list[int] | None:
        """Hold fresh pages, behind page `after` where possible; None, and no change, if too few are left."""
        if num_pages > self.num_available:
            return None
        pages: list[int] = []
        if after is not None:
            page = after + 1
            while len(pages) < num_pages and page < self.num_pages and self._state[page] == FREE:
                pages.append(self._take(page))
                page += 1
        while len(pages) < num_pages:
            pages += self._take_run(num_pages - len(pages))
        return pages

    def publish(self, page: int, page_hash: bytes) -> None:
        """Make a full, computed page known by its hash. A page with the same content that is already known stays it."""
        assert self._state[page] == HELD
        if page_hash not in self._page_of and self._hash_of[page] is None:
            self._page_of[page_hash] = page
            self._hash_of[page] = page_hash

    def free(self, pages: list[int]) -> None:
        """Let go of pages, a request's in order. Its last pages become the first to be evicted."""
        for page in reversed(pages):
            assert self._num_holders[page] > 0, f"page {page} is not held"
            self._num_holders[page] -= 1
            if self._num_holders[page]:
                continue
            if self._hash_of[page] is None:
                self._state[page] = FREE
                self._num_free += 1
            else:
                self._state[page] = CACHED
                self._cached[page] = None

    def forget_cached(self) -> None:
        """Turn every cached page into a free one."""
        while self._cached:
            self._evict()

    def check(self, holdings: list[list[int]]) -> None:
        """Assert that the books balance, given the page lists of all requests. For tests and after-crash checks."""
        holders = [0] * self.num_pages
        for pages in holdings:
            for page in pages:
                holders[page] += 1
        assert holders == self._num_holders, "holders do not match"
        for page in range(self.num_pages):
            expected = HELD if holders[page] else CACHED if self._hash_of[page] is not None else FREE
            assert self._state[page] == expected, f"page {page} is in state {self._state[page]}, not {expected}"
            assert (page in self._cached) == (expected == CACHED)
        assert self._num_free == self._state.count(FREE)
        assert {h: p for p, h in enumerate(self._hash_of) if h is not None} == self._page_of

    def _take(self, page: int) -> int:
        self._state[page] = HELD
        self._num_holders[page] = 1
        self._num_free -= 1
        self.num_ever_held = max(self.num_ever_held, page + 1)
        return page

    def _take_run(self, num_wanted: int) -> list[int]:
        """At least one page: the start of a free run, the longer the better; evicts the oldest cached page if none.

        Where there is plenty, room to grow is left before the run, for its neighbour, and behind it.
        """
        if not self._num_free:
            self._evict()
        start = self._state.find(bytes(num_wanted + 2 * _GROWTH_PAGES))
        if start >= 0:
            start += _GROWTH_PAGES if start else 0
            return [self._take(page) for page in range(start, start + num_wanted)]
        length = num_wanted
        while (start := self._state.find(bytes(length))) < 0:
            length //= 2
        return [self._take(page) for page in range(start, start + length)]

    def _evict(self) -> None:
        page, _ = self._cached.popitem(last=False)
        page_hash = self._hash_of[page]
        assert page_hash is not None
        del self._page_of[page_hash]
        self._hash_of[page] = None
        self._state[page] = FREE
        self._num_free += 1
