"""How many KV pages a device can hold, and a named error with figures when it cannot hold even one.

Memory that is free counts the limits of a container (cgroup v1 and v2), not only those of the machine.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vashista.engine.config import EngineConfig
from vashista.engine.errors import NotEnoughMemoryError

GPU_FRACTION = 0.85
CPU_FRACTION = 0.3
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    available = _meminfo_available()
    for limit_file, usage_file in _CGROUP_FILES:
        limit, usage = _read_number(limit_file), _read_number(usage_file)
        if limit is not None and usage is not None:
            available = min(available, limit - usage)
    return max(available, 0)


def check_weights_fit(num_bytes: int, device: torch.device) -> None:
    """Raise NotEnoughMemoryError if weights of this size do not fit beside what is in use."""
    free = free_bytes(device)
    if num_bytes > free:
        raise NotEnoughMemoryError(
            f"The weights and rotary tables need {_gib(num_bytes)} on {device}, of which {_gib(free)} are free, "
            "and KV pages come on top."
        )


def count_pages(config: EngineConfig, page_bytes: int, max_context: int, device: torch.device) -> int:
    """KV pages to reserve, the weights being loaded. At most what all running requests can use."""
    useful = -(-max_context // config.page_size) * config.max_running_requests
    free = free_bytes(device)
    if config.kv_cache_bytes is not None:
        if config.kv_cache_bytes > free:
            raise NotEnoughMemoryError(
                f"kv_cache_bytes asks for {_gib(config.kv_cache_bytes)} on {device}, of which {_gib(free)} are free."
            )
        budget, asked = config.kv_cache_bytes, f"kv_cache_bytes is {config.kv_cache_bytes}"
    else:
        fraction = config.kv_memory_fraction or (GPU_FRACTION if device.type == "cuda" else CPU_FRACTION)
        budget, asked = int(free * fraction), f"{fraction:.0%} of the free {_gib(free)} on {device}"
    if budget < page_bytes:
        raise NotEnoughMemoryError(
            f"One KV page of {config.page_size} tokens needs {page_bytes} bytes, but {asked}; "
            f"a whole context of {max_context} tokens needs {_gib(-(-max_context // config.page_size) * page_bytes)}."
        )
    return min(budget // page_bytes, useful)


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise NotEnoughMemoryError("/proc/meminfo has no MemAvailable: give kv_cache_bytes.")


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such cgroup, or no limit ("max")
        return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
