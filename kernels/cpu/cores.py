"""Each compute thread on a core of its own, where a process computes with as many threads as it has cores.

Left to itself the operating system may wake a compute thread on the core of the one that wakes it, and takes some
milliseconds to see that another core is free. Until then the two take turns, each waiting for the other at the end of
every product: on two cores of a virtual AMD EPYC a burst of 30 ms took 58 ms in most of the tries after a pause, and
a prompt's step of 45 ms took 250 while anybody else used one core. Threads that keep their cores are woken there.

With fewer threads than cores the system has a free core to give, and two engines on one machine would be put on the
same ones: then nothing is placed. Nor is it where the environment says how threads are to be bound (OMP_PROC_BIND,
GOMP_CPU_AFFINITY).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Mapping

import torch

from vashista.kernels.cpu.library import openmp_of_torch

DECIDED_BY = ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY")


def place_threads(environ: Mapping[str, str]) -> list[int]:
    """Put the calling thread and the OpenMP threads that work for it on a core each, for good.

    Returns the core of each thread, in their order; none where they are left to the system: fewer threads than cores,
    one core, an environment that has decided, no OpenMP library, or a system that refuses. Threads that the caller
    starts later inherit its core.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if any(name in environ for name in DECIDED_BY) or len(cores) < 2 or torch.get_num_threads() != len(cores):
        return []
    path = openmp_of_torch()
    if path is None:
        return []
    openmp = ctypes.CDLL(path)  # already loaded: this only finds it
    try:
        parallel, number_of = openmp.GOMP_parallel, openmp.omp_get_thread_num
    except AttributeError:
        return []
    placed: dict[int, int] = {}

    def place(_: int | None) -> None:
        number = number_of()
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {cores[number]})  # 0: of the thread that calls
            placed[number] = cores[number]

    parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(place), None, len(cores), 0)
    return [placed[number] for number in sorted(placed)]
