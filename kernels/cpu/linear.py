"""y = x W^T for few rows of x, on the CPU, from the row-major weight: the doors of linear.h.

`vashista.engine.linear` calls them for up to MAX_ROWS rows. Float32 and bfloat16, sums in float32; the norm before and
the gate behind a product are part of it. A row's result has the same bits whatever rows are computed with it.

Measured on two cores (AMD EPYC 9xx4, AVX-512, float32, weights cold in cache, best of 48 calls beside another busy
process): 1 row of [2816, 512] 0.25 ms (22.8 GB/s) and of [512, 1408] 0.11 ms (25.7 GB/s); 16 rows 0.42 and 0.20 ms.
oneDNN on the packed weight: 0.25, 0.15, 0.33, 0.17 ms; on the row-major weight, 16 rows: 0.55, 0.23 ms.
"""

from __future__ import annotations

import torch

from vashista.kernels.cpu.library import DTYPES, Library

MAX_ROWS = 64
"""Above this oneDNN is faster on the row-major weight, and its results need no longer equal those of a decode step."""


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
    """x W^T + bias + residual, all of one dtype, float32 or bfloat16, on the CPU.

    x: [rows, in_features], any stride between rows; weight: [out_features, in_features], contiguous; bias:
    [out_features]; residual: [rows, out_features]. norm: [in_features], weight of a norm of x with eps.
    gated: the weight holds gate and up behind each other; returns silu(gate) * up, [rows, out_features / 2].
    Raises ValueError for operands that do not fit together.
    """
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    bf16 = DTYPES.get(weight.dtype)
    if bf16 is None or x.dtype is not weight.dtype or weight.shape[1] != in_features or not weight.is_contiguous():
        raise ValueError(f"x {_text(x)} and weight {_text(weight)} must be float32 or bfloat16, alike and contiguous.")
    columns = out_features // 2 if gated else out_features
    _check(bias, (out_features,), weight)
    _check(norm, (in_features,), weight)
    _check(residual, (num_rows, columns), weight)
    if gated and (out_features % 2 or residual is not None):
        raise ValueError(f"A gated product has an even number of features, not {out_features}, and no residual.")
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(num_rows, columns, dtype=x.dtype)
    num_threads = library.num_threads
    scratch = torch.empty(num_threads * num_rows * _padded(in_features)) if bf16 or norm is not None else None
    library.linear(
        x.data_ptr(), x.stride(0), _pointer(norm), eps, weight.data_ptr(), _pointer(bias), _pointer(residual),
        residual.stride(0) if residual is not None else 0, y.data_ptr(), _pointer(scratch), num_rows, out_features,
        in_features, bf16, gated, library.instruction_set, num_threads,
    )  # fmt: skip
    return y


def _padded(in_features: int) -> int:
    """Floats of scratch that a row takes; as `padded` in tasks.h."""
    return (in_features + 31) // 32 * 32


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(operand: torch.Tensor | None, shape: tuple[int, ...], weight: torch.Tensor) -> None:
    if operand is None:
        return
    if operand.shape != shape or operand.dtype is not weight.dtype or operand.stride(-1) != 1:
        raise ValueError(f"An operand is {_text(operand)}; with weight {_text(weight)} it must be {list(shape)}.")


def _text(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
