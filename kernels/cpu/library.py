"""Finds, checks and loads the compiled library, and gives its functions their types.

`load()` is called by the doors' users in the engine, once a process: the result is kept. The library has no headers of
torch or Python and no threads of its own: it runs on those of the OpenMP library that torch has loaded, whose entry
points are handed in, so that two pools never compete for the cores. Without such a library it uses one thread.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

VERSION = 8
"""Of the functions that native.c exports; another one is refused."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernels compute with, and the number C has for it."""

_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "vashista_version": (c_int, ()),
    "vashista_best_set": (c_int, ()),
    "vashista_set_name": (ctypes.c_char_p, (c_int,)),
    "vashista_use_threads": (None, (c_void_p,) * 3),
    "vashista_program_bytes": (c_int64, (c_int64,)),
    "vashista_program_begin": (None, (c_void_p, c_int64)),
    "vashista_program_run": (c_int, (c_void_p, c_int64, c_int64)),
    "vashista_linear": (
        c_int,
        (
            *(c_void_p, c_void_p, c_int64, c_void_p, c_float, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
            *(c_void_p, c_int64, c_int64, c_int64, c_int, c_int, c_int, c_int64, c_int64, c_int, c_int64),
        ),
    ),
    "vashista_rms_norm": (
        c_int,
        (
            *(c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_float),
            *(c_int64, c_int64, c_int64, c_int, c_int, c_int64),
        ),
    ),
    "vashista_silu_mul": (c_int, (c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int, c_int, c_int64)),
    "vashista_attend": (c_int, (*(c_void_p,) * 5, c_int64, c_int64, c_int, c_int64)),
    "vashista_summarize": (c_int, (*(c_void_p,) * 5, *(c_int64,) * 5, c_int, c_int, c_int64)),
    "vashista_sparse": (c_int, (*(c_void_p,) * 7, *(c_int64,) * 3, c_int, c_int64)),
    "vashista_sum_support": (c_int, (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int, c_void_p, c_void_p)),
}


class Library:
    """The loaded functions, the instruction set they run with, and whose threads they use."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file does not load, RuntimeError if it is of another version."""
        functions = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(functions, name, None)
            if function is None:
                raise RuntimeError(f"{path.name} lacks {name}: install the package again")
            function.restype, function.argtypes = result, arguments
        if functions.vashista_version() != VERSION:
            raise RuntimeError(
                f"{path.name} has version {functions.vashista_version()}, not {VERSION}: install the package again"
            )
        self.program_bytes = functions.vashista_program_bytes
        self.program_begin = functions.vashista_program_begin
        self.program_run = functions.vashista_program_run
        self.linear = functions.vashista_linear
        self.rms_norm = functions.vashista_rms_norm
        self.silu_mul = functions.vashista_silu_mul
        self.attend = functions.vashista_attend
        self.summarize = functions.vashista_summarize
        self.sparse = functions.vashista_sparse
        self.sum_support = functions.vashista_sum_support
        self.set_names = [
            functions.vashista_set_name(index).decode() for index in range(functions.vashista_best_set() + 1)
        ]
        self.instruction_set = len(self.set_names) - 1
        """Index in set_names of the set that is used: the best one that this processor has."""
        self.has_threads = _use_threads(functions)

    @property
    def has_wide_vectors(self) -> bool:
        """Whether a vector holds 16 floats."""
        name: str = self.set_names[self.instruction_set]
        return name == "AVX-512"

    @property
    def num_threads(self) -> int:
        """Threads a call runs on: torch's number, or one where torch brought no OpenMP library."""
        return torch.get_num_threads() if self.has_threads else 1


@functools.cache
def _load() -> tuple[Library | None, str]:
    path = _find()
    if path is None:
        return None, "no compiled kernels"
    try:
        library = Library(path)
    except (OSError, RuntimeError) as error:
        return None, f"no compiled kernels ({error})"
    name = library.set_names[library.instruction_set]
    return library, f"{name} kernels" if library.has_threads else f"{name} kernels on one thread"


def load() -> Library | None:
    """The library, or None where there is none; `status()` says why."""
    return _load()[0]


def status() -> str:
    """What the kernels are, such as "AVX-512 kernels", or why there are none."""
    return _load()[1]


def _find() -> Path | None:
    """The compiled file beside this one, under the name that this interpreter gives to extensions."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"native{suffix}")
        if path.is_file():
            return path
    return None


def _use_threads(functions: ctypes.CDLL) -> bool:
    """Hand in the thread pool that torch runs on. False if there is none or it lacks GNU's entry points."""
    path = openmp_of_torch()
    if path is None:
        return False
    openmp = ctypes.CDLL(path)  # already loaded: this only finds it
    try:
        entries = [openmp.GOMP_parallel, openmp.omp_get_thread_num, openmp.omp_get_num_threads]
    except AttributeError:
        return False
    functions.vashista_use_threads(*[ctypes.cast(entry, c_void_p) for entry in entries])
    return True


def openmp_of_torch() -> str | None:
    """The file of the OpenMP library in this process; torch's own where several are loaded."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return None
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    found = sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp5")))
    own = [path for path in found if "/torch" in path]
    return next(iter(own or found), None)
