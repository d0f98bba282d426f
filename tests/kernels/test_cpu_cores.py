"""Where compute threads are put; in processes of their own, as what is placed stays."""

import os
import subprocess
import sys

import pytest
import torch

from vashista.kernels.cpu import library

CODE = """
import os, sys, threading
import torch
from vashista.kernels.cpu.cores import place_threads

def bound():
    tasks = {int(task): os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}
    return sorted(core for cores in tasks.values() if len(cores) == 1 for core in cores), tasks[other.native_id]

other = threading.Thread(target=threading.Event().wait, daemon=True)
other.start()
torch.set_num_threads(int(sys.argv[1]))
torch.randn(2000, 2000).exp()
cores = os.sched_getaffinity(0)
placed = place_threads(os.environ)
found, others = bound()
assert others == cores and found == placed, (found, placed)
torch.randn(2000, 2000).exp()
assert bound() == (found, others)
print(*placed)
"""

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2 or library.openmp_of_torch() is None,
    reason="one core, or a torch without OpenMP",
)


def placed(num_threads: int, **environ: str) -> list[int]:
    """The cores that the threads were put on, which is where they stay; no other thread of the process is bound."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", CODE, str(num_threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | environ)
    return [int(word) for word in done.stdout.split()]


def test_each_compute_thread_gets_a_core() -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert placed(len(cores)) == cores


def test_fewer_threads_than_cores_are_left_to_the_system() -> None:
    assert placed(len(os.sched_getaffinity(0)) - 1) == []


def test_an_environment_that_says_how_threads_are_bound_is_obeyed() -> None:
    assert placed(len(os.sched_getaffinity(0)), OMP_PROC_BIND="false") == []


def test_a_system_that_refuses_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    from vashista.kernels.cpu import cores

    def refuse(_: int, __: set[int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(cores.os, "sched_setaffinity", refuse)
    monkeypatch.setattr(torch, "get_num_threads", lambda: len(os.sched_getaffinity(0)))
    assert cores.place_threads({}) == []
