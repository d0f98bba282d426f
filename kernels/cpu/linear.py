"""y = x W^T for few rows of x, on the CPU, from the row-major weight: the doors of linear.h.

`vashista.engine.linear` calls `linear` for up to MAX_ROWS rows, for any number where a bfloat16 weight meets float32
and vectors are wide (`Library.has_wide_vectors`), and records it where a step is a program. Float32 and bfloat16, sums
in float32, and float32 with a bfloat16 weight, which is taken as the float32 numbers that it holds. The norm before and
the gate behind a product are part of it. A row's result has the same bits whatever rows are computed with it.

Measured on two cores (AMD EPYC 9xx4, AVX-512, float32, weights cold in cache, best of 48 calls beside another busy
process): 1 row of [2816, 512] 0.25 ms (22.8 GB/s) and of [512, 1408] 0.11 ms (25.7 GB/s); 16 rows 0.42 and 0.20 ms.
oneDNN on the packed weight: 0.25, 0.15, 0.33, 0.17 ms; on the row-major weight, 16 rows: 0.55, 0.23 ms.

Many rows of float32 with a bfloat16 weight, norm and for the first shape gate included (the same machine, torch 2.13,
caches warm, best of 10): 100 rows of [2816, 512] 1.58 ms (183 GFLOP/s) and of [512, 1408] 0.78 ms; 512 rows 8.1 and
3.9 ms. oneDNN, with neither, on a weight that was made float32: 1.45, 0.70, 7.2 and 3.4 ms; making it so takes 0.05 to
1 ms more while the last cache holds it.
"""

from __future__ import annotations

import torch

from vashista.kernels.cpu.library import DTYPES, Library
from vashista.kernels.cpu.program import Program, padded

MAX_ROWS = 64
"""Above this oneDNN is faster on the row-major weight, and its results need no longer equal those of a decode step."""


MANY_ROWS = 16
"""From so many on a bfloat16 weight is widened once for all of them, not once for every six."""
TILE_BYTES, TILE_MULTIPLE = 512 << 10, 6


def linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> torch.Tensor:
    """The same in plain torch, in float64; arguments as in `linear`. Returns float64."""
    wide = x.double()
    if norm is not None:
        wide = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.double()
    y = wide @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if gated:
        gate, up = y.chunk(2, -1)
        y = torch.nn.functional.silu(gate) * up
    return y if residual is None else y + residual.double()


def linear(
    library: Library,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> torch.Tensor:
    """x W^T + bias + residual, all of one dtype, float32 or bfloat16, on the CPU; the weight may always be bfloat16.

    x: [rows, in_features], any stride between rows; weight: [out_features, in_features], contiguous; bias:
    [out_features]; residual: [rows, out_features]. norm: [in_features], weight of a norm of x with eps.
    gated: the weight holds gate and up behind each other; returns silu(gate) * up, [rows, out_features / 2].
    Raises ValueError for operands that do not fit together.
    """
    num_rows, in_features = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(num_rows, _check(x, weight, bias, residual, norm, gated=gated), dtype=x.dtype)
    num_threads = library.num_threads
    scratch = None
    is_narrow = bool(DTYPES[weight.dtype])
    tile, panel_rows = (_tile(in_features), _panel_rows(in_features)) if is_narrow and num_rows >= MANY_ROWS else (0, 0)
    if is_narrow or norm is not None:
        scratch = torch.empty(num_threads * ((tile or num_rows) + panel_rows) * padded(in_features))
    library.linear(
        None, x.data_ptr(), x.stride(0), _pointer(norm), eps, weight.data_ptr(), _pointer(bias), _pointer(residual),
        residual.stride(0) if residual is not None else 0, y.data_ptr(), _pointer(scratch), num_rows, weight.shape[0],
        in_features, DTYPES[x.dtype], DTYPES[weight.dtype], gated, tile, panel_rows, library.instruction_set,
        num_threads,
    )  # fmt: skip
    return y


def record_linear(
    program: Program,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> None:
    """Add `linear` of the first rows of x to a program, its result to go to the same rows of `out`.

    x, residual, out: [max_rows, ...] of the program, contiguous rows; out is contiguous and may be the residual, but
    not x. Raises ValueError for operands that do not fit together or the program.
    """
    columns = _check(x, weight, bias, residual, norm, gated=gated)
    _fits(out, (x.shape[0], columns), x)
    in_features = x.shape[1]
    if x.shape[0] != program.max_rows or x.stride(1) != 1 or in_features > program.max_features:
        raise ValueError(
            f"x is {_text(x)}; the program is for {program.max_rows} rows, {program.max_features} features."
        )
    if not out.is_contiguous():
        raise ValueError(f"out, {_text(out)}, must be contiguous.")
    library = program.library
    result = library.linear(
        program.address, x.data_ptr(), x.stride(0), _pointer(norm), eps, weight.data_ptr(), _pointer(bias),
        _pointer(residual), residual.stride(0) if residual is not None else 0, out.data_ptr(),
        program.scratch.data_ptr(), x.shape[0], weight.shape[0], in_features, DTYPES[x.dtype],
        DTYPES[weight.dtype], gated, 0, 0, library.instruction_set, program.num_threads,
    )  # fmt: skip
    program.recorded(result, x, weight, bias, residual, out, norm)


def _tile(in_features: int) -> int:
    """Rows of x that are prepared at a time, by a thread for itself, where it has many."""
    return max(TILE_MULTIPLE, TILE_BYTES // (4 * padded(in_features)) // TILE_MULTIPLE * TILE_MULTIPLE)


def _panel_rows(in_features: int) -> int:
    """Rows of a weight in a chunk, at most: 64 KB of bfloat16, or four rows of a gate and four of what it gates."""
    return max(8, 65536 // (2 * in_features))


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: torch.Tensor | None,
    *,
    gated: bool,
) -> int:
    """Columns of the result. Raises ValueError for operands that do not fit together."""
    out_features, in_features = weight.shape
    is_known = x.dtype in DTYPES and weight.dtype in {x.dtype, torch.bfloat16}
    if not is_known or x.shape[1] != in_features or not weight.is_contiguous():
        raise ValueError(
            f"x {_text(x)} and weight {_text(weight)} must be float32 or bfloat16, of as many features, the weight of "
            "x's dtype or bfloat16, and contiguous."
        )
    if gated and (out_features % 2 or residual is not None):
        raise ValueError(f"A gated product has an even number of features, not {out_features}, and no residual.")
    columns = out_features // 2 if gated else out_features
    _fits(bias, (out_features,), x)
    _fits(norm, (in_features,), x)
    _fits(residual, (x.shape[0], columns), x)
    return columns


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fits(operand: torch.Tensor | None, shape: tuple[int, ...], x: torch.Tensor) -> None:
    if operand is None:
        return
    if operand.shape != shape or operand.dtype is not x.dtype or operand.stride(-1) != 1:
        raise ValueError(f"An operand is {_text(operand)}; with x {_text(x)} it must be {list(shape)}, of x's dtype.")


def _text(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
