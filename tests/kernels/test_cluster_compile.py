"""The CUDA kernels of `kernels/cuda` are compiled by NVRTC for the GPU that they are for, where NVRTC can be had.

No GPU is needed. NVRTC and its bindings come with PyTorch's build for CUDA; beside a build for CPUs they can be had as
the packages cuda-bindings and nvidia-cuda-nvrtc.
"""

from __future__ import annotations

import importlib
import struct

import pytest

from vashista.kernels.cuda import launcher
from vashista.kernels.cuda.cluster import ClusterShape
from vashista.kernels.requirements import KernelUnavailableError

MAX_SHARED_BYTES = 227 << 10
"""That a block may ask for (CUDA C++ Programming Guide, compute capability 9.0)."""
CUDA_MACHINE = 190
"""EM_CUDA of the ELF header."""
USUAL = {
    "group": 4, "head_dim": 128, "page_size": 64, "cluster": 16, "keys_per_thread": 1, "per_coarse": 0,
    "is_scored": True, "max_share": 256, "max_opened": 8, "has_softcap": False, "is_half": False,
}  # fmt: skip
SHAPES = {
    "one level": {},
    "two levels": {"per_coarse": 4},
    "two levels, too many units to score": {"per_coarse": 4, "keys_per_thread": 2, "is_scored": False},
    "no groups of heads, small pages": {"group": 1, "head_dim": 64, "page_size": 16, "cluster": 8, "max_share": 32},
    "small heads, two levels, float16": {"group": 8, "head_dim": 64, "per_coarse": 4, "cluster": 8, "is_half": True},
    "odd group and head, few groups kept": {
        "group": 3, "head_dim": 80, "page_size": 32, "is_scored": False, "max_share": 1,
    },
    "all that is possible": {
        "group": 4, "head_dim": 256, "per_coarse": 4, "cluster": 8, "keys_per_thread": 8, "is_scored": False,
        "max_share": 1024, "max_opened": 16,
    },
    "softcap": {"group": 3, "head_dim": 256, "has_softcap": True, "is_scored": False},
    "two levels of one wide head, float16": {
        "group": 1, "head_dim": 256, "per_coarse": 4, "max_opened": 16, "is_half": True,
    },
}  # fmt: skip


def why_not() -> str | None:
    """What is missing to compile here; no driver is needed."""
    try:
        importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        return f"NVRTC cannot be had: {str(error).splitlines()[0]}"
    return None


MISSING = why_not()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def sections(code: bytes) -> dict[str, bytes]:
    """Contents by name; of a 64-bit ELF file (System V ABI, chapter 4)."""
    (start,) = struct.unpack_from("<Q", code, 40)
    size, count, names_at = struct.unpack_from("<HHH", code, 58)
    heads = [struct.unpack_from("<IIQQQQ", code, start + size * index) for index in range(count)]
    names = code[heads[names_at][4] :]
    return {names[head[0] :].partition(b"\0")[0].decode(): code[head[4] : head[4] + head[5]] for head in heads}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_of_the_product_compiles_into_what_a_block_may_have(name: str) -> None:
    shape = ClusterShape(**{**USUAL, **SHAPES[name]})  # type: ignore[arg-type]
    code = launcher.compile_source(shape.names(), launcher.CAPABILITY)
    assert code[:4] == b"\x7fELF"
    assert struct.unpack_from("<H", code, 18) == (CUDA_MACHINE,)
    found = sections(code)
    assert f".text.{launcher.NAME.decode()}" in found
    (num_shared,) = struct.unpack("<I", found[".nv.global.init"])  # the one variable: num_shared_bytes
    assert 0 < num_shared <= MAX_SHARED_BYTES - len(found[f".nv.shared.{launcher.NAME.decode()}"])


def test_what_does_not_compile_is_refused_with_the_compilers_words() -> None:
    names = ClusterShape(**USUAL).names()  # type: ignore[arg-type]
    del names["HEAD_DIM"]
    with pytest.raises(KernelUnavailableError, match=r"(?s)NVRTC_ERROR_COMPILATION.*HEAD_DIM"):
        launcher.compile_source(names, launcher.CAPABILITY)
