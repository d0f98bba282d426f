"""`cluster_attend.cu` compiled for a CPU, and put in place of the launch on a device: see emulated_device.h."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from vashista.kernels.cuda import cluster, launcher

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
_folder = tempfile.TemporaryDirectory()


@functools.cache
def load(names: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """The kernel with these constants; one compilation each."""
    library = Path(_folder.name) / ("cluster" + "".join(f"_{value}" for _, value in names) + ".so")
    assert COMPILER is not None
    subprocess.run(
        [
            COMPILER, "-O1", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-shared", "-fPIC",
            *(f"-D{name}={value}" for name, value in names), f"-I{launcher.FOLDER}", "-x", "c",
            str(HERE / "emulated_device.h"), "-o", str(library), "-lm",
        ],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))


def emulate(monkeypatch: pytest.MonkeyPatch, num_blocks: int = 4, *, schedule: int = 0) -> list[Mapping[str, int]]:
    """Have sparse pairs attended to by emulated clusters of `num_blocks`; the constants of each launch are listed.

    schedule: in what order threads take their turns, from the first on (0), from the last on (-1) or in one of many
    random ones, in which what blocks send each other also comes late.
    """
    launches: list[Mapping[str, int]] = []

    def note(names: Mapping[str, int], job: ctypes.Structure, num_clusters: int, device: torch.device) -> None:
        assert device.type == "cpu"
        launches.append(names)
        library = load(tuple(names.items()))
        result = library.run_clusters(ctypes.byref(job), num_clusters, schedule)
        assert result == 0, {1: "threads wait for ever", 2: "a block was sent something when it had ended"}[result]

    monkeypatch.setattr(launcher, "has_clusters", lambda device: True)
    monkeypatch.setattr(launcher, "can_launch", lambda names, device: True)
    monkeypatch.setattr(launcher, "launch", note)
    monkeypatch.setattr(cluster, "MAX_CLUSTER", num_blocks)
    monkeypatch.setattr(cluster, "MIN_CLUSTER", num_blocks)
    monkeypatch.setattr(cluster, "count_blocks", lambda num_pairs, device: num_blocks)
    return launches


def assert_same_summaries(parts: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    """Codes of means, codes of variances, steps: the same but for a rounding, which the order of a sum may turn."""
    for part, other in zip(parts[:2], others[:2], strict=True):
        assert (part != other).float().mean() < 1e-3
    torch.testing.assert_close(parts[2], others[2], rtol=1e-5, atol=1e-30, equal_nan=True)
