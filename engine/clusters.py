"""Whether the GPUs of this machine attend to few sparse requests by clusters of thread blocks; `vashista doctor` asks.

What a GPU is, NVIDIA's management library says, for which none of its memory need be free; what is missing to compile
and launch there, `kernels/cuda/launcher.py` says. That brings torch in, on machines with a GPU alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

CORES_PER_MULTIPROCESSOR = 128
"""Of compute capability 9.0 (CUDA C++ Programming Guide, section Arithmetic Instructions)."""


class Clusters(NamedTuple):
    """What was found."""

    fit: tuple[str, ...]
    """Names of the GPUs that have clusters for the kernels."""
    others: tuple[str, ...]
    """The rest, each with the reason."""
    why_not: str | None
    """What is missing on this machine to use those of `fit`, in words; None where nothing is, or no GPU fits."""


def find_clusters() -> Clusters:
    """Look at all GPUs. Raises OSError, with words, where they cannot be asked what they are."""
    from vashista.kernels.cuda import launcher

    with _nvml() as nvml:
        devices = [_describe(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    fit, others = [], []
    for device in devices:
        if device.capability != launcher.CAPABILITY:
            others.append(f"{device.name} has compute capability {_dotted(device.capability)}")
        elif device.is_split:
            others.append(f"{device.name} is split by MIG")
        elif device.num_multiprocessors < launcher.MIN_MULTIPROCESSORS:
            others.append(f"{device.name} has {device.num_multiprocessors} multiprocessors")
        else:
            fit.append(device.name)
    return Clusters(tuple(fit), tuple(others), launcher.why_not() if fit else None)


class _Device(NamedTuple):
    name: str
    capability: tuple[int, int]
    num_multiprocessors: int
    """As of a device of compute capability 9.0."""
    is_split: bool


@contextmanager
def _nvml() -> Iterator[Any]:
    """NVML, ready to be asked; OSError for whatever it says."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise OSError("nvidia-ml-py is not installed") from error
    try:
        nvml.nvmlInit()
        try:
            yield nvml
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise OSError(f"NVML says: {error}") from error


def _describe(nvml: Any, index: int) -> _Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    try:
        is_split = bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # of a device that cannot be
        is_split = False
    return _Device(
        str(nvml.nvmlDeviceGetName(handle)),
        tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        nvml.nvmlDeviceGetNumGpuCores(handle) // CORES_PER_MULTIPROCESSOR,
        is_split,
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
