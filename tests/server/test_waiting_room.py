"""The books of the queue: who enters, who is refused, and that they balance."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vashista.engine.errors import DrainingError, QueueFullError
from vashista.server.waiting_room import DEFAULT_RETRY_S, WaitingRoom


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_room(running=2, waiting=3, tokens=100, clock=None) -> WaitingRoom:
    return WaitingRoom(
        max_running_requests=running, max_waiting_requests=waiting, max_waiting_tokens=tokens, clock=clock or Clock()
    )


def test_running_and_waiting_requests_fit_and_one_more_does_not():
    room = make_room()
    for place in room.enter([1]) + room.enter([1]):
        place.start()
    room.enter([1, 1, 1])
    with pytest.raises(QueueFullError, match="3 requests are waiting; at most 3 may"):
        room.enter([1])


def test_a_burst_may_fill_the_engine_although_nothing_runs_yet():
    room = make_room(running=10, waiting=1)
    room.enter([1] * 10)
    with pytest.raises(QueueFullError):
        room.enter([1])


def test_all_choices_of_a_request_enter_or_none():
    room = make_room(running=1, waiting=2)
    with pytest.raises(QueueFullError):
        room.enter([1, 1, 1, 1])
    assert (room.num_inside, room.num_waiting, room.num_waiting_tokens) == (0, 0, 0)


def test_waiting_tokens_are_bounded_and_freed_when_the_request_starts():
    room = make_room(waiting=100, tokens=100)
    (first,) = room.enter([60])
    with pytest.raises(QueueFullError, match="60 prompt tokens are waiting"):
        room.enter([41])
    first.start()
    room.enter([41])


def test_a_prompt_larger_than_the_allowance_enters_an_empty_room():
    room = make_room(tokens=10)
    room.enter([5000])
    with pytest.raises(QueueFullError):
        room.enter([1])


def test_a_closed_room_takes_nobody_and_empties():
    async def run():
        room = make_room()
        places = room.enter([1, 1])
        room.close()
        with pytest.raises(DrainingError):
            room.enter([1])
        emptied = asyncio.create_task(room.wait_empty())
        places[0].leave()
        await asyncio.sleep(0)
        assert not emptied.done()
        places[1].leave()
        await emptied

    asyncio.run(run())


def test_retry_after_follows_the_throughput_of_the_last_minute():
    clock = Clock()
    room = make_room(running=1, waiting=50, tokens=1000, clock=clock)
    assert room.retry_after_s() == DEFAULT_RETRY_S
    for place in room.enter([1] * 10):
        clock.now_s += 1.0
        place.leave()
    room.enter([1] * 20)
    assert room.retry_after_s() == pytest.approx(20 * 9 / 10)
    clock.now_s += 1000
    assert room.retry_after_s() == DEFAULT_RETRY_S


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["enter", "start", "leave"]), st.integers(0, 9)), max_size=60))
def test_the_books_balance_whatever_happens(steps):
    room, inside = make_room(tokens=20), []
    for action, number in steps:
        if action == "enter":
            try:
                inside += [(place, number) for place in room.enter([number])]
            except QueueFullError:
                continue
        elif inside:
            place, _ = inside[number % len(inside)]
            getattr(place, action)()
            getattr(place, action)()
            if action == "leave":
                inside.pop(number % len(inside))
    waiting = [(place, tokens) for place, tokens in inside if place._is_waiting]
    assert room.num_inside == len(inside)
    assert room.num_waiting == len(waiting)
    assert room.num_waiting_tokens == sum(tokens for _, tokens in waiting)
