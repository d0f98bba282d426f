"""Compiles the CUDA kernels of this folder for the device they run on, and launches them.

By NVRTC and the driver, through NVIDIA's own bindings (`cuda-bindings`); both come with PyTorch's builds for CUDA, so
that no compiler need be installed. A kernel is compiled once a process for each set of constants, in about a second,
when it is first asked for, which must not be inside the capture of a CUDA graph; the engine's warm-up sees to that.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vashista.kernels.requirements import KernelUnavailableError
from vashista.kernels.triton_guard import INTERPRETED

FOLDER = Path(__file__).parent
SOURCES = (
    "device.h",
    "cluster_search.cu",
    "cluster_score.cu",
    "cluster_rank.cu",
    "cluster_upkeep.cu",
    "cluster_attend.cu",
)
NAME = b"cluster_attend"
CAPABILITY = (9, 0)
"""Where the kernels have been run. Clusters of 16 blocks are not a promise of other devices."""

MIN_MULTIPROCESSORS = 100
"""Of a whole device: in a part of one sixteen blocks may not find room side by side."""


@functools.lru_cache(maxsize=64)
def has_clusters(device: torch.device) -> bool:
    """True where the kernels can be compiled and run."""
    if INTERPRETED or device.type != "cuda" or torch.cuda.get_device_capability(device) != CAPABILITY:
        return False
    if torch.cuda.get_device_properties(device).multi_processor_count < MIN_MULTIPROCESSORS:
        return False
    return why_not() is None


@functools.cache
def why_not() -> str | None:
    """What is missing to compile and launch on a device that has clusters, in words; None where nothing is."""
    try:
        nvrtc, driver = (importlib.import_module(f"cuda.bindings.{name}") for name in ("nvrtc", "driver"))
        nvrtc.nvrtcVersion()
        driver.cuDriverGetVersion()
    except ImportError as error:
        return f"cuda-bindings cannot be imported: {error}"
    except RuntimeError as error:  # of cuda-pathfinder, for a library that it does not find
        return str(error).splitlines()[0]
    return None


@dataclass(frozen=True)
class Kernel:
    """A function on one device."""

    function: Any
    shared_bytes: int


def read_source() -> str:
    """The kernel, in one piece: the files follow each other, and none includes another."""
    return "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SOURCES)


def _ask(call: str, result: tuple[Any, ...], log: str = "") -> Any:
    """The result of a call of the bindings, whose first value is a status. Raises KernelUnavailableError."""
    status, *values = result
    if int(status) != 0:
        raise KernelUnavailableError(f"{call} failed with {status.name}{log}")
    return values[0] if len(values) == 1 else tuple(values)


def compile_source(names: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """The machine code for these constants. Raises KernelUnavailableError with the compiler's words."""
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    program = _ask("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(read_source().encode(), NAME + b".cu", 0, [], []))
    options = [b"--std=c++17", b"--gpu-architecture=sm_%d%d" % capability]
    options += [f"-D{name}={value}".encode() for name, value in names.items()]
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = ""
    if int(result[0]) != 0:
        size = _ask("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program))
        text = b" " * size
        _ask("nvrtcGetProgramLog", nvrtc.nvrtcGetProgramLog(program, text))
        log = ": " + text.decode(errors="replace").strip("\0 \n")
    _ask("nvrtcCompileProgram", result, log)
    code: bytes = b" " * _ask("nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program))
    _ask("nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, code))
    _ask("nvrtcDestroyProgram", nvrtc.nvrtcDestroyProgram(program))
    return code


@functools.lru_cache(maxsize=256)
def _load(names: tuple[tuple[str, int], ...], device: torch.device) -> Kernel:
    driver = importlib.import_module("cuda.bindings.driver")
    code = compile_source(dict(names), torch.cuda.get_device_capability(device))
    module = _ask("cuModuleLoadData", driver.cuModuleLoadData(code))
    function = _ask("cuModuleGetFunction", driver.cuModuleGetFunction(module, NAME))
    place, size = _ask("cuModuleGetGlobal", driver.cuModuleGetGlobal(module, b"num_shared_bytes"))
    number = ctypes.c_uint()
    _ask("cuMemcpyDtoH", driver.cuMemcpyDtoH(ctypes.addressof(number), place, size))
    attributes = driver.CUfunction_attribute
    for attribute, value in (
        (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, number.value),
        (attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
    ):
        _ask("cuFuncSetAttribute", driver.cuFuncSetAttribute(function, attribute, value))
    return Kernel(function, number.value)


@functools.lru_cache(maxsize=256)
def can_launch(names: tuple[tuple[str, int], ...], device: torch.device) -> bool:
    """Whether the kernel with these constants compiles, loads and has room on the device; if not, stderr says why once.

    A driver older than the compiler, or a part of a device, need not stop an engine that can do without.
    """
    driver = importlib.import_module("cuda.bindings.driver")
    try:
        with torch.cuda.device(device):
            kernel = _load(names, device)
            config = _configure(driver, kernel, dict(names), 1)
            result = driver.cuOccupancyMaxActiveClusters(kernel.function, config)
        if not _ask("cuOccupancyMaxActiveClusters", result):
            raise KernelUnavailableError(f"{device} has no room for {dict(names)['CLUSTER']} blocks side by side")
    except KernelUnavailableError as error:
        sys.stderr.write(f"kernels: few sparse requests go through Triton's kernels, which takes longer: {error}\n")
        return False
    return True


def _configure(driver: Any, kernel: Kernel, names: Mapping[str, int], num_clusters: int, *more: Any) -> Any:
    """The configuration of a launch; more: attributes beside the size of the clusters."""
    cluster = driver.CUlaunchAttribute()
    cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = names["CLUSTER"], 1, 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = num_clusters * names["CLUSTER"], 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = names["THREADS"], 1, 1
    config.sharedMemBytes = kernel.shared_bytes
    config.attrs = [cluster, *more]
    config.numAttrs = 1 + len(more)
    return config


def launch(names: Mapping[str, int], job: ctypes.Structure, num_clusters: int, device: torch.device) -> None:
    """`num_clusters` clusters on the current stream; the start overlaps the end of the kernel before."""
    driver = importlib.import_module("cuda.bindings.driver")
    with torch.cuda.device(device):
        kernel = _load(tuple(names.items()), device)
        overlap = driver.CUlaunchAttribute()
        overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
        config = _configure(driver, kernel, names, num_clusters, overlap)
        config.hStream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(job))
        result = driver.cuLaunchKernelEx(config, kernel.function, ctypes.addressof(arguments), 0)
    _ask("cuLaunchKernelEx", result)
