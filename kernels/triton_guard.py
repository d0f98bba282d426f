"""The one place that imports Triton: `triton`, `tl`, `jit`, and whether kernels can run on a tensor's device.

Kernel files take `tl` and `jit` from here, so that they import on a machine without Triton; there `jit` leaves a
function as it is and `require_triton`, which every launch passes first, raises. With TRITON_INTERPRET=1 in the
environment before the first import, Triton runs the kernels on the CPU: slow, for tests.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from vashista.kernels.requirements import MIN_CAPABILITY, KernelUnavailableError
from vashista.kernels.triton_machine import name_driver, name_platform

triton: Any = None
tl: Any = None
if importlib.util.find_spec("triton") is not None:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    name_platform(importlib.import_module("triton.runtime.build"))

INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)


IS_INTERPRETED: Any = INTERPRETED if tl is None else tl.constexpr(INTERPRETED)
"""The same, for use inside kernels."""


def jit(*stable: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`; for the parameters named `stable`, no value makes Triton compile the kernel anew."""

    def wrap(function: Callable[..., Any]) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=stable)

    return wrap


def require_triton(operation: str, tensor: torch.Tensor) -> None:
    """Raise KernelUnavailableError unless Triton is there and can run `operation` on the tensor's device."""
    if triton is None:
        raise KernelUnavailableError(
            f"{operation} needs the triton package, which is not installed; install vashista[cuda], or use the CPU path"
        )
    if INTERPRETED:
        return
    if tensor.device.type != "cuda":
        raise KernelUnavailableError(
            f"{operation} was called with tensors on {tensor.device}; it runs on CUDA devices, and elsewhere only in"
            f" Triton's interpreter (TRITON_INTERPRET=1); {operation}_reference computes the same in plain torch"
        )
    _name_driver()  # a tensor on the device: the driver is loaded
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < MIN_CAPABILITY:
        raise KernelUnavailableError(
            f"{operation} was called on a device of compute capability {capability[0]}.{capability[1]};"
            f" it needs {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer"
        )


@functools.cache
def _name_driver() -> None:
    name_driver(os.environ)


@jit()
def round_to(x, dtype: tl.constexpr):
    """x, float32, as `dtype`, rounded to the nearest, ties to even.

    A plain cast does that on a GPU; the interpreter's cast to bfloat16 cuts the low bits off and turns 0 into 1e-38, so
    there it is done by hand.
    """
    if IS_INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505 - Triton compiles one branch alone only when both are written
        return x.to(dtype)


def next_power_of_two(number: int) -> int:
    """The least power of two that is not below `number` (at least 1)."""
    return 1 << max(number - 1, 0).bit_length()
