"""The page allocator: books that balance, prefixes that are found, neighbours that are preferred."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from vashista.engine.pages import PageAllocator, extend_hash, root_hash

ROOT = root_hash("model")


def chain(*contents: int) -> list[bytes]:
    hashes, parent = [], ROOT
    for content in contents:
        parent = extend_hash(parent, [content])
        hashes.append(parent)
    return hashes


def test_a_published_prefix_is_found_and_shared() -> None:
    pages = PageAllocator(4)
    first = pages.allocate(2)
    assert first is not None
    for page, page_hash in zip(first, chain(1, 2), strict=True):
        pages.publish(page, page_hash)
    assert pages.match(chain(1, 2, 3)) == first
    assert pages.num_held == 2
    pages.free(first)
    assert pages.num_held == 2, "the second holder still has them"
    pages.free(first)
    assert (pages.num_held, pages.num_cached, pages.num_available) == (0, 2, 4)
    assert pages.match(chain(1)) == first[:1]


def test_a_prefix_is_found_only_from_its_beginning() -> None:
    pages = PageAllocator(4)
    held = pages.allocate(2)
    assert held is not None
    hashes = chain(1, 2)
    pages.publish(held[1], hashes[1])
    assert pages.match(hashes) == []


def test_too_many_pages_are_refused_without_a_change() -> None:
    pages = PageAllocator(3)
    assert pages.allocate(2) is not None
    assert pages.allocate(2) is None
    assert pages.num_available == 1


def test_new_pages_continue_behind_the_last_one() -> None:
    pages = PageAllocator(64)
    one = pages.allocate(3)
    other = pages.allocate(3)
    assert one is not None
    assert other is not None
    assert one == list(range(one[0], one[0] + 3))
    assert pages.allocate(2, after=one[-1]) == [one[-1] + 1, one[-1] + 2]
    assert pages.allocate(2, after=other[-1]) == [other[-1] + 1, other[-1] + 2]


def test_the_longest_unused_cached_page_is_evicted_first_and_tails_before_heads() -> None:
    pages = PageAllocator(3)
    held = pages.allocate(3)
    assert held is not None
    hashes = chain(1, 2, 3)
    for page, page_hash in zip(held, hashes, strict=True):
        pages.publish(page, page_hash)
    pages.free(held)
    assert pages.allocate(1) == [held[2]]
    assert pages.count_cached(hashes) == (2, 2)


@pytest.mark.parametrize("other", [("m", "a", "s2"), ("m", "b", "s"), ("n", "a", "s"), ("ma", "", "s")])
def test_model_adapter_and_salt_separate_the_hashes(other: tuple[str, str, str]) -> None:
    assert root_hash("m", "a", "s") != root_hash(*other)


@given(st.lists(st.integers(0, 2**32 - 1)), st.lists(st.integers(0, 2**32 - 1)))
def test_different_pages_have_different_hashes(one: list[int], other: list[int]) -> None:
    assert (extend_hash(ROOT, one) == extend_hash(ROOT, other)) == (one == other)


class PagesMachine(RuleBasedStateMachine):
    """Requests that take, publish, share and free pages in any order."""

    holdings = Bundle("holdings")

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageAllocator(12)
        self.held: list[list[int]] = []

    @rule(target=holdings, num_pages=st.integers(1, 6), data=st.data())
    def take(self, num_pages: int, data: st.DataObject) -> list[int]:
        after = data.draw(st.none() | st.integers(0, 11))
        available = self.pages.num_available
        got = self.pages.allocate(num_pages, after)
        assert (got is None) == (num_pages > available)
        if got is not None:
            assert len(set(got)) == num_pages
            assert not set(got) & {page for pages in self.held for page in pages}, "a held page was handed out"
            self.held.append(got)
        return got or []

    @rule(pages=holdings, contents=st.lists(st.integers(0, 2), max_size=4))
    def publish(self, pages: list[int], contents: list[int]) -> None:
        if any(pages is held for held in self.held):
            for page, page_hash in zip(pages, chain(*contents), strict=False):
                self.pages.publish(page, page_hash)

    @rule(target=holdings, contents=st.lists(st.integers(0, 2), max_size=4))
    def share(self, contents: list[int]) -> list[int]:
        hashes = chain(*contents)
        expected, _ = self.pages.count_cached(hashes)
        pages = self.pages.match(hashes)
        assert len(pages) == expected
        if pages:
            self.held.append(pages)
        return pages

    @rule(pages=consumes(holdings))
    def let_go(self, pages: list[int]) -> None:
        for index, held in enumerate(self.held):
            if held is pages:
                del self.held[index]
                self.pages.free(pages)
                return

    @rule()
    def forget(self) -> None:
        self.pages.forget_cached()
        assert self.pages.num_cached == 0

    @invariant()
    def books_balance(self) -> None:
        self.pages.check(self.held)


TestPagesMachine = PagesMachine.TestCase
TestPagesMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
