"""Root-mean-square norm and the gate of an MLP on the CPU, each in one pass over memory: the doors of norm.h.

`vashista.engine.models` calls them for any number of rows. Float32 inside; bfloat16 is rounded once, at the end.
"""

from __future__ import annotations

import torch

from vashista.kernels.cpu.library import DTYPES, Library
from vashista.kernels.cpu.program import Program


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float64."""
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def rms_norm(library: Library, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [rows, cols] or [outer, inner, cols] with any strides but 1 for the last; weight: [cols], of x's dtype.

    Returns a new contiguous tensor of x's shape. Raises ValueError for other operands.
    """
    _check(x, weight)
    if x.stride(-1) != 1:
        x = x.contiguous()
    y, weight = torch.empty(x.shape, dtype=x.dtype), weight.contiguous()
    library.rms_norm(None, *_arguments(x, weight, eps, y), library.instruction_set, library.num_threads)
    return y


def record_rms_norm(program: Program, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Add `rms_norm` of the first rows of x to a program. out: of x's shape and dtype; may be x.

    x: [max_rows, cols] or [max_rows, inner, cols]; last strides are 1. Raises ValueError for other operands.
    """
    _check(x, weight)
    fits = x.shape == out.shape and x.dtype is out.dtype and x.shape[0] == program.max_rows
    if not fits or x.stride(-1) != 1 or out.stride(-1) != 1 or not weight.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, out {out.dtype} {list(out.shape)}, for {program.max_rows} rows; "
            "they must be alike, with elements of a row, and of the weight, behind each other."
        )
    library = program.library
    result = library.rms_norm(
        program.address, *_arguments(x, weight, eps, out), library.instruction_set, program.num_threads
    )
    program.recorded(result, x, weight, out)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dtype not in DTYPES or weight.dtype is not x.dtype or weight.shape != x.shape[-1:] or x.ndim not in {2, 3}:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} and weight {weight.dtype} {list(weight.shape)}; "
            "x must have 2 or 3 dimensions, both float32 or both bfloat16."
        )


def _arguments(x: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor) -> tuple[int | float, ...]:
    inner = x.shape[1] if x.ndim == 3 else 1
    x_inner, y_inner = (x.stride(1), y.stride(1)) if x.ndim == 3 else (0, 0)
    return (
        *(x.data_ptr(), x.stride(0), x_inner, y.data_ptr(), y.stride(0), y_inner, weight.data_ptr(), eps),
        *(x.shape[0], inner, x.shape[-1], DTYPES[x.dtype]),
    )


def silu_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """silu(first half of the columns) * second half, in float64."""
    gate, up = x.double().chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def silu_mul(library: Library, x: torch.Tensor) -> torch.Tensor:
    """x: [rows, 2 * cols], gate and up behind each other -> [rows, cols]. Raises ValueError for other operands."""
    if x.dtype not in DTYPES or x.ndim != 2 or x.shape[1] % 2:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; it must be [rows, 2 * cols], float32 or bfloat16.")
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)
    library.silu_mul(
        x.data_ptr(), x.stride(0), y.data_ptr(), x.shape[0], y.shape[1], DTYPES[x.dtype],
        library.instruction_set, library.num_threads,
    )  # fmt: skip
    return y
