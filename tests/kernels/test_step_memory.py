"""What one step after another lays down for the kernels."""

from __future__ import annotations

import ctypes

import torch

from vashista.kernels.cpu.step_memory import StepMemory


def read(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address))


def test_room_grows_and_is_kept() -> None:
    memory = StepMemory()
    first = memory.room("scratch", 100, torch.float32)
    assert first.numel() >= 100
    assert memory.room("scratch", 100, torch.float32) is first
    assert memory.room("scratch", 5, torch.float32) is first
    assert memory.room("open", 5, torch.int32) is not first
    larger = memory.room("scratch", first.numel() + 1, torch.float32)
    assert larger.numel() > first.numel()


def test_a_tensor_of_a_shape_is_made_anew_for_another() -> None:
    memory = StepMemory()
    first = memory.shaped("kept", (2, 3), torch.int32)
    assert first.shape == (2, 3)
    assert memory.shaped("kept", (2, 3), torch.int32) is first
    assert memory.shaped("kept", (3, 2), torch.int32).shape == (3, 2)


def test_a_table_follows_the_list_it_was_made_of() -> None:
    memory, pages = StepMemory(), [3, 1, 2**40]
    address = memory.table("pages", pages)
    assert read(address, 3) == [3, 1, 2**40]
    assert memory.table("pages", [3, 1, 2**40]) == address
    pages.append(7)
    assert read(memory.table("pages", pages), 4) == [3, 1, 2**40, 7]
    pages[0] = 5
    assert read(memory.table("pages", pages), 4) == [5, 1, 2**40, 7]
