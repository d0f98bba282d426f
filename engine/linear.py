"""Matrix products with weights, by whatever is fastest for the device and the number of rows.

On the CPU up to `MAX_ROWS` rows go through the compiled kernel, which reads the row-major weight once and takes the
norm before and the gate behind the product along; more rows go to oneDNN, which takes the row-major weight too, so
there is no second copy. Without compiled kernels the weight is packed once for oneDNN, through the operators that
torch's own compiler uses (two cores, AMD EPYC with AVX-512, torch 2.13, float32, weights cold in cache: one row 1.3 to
2.1 times faster than `F.linear`, 16 rows 2.4 to 3.2 times). Where the operators are missing or do not know the dtype,
`F.linear` runs. On a GPU it always does.

A float32 model whose checkpoint is bfloat16 keeps the weights of its products as they are stored, where the compiled
kernels run: the same numbers in half the memory, and a token takes little more than half the time to read them. With
AVX-512 the compiled kernel then takes any number of rows: it is as fast as oneDNN, and what it widens stays in a core's
own cache. Else, for more than `MAX_ROWS` rows, a weight is made float32 first, in one room that all products of the
model share, which is in the way of whoever shares the last cache: beside neighbours on the host it took 15 ms of a
prompt's 50, else 2.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F

from vashista.engine.norm import rms_norm, silu_mul
from vashista.kernels.cpu import library as cpu_library
from vashista.kernels.cpu.large_pages import large_empty
from vashista.kernels.cpu.linear import MAX_ROWS, linear, record_linear
from vashista.kernels.cpu.program import Program

_ALIGNMENT = 64
"""Of a weight in its room, bytes: a line of the caches."""
_PACK_ROWS = 64
"""Rows the packed layout is chosen for; measured to serve 1 to 512 rows within 15 % of the best layout for each."""


class WideRoom:
    """Room for one weight at a time as float32."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def widen(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as float32, until the next call."""
        if self._room.numel() < weight.numel():
            self._room = torch.empty(weight.numel())
        return self._room[: weight.numel()].view(weight.shape).copy_(weight)


class WeightRoom:
    """Room for the weights of a model's products, one behind the other in large pages. What is not used takes none."""

    def __init__(self, num_parameters: int, dtype: torch.dtype) -> None:
        """Of a model in this dtype, some of whose weights may take fewer bytes."""
        self._room = large_empty((num_parameters * dtype.itemsize,), torch.uint8)
        self._end = 0

    def stack(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Copies of tensors [..., in_features], behind each other; at the end of the room in memory of its own."""
        num_rows, dtype = sum(tensor.shape[0] for tensor in tensors), tensors[0].dtype
        shape = (num_rows, *tensors[0].shape[1:])
        num_bytes = math.prod(shape) * dtype.itemsize
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        if start + num_bytes > self._room.numel():
            return torch.cat(tensors)
        self._end = start + num_bytes
        return torch.cat(tensors, out=self._room[start : self._end].view(dtype).view(shape))


def keeps_row_major(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the weights of a model in this dtype stay as they are given to `Linear`, for the compiled kernels."""
    return device.type == "cpu" and dtype in cpu_library.DTYPES and cpu_library.load() is not None


def keeps_narrow(dtype: torch.dtype, stored: torch.dtype, device: torch.device) -> bool:
    """Whether products of a model in `dtype` take weights that are stored so as they are, with a `WideRoom`."""
    is_narrow = dtype is torch.float32 and stored is torch.bfloat16 and device.type == "cpu"
    return is_narrow and _has_float32_onednn() and cpu_library.load() is not None


class Linear:
    """y = x W^T + b. Takes the weight over; it is not to be changed elsewhere."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, wide_room: WideRoom | None = None
    ) -> None:
        """weight: [out_features, in_features]; bias: [out_features].

        wide_room: given with a bfloat16 weight whose products are float32 (see `keeps_narrow`), bias too.
        """
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        self._wide_room = wide_room
        self._library = None
        self._max_rows = MAX_ROWS
        if keeps_row_major(weight.dtype, weight.device):
            self._library = cpu_library.load()
            if wide_room is not None and self._library is not None and self._library.has_wide_vectors:
                self._max_rows = sys.maxsize
        self._weight: torch.Tensor | None = weight if self._library is None else weight.contiguous()
        # What oneDNN multiplies with: the row-major weight where few rows do not need it, else a packed copy alone.
        self._for_onednn: Any = None
        if wide_room is None and _knows_onednn(weight):
            self._for_onednn = self._weight
            if self._library is None:
                self._for_onednn = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
                self._weight = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, in_features] -> [rows, out_features]."""
        if self._library is not None and x.shape[0] <= self._max_rows:
            return linear(self._library, x, self._row_major, self._bias)
        weight = self._of_many_rows()
        if weight is None:
            return F.linear(x, self._row_major, self._bias)
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, self._bias, "none", [], "")
        return result

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + self(x), in one pass where the device can."""
        if self._library is not None and x.shape[0] <= self._max_rows:
            return linear(self._library, x, self._row_major, self._bias, residual)
        weight = self._of_many_rows()
        if weight is None:
            return residual + F.linear(x, self._row_major, self._bias)
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, self._bias, "add")
        return result

    def of_normed(self, x: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
        """self(rms_norm(x, norm, eps))."""
        if self._library is not None and x.shape[0] <= self._max_rows:
            return linear(self._library, x, self._row_major, self._bias, norm=norm, eps=eps)
        return self(rms_norm(x, norm, eps))

    def gate_of_normed(self, x: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
        """silu(gate) * up of the two halves of self(rms_norm(x, norm, eps)): [rows, out_features / 2]."""
        if self._library is not None and x.shape[0] <= self._max_rows:
            return linear(self._library, x, self._row_major, self._bias, norm=norm, eps=eps, gated=True)
        return silu_mul(self(rms_norm(x, norm, eps)))

    @property
    def can_record(self) -> bool:
        """Whether a program can hold the product."""
        return self._library is not None

    def record(
        self,
        program: Program,
        x: torch.Tensor,
        out: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        gated: bool = False,
    ) -> None:
        """Add the product of x to a program, with the residual, norm or gate of the methods above."""
        record_linear(program, x, self._row_major, self._bias, residual, out=out, norm=norm, eps=eps, gated=gated)

    def _of_many_rows(self) -> Any:
        """What oneDNN multiplies with; None where it does not."""
        if self._wide_room is None:
            return self._for_onednn
        return self._wide_room.widen(self._row_major)

    @property
    def _row_major(self) -> torch.Tensor:
        assert self._weight is not None, "the weight was packed"
        return self._weight


def _knows_onednn(weight: torch.Tensor) -> bool:
    """Whether oneDNN's operators are there and know the weight's device and dtype."""
    if weight.device.type != "cpu" or not _has_float32_onednn():
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


def _has_float32_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())
