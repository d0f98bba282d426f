"""What the engine's device draws while it computes, where something measures it: NVML on a GPU, RAPL on a CPU.

The engine asks its `PowerMeter` after steps; the result travels in `EngineStats` and the server turns a request's busy
seconds into joules with it. Both sources count joules since some moment, so a mean power is a difference over a time.
No torch here; NVML is read through nvidia-ml-py (the extra `cuda`) and its absence is no error.

RAPL (the kernel's powercap files) counts whole processor packages, so it includes what else runs on the machine, and
newer kernels let root alone read it. NVML counts the whole board.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

EnergySource = Literal["nvml", "rapl"]
POWERCAP = Path("/sys/class/powercap")
WINDOW_S = 0.5
"""Between readings: NVML renews its counter about ten times a second."""
LEAST_BUSY_SHARE = 0.8
"""A window counts if the engine computed in so much of it: else idle power would be taken for busy power."""
NEWEST = 0.3
"""Weight of the newest window in the mean."""


class Counter(Protocol):
    """Something that counts energy."""

    source: EnergySource

    def read_j(self) -> float:
        """Joules so far, from an arbitrary begin; OSError when it cannot be read."""


class PowerMeter:
    """The mean power while the engine computes."""

    def __init__(self, counter: Counter | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._counter = counter
        self._clock = clock
        self._last: tuple[float, float, float] | None = None
        self.power_w: float | None = None
        """None until a first window was measured, or without a counter."""

    @property
    def source(self) -> EnergySource | None:
        """Who measured `power_w`."""
        return None if self._counter is None or self.power_w is None else self._counter.source

    def observe(self, busy_s_total: float) -> None:
        """Called after steps with the engine's busy time so far; reads the counter at most every WINDOW_S."""
        if self._counter is None:
            return
        now_s = self._clock()
        if self._last is not None and now_s - self._last[0] < WINDOW_S:
            return
        try:
            energy_j = self._counter.read_j()
        except OSError:
            self._counter = self.power_w = None  # it is gone: energy is modelled from here on
            return
        if self._last is not None:
            then_s, then_j, then_busy_s = self._last
            window_s, used_j = now_s - then_s, energy_j - then_j
            if used_j > 0 and busy_s_total - then_busy_s >= LEAST_BUSY_SHARE * window_s:
                power_w = used_j / window_s
                self.power_w = power_w if self.power_w is None else self.power_w + NEWEST * (power_w - self.power_w)
        self._last = (now_s, energy_j, busy_s_total)


class NvmlCounter:
    """The energy counter of one GPU; Volta and newer have it."""

    source: EnergySource = "nvml"

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)

    def read_j(self) -> float:
        """Since the driver was loaded."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except self._nvml.NVMLError as error:
            raise OSError(str(error)) from error


class RaplCounter:
    """The sum over all processor packages. Each counter runs over at a known value."""

    source: EnergySource = "rapl"

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._ranges_uj = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        self._last_uj = self._read()
        self._total_uj = 0

    def read_j(self) -> float:
        """Since the counter was made."""
        values = self._read()
        for value, last, span in zip(values, self._last_uj, self._ranges_uj, strict=True):
            self._total_uj += value - last if value >= last else value - last + span
        self._last_uj = values
        return self._total_uj / 1e6

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]


def gpu_counter(uuid: str) -> Counter | None:
    """Of the GPU with this UUID; None where NVML or its Python module is missing or cannot count."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        counter = NvmlCounter(pynvml, uuid)
        counter.read_j()
    except (pynvml.NVMLError, OSError):
        return None
    return counter


def cpu_counter(folder: Path = POWERCAP) -> Counter | None:
    """Of this machine's packages; None where the kernel shows none or does not let us read them."""
    try:
        # intel-rapl:0 is a package (AMD's too); intel-rapl:0:1 would be a part of one and be counted twice.
        zones = sorted(path for path in folder.glob("intel-rapl:*") if path.name.count(":") == 1)
        zones = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        return RaplCounter(zones) if zones else None
    except (OSError, ValueError):
        return None
