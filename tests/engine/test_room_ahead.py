"""Memory ahead of use: given while there is nothing to do, a little at a time, no further than the lead, unchanged."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from vashista.engine.attention.dense_cpu import DenseCpuAttention
from vashista.engine.attention.interface import AttentionShape, Reserving
from vashista.engine.attention.sparse_cpu import SparseCpuAttention
from vashista.engine.config import EngineConfig
from vashista.engine.engine import Engine
from vashista.engine.messages import SamplingParams, Submit
from vashista.engine.room_ahead import RoomAhead
from vashista.kernels.cpu import library as cpu_library
from vashista.kernels.cpu.large_pages import PAGE_BYTES, large_empty, take_memory
from vashista.kernels.cpu.sparse import Rule

MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"
SHAPE = AttentionShape(3, 4, 2, 64, 0.125, 64, (None,) * 3, torch.float32, torch.device("cpu"))


def resident_bytes(tensor: torch.Tensor) -> int:
    """What the system has given of a tensor that lies in a mapping of its own."""
    first = tensor.data_ptr()
    for part in Path("/proc/self/smaps").read_text().split("VmFlags")[:-1]:
        lines = [line for line in part.splitlines() if line]
        start, end = (int(number, 16) for number in next(x for x in lines if "-" in x.split()[0]).split()[0].split("-"))
        if start <= first < end:
            return 1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])
    raise AssertionError("it lies nowhere")


def test_memory_is_there_after_it_was_taken_and_holds_what_it_held() -> None:
    room = large_empty((8 * PAGE_BYTES,), torch.uint8)
    before = resident_bytes(room)
    room[PAGE_BYTES + 5], room[-1] = 7, 9
    take_memory(room)
    assert resident_bytes(room) >= before + 8 * PAGE_BYTES - 2 * mmap.PAGESIZE
    assert (int(room[PAGE_BYTES + 5]), int(room[-1])) == (7, 9)


def extend_all(ahead: RoomAhead, num_used: int) -> int:
    count = 0
    while ahead.extend(num_used):
        count += 1
    return count


def test_room_is_made_in_small_parts_up_to_the_lead_and_follows_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "vashista.engine.room_ahead.take_memory", lambda room: taken.append((room.data_ptr(), room.numel()))
    )
    wide, narrow = torch.empty(100, PAGE_BYTES // 4, dtype=torch.uint8), torch.empty(100, 64, dtype=torch.uint8)
    ahead = RoomAhead([wide, narrow], lead_bytes=10 * (PAGE_BYTES // 4 + 64))

    def pages(tensor: torch.Tensor) -> list[int]:
        size, first = tensor.shape[1], tensor.data_ptr()
        spans = [((at - first) // size, num // size) for at, num in taken if 0 <= at - first < tensor.numel()]
        return [page for start, count in spans for page in range(start, start + count)]

    extend_all(ahead, 0)
    assert pages(wide) == pages(narrow) == list(range(10))
    assert max(num for _, num in taken) <= PAGE_BYTES
    assert not ahead.extend(0)
    taken.clear()
    extend_all(ahead, 4)
    assert pages(wide) == pages(narrow) == list(range(10, 14))
    taken.clear()
    extend_all(ahead, 95)  # what was used in between came by itself; the store ends at 100
    assert pages(wide) == pages(narrow) == list(range(95, 100))
    assert extend_all(ahead, 100) == 0


def test_room_is_short_while_a_quarter_of_the_lead_is_not_there() -> None:
    part = torch.empty(100, PAGE_BYTES, dtype=torch.uint8)
    ahead = RoomAhead([part, part], lead_bytes=40 * PAGE_BYTES)  # 20 pages
    count = 0
    while ahead.is_short(0):
        assert ahead.extend(0)
        count += 1
    assert count == 2 * 5
    assert ahead.is_short(1)
    extend_all(ahead, 0)
    assert not ahead.is_short(15)
    assert ahead.is_short(16)
    extend_all(ahead, 98)
    assert not ahead.is_short(98)  # the store ends


def test_a_store_without_parts_wants_nothing() -> None:
    assert not RoomAhead([]).extend(0)
    assert not RoomAhead([]).is_short(0)


def attentions() -> list[DenseCpuAttention | SparseCpuAttention]:
    found: list[DenseCpuAttention | SparseCpuAttention] = [DenseCpuAttention(SHAPE)]
    if cpu_library.load() is not None:
        found += [SparseCpuAttention(rule.name, rule, SHAPE) for rule in Rule]
    return found


@pytest.mark.parametrize("attention", attentions(), ids=lambda attention: attention.name)
def test_the_parts_of_a_store_are_all_of_it(attention: DenseCpuAttention | SparseCpuAttention) -> None:
    assert isinstance(attention, Reserving)
    attention.allocate(5)
    parts = attention.stretches()
    assert all(part.shape[0] == 5 and part.dtype is torch.uint8 and part.is_contiguous() for part in parts)
    assert sum(part.shape[1] for part in parts) == attention.page_bytes()
    for part in parts:
        part.fill_(0)
    parts[0][2].fill_(1)  # the third page of the first layer's first head's keys
    keys, _ = attention.read_cache(0, [2, 3], 128)
    assert bool((keys[0, :64].view(torch.uint8) == 1).all())
    assert not keys[0, 64:].any()
    assert not keys[1].any()


def test_an_engine_at_rest_makes_room_and_answers_the_same() -> None:
    def answer(*, makes_room: bool) -> list[int]:
        config = EngineConfig(
            model_dir=str(MODEL), device="cpu", num_threads=1, max_context=256, max_running_requests=2
        )
        engine = Engine(config)
        tokens: list[int] = []
        for name in "ab":
            if makes_room:
                assert engine.make_room() or name == "b"  # the whole store is less than what may lie ahead
                while engine.make_room():
                    pass
            sampling = SamplingParams(seed=0, max_tokens=20, temperature=0.0, ignore_eos=True)
            engine.submit(Submit(name, [ord(name), *range(300, 380)], sampling, 0.0))
            while engine.has_work:
                tokens += [token for event in engine.step() for token in event.token_ids]
        return tokens

    assert answer(makes_room=True) == answer(makes_room=False)
