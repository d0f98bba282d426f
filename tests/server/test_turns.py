"""Turns: one at a time, the small before the large, nobody for ever."""

from __future__ import annotations

import asyncio
import contextlib
import random

from vashista.server.turns import SECONDS_A_BYTE, Turns


class Play:
    """Tasks that take turns; `order` is who had one."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.turns = Turns(lambda: self.now_s)
        self.order: list[str] = []
        self.num_inside = 0

    async def one(self, name: str, size: int) -> None:
        async with self.turns.of(size):
            self.num_inside += 1
            assert self.num_inside == 1
            try:
                await asyncio.sleep(0)
            finally:
                self.num_inside -= 1
            self.order.append(name)

    async def start(self, name: str, size: int) -> asyncio.Task[None]:
        task = asyncio.create_task(self.one(name, size))
        await asyncio.sleep(0)
        return task


def test_small_ones_overtake_large_ones_and_equal_ones_keep_their_order():
    async def play():
        own = Play()
        tasks = []
        async with own.turns.of(5):
            for name, size in (("large", 10**6), ("small", 10), ("larger", 10**7), ("small too", 10)):
                tasks.append(await own.start(name, size))
        await asyncio.gather(*tasks)
        assert own.order == ["small", "small too", "large", "larger"]

    asyncio.run(play())


def test_a_large_one_is_overtaken_for_a_time_that_its_size_is_worth_and_no_longer():
    async def play():
        own = Play()
        async with own.turns.of(5):
            tasks = [await own.start("large", 10**6)]
            own.now_s = 10**6 * SECONDS_A_BYTE - 1.0
            tasks.append(await own.start("small", 10))
            own.now_s += 2.0
            tasks.append(await own.start("late", 10))
        await asyncio.gather(*tasks)
        assert own.order == ["small", "large", "late"]

    asyncio.run(play())


def test_whoever_leaves_the_queue_takes_no_turn_and_loses_none():
    async def play():
        source = random.Random(0)
        own = Play()
        for _ in range(200):
            tasks = [await own.start(str(number), source.choice([1, 10**6])) for number in range(8)]
            for _ in range(source.randrange(6)):
                await asyncio.sleep(0)
            for task in source.sample(tasks, 4):
                task.cancel()
                if source.random() < 0.5:
                    await asyncio.sleep(0)
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        async with asyncio.timeout(5), own.turns.of(1):
            assert not own.turns._waiting

    asyncio.run(play())
