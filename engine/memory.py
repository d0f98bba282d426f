"""How many KV pages a device can hold, and a named error with figures when it cannot hold even one."""

from __future__ import annotations

import torch

from vashista.engine.config import EngineConfig
from vashista.engine.errors import NotEnoughMemoryError
from vashista.engine.main_memory import Room, main_memory

GPU_FRACTION = 0.85
CPU_FRACTION = 0.3


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on the device."""
    return _room(device).num_bytes


def check_weights_fit(num_bytes: int, device: torch.device) -> None:
    """Raise NotEnoughMemoryError if weights of this size do not fit beside what is in use."""
    room = _room(device)
    if num_bytes > room.num_bytes:
        raise NotEnoughMemoryError(
            f"The weights and rotary tables need {_gib(num_bytes)} on {device}, of which {_free(room)}, "
            "and KV pages come on top."
        )


def count_pages(config: EngineConfig, page_bytes: int, max_context: int, device: torch.device) -> int:
    """KV pages to reserve, the weights being loaded. At most what all running requests can use."""
    useful = -(-max_context // config.page_size) * config.max_running_requests
    room = _room(device)
    if config.kv_cache_bytes is not None:
        if config.kv_cache_bytes > room.num_bytes:
            raise NotEnoughMemoryError(
                f"kv_cache_bytes asks for {_gib(config.kv_cache_bytes)} on {device}, of which {_free(room)}."
            )
        budget, asked = config.kv_cache_bytes, f"kv_cache_bytes is {config.kv_cache_bytes}"
    else:
        fraction = config.kv_memory_fraction or (GPU_FRACTION if device.type == "cuda" else CPU_FRACTION)
        budget = int(room.num_bytes * fraction)
        asked = f"{fraction:.0%} may be taken of what is free on {device}: {_free(room)}"
    if budget < page_bytes:
        raise NotEnoughMemoryError(
            f"One KV page of {config.page_size} tokens needs {page_bytes} bytes, but {asked}; "
            f"a whole context of {max_context} tokens needs {_gib(-(-max_context // config.page_size) * page_bytes)}."
        )
    return min(budget // page_bytes, useful)


def _room(device: torch.device) -> Room:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return Room(free, "the driver's count")
    return main_memory()


def _free(room: Room) -> str:
    return f"{_gib(room.num_bytes)} are free by {room.limit}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
