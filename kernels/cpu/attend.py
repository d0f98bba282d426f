"""Decode attention over the engine's CPU store, with rotation and cache write: the doors of attend.h.

`vashista.engine.attention.dense_cpu` makes one `DecodePlan` a step for the requests that have a single query and calls
`decode` once a layer, or lets a program call it. Float32 or bfloat16, the same for queries and store; sums in float32.
A request's result has the same bits in every batch, on any pages, on any number of threads.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

from vashista.kernels.cpu.library import DTYPES, Library
from vashista.kernels.cpu.program import Program
from vashista.kernels.cpu.step_memory import StepMemory

MAX_HEAD_DIM = 256
CUT_TOKENS = 512
"""SPLIT of tasks.h: tokens that one thread attends to at a time."""

StepRequest = tuple[int, int, list[int]]
"""Row in the step, context length with the new token (at least 1), pages in order, enough for it."""


def supports(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such heads."""
    return dtype in DTYPES and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What all layers and steps of a model share."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    scale: float
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Raises ValueError for what the kernel does not take."""
        if self.num_heads % self.num_kv_heads or not supports(self.head_dim, self.dtype):
            raise ValueError(
                f"{self.num_heads} heads on {self.num_kv_heads} KV heads of {self.head_dim} {self.dtype}: possible are "
                "sizes to 256 that 8 divides, float32 and bfloat16."
            )


class StepRecord(ctypes.Structure):
    """struct attend_step of tasks.h: what a step's layers share. The library reads it while a layer runs."""

    _fields_ = (
        *((name, c_void_p) for name in ("cos", "sin", "requests", "pages", "items", "open", "partial")),
        *((name, c_int64) for name in ("num_requests", "heads", "kv_heads", "head_dim", "rotary", "page_size", "bf16")),
        ("scale", c_double),
    )
    memory: StepMemory
    """What the record points to; so are the tensors of `held`."""
    held: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The decoding requests of one step. Made by `plan`."""

    shape: DecodeShape
    num_rows: int
    record: StepRecord


def make_record(shape: DecodeShape) -> StepRecord:
    """A record of no requests, for `plan` to fill in step after step and for `record_decode`."""
    record = StepRecord(
        heads=shape.num_heads, kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, page_size=shape.page_size,
        bf16=DTYPES[shape.dtype], scale=shape.scale,
    )  # fmt: skip
    record.memory = StepMemory()
    return record


def plan(
    shape: DecodeShape,
    requests: list[StepRequest],
    cos: torch.Tensor,
    sin: torch.Tensor,
    record: StepRecord | None = None,
) -> DecodePlan:
    """Prepare a step.

    cos, sin: [num_tokens, rotary_dim / 2], float32, of all rows of the step. record: one that `make_record` made for
    the shape, to be filled in; else a new one. A plan holds until the next one with its record. Raises ValueError for
    what does not fit.
    """
    check_rotation(cos, sin, shape.head_dim)
    table, pages = tabulate_requests(requests, shape.page_size, cos.shape[0])
    num_items = shape.num_kv_heads * sum(-(-context // CUT_TOKENS) for _, context, _ in requests)
    group = shape.num_heads // shape.num_kv_heads
    record = record or make_record(shape)
    memory = record.memory
    record.requests, record.pages = memory.table("requests", table), memory.table("pages", pages)
    record.items = memory.room("items", len(requests) + 1, torch.int64).data_ptr()
    record.open = memory.room("open", len(requests) * shape.num_kv_heads, torch.int32).data_ptr()
    record.partial = memory.room("partial", num_items * group * (shape.head_dim + 2), torch.float32).data_ptr()
    record.num_requests, record.rotary = len(requests), 2 * cos.shape[1]
    record.held = rotate_by(record, cos, sin)
    return DecodePlan(shape, cos.shape[0], record)


def rotate_by(record: Any, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Point a step record to cosines and sines, and return what must live as long."""
    cos, sin = cos.contiguous(), sin.contiguous()
    record.cos, record.sin = cos.data_ptr(), sin.data_ptr()
    return cos, sin


def check_rotation(cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> None:
    """Raises ValueError unless they are cosines and sines for such heads."""
    if cos.shape != sin.shape or 2 * cos.shape[1] > head_dim or not cos.dtype is sin.dtype is torch.float32:
        raise ValueError(f"cos and sin are {cos.dtype} {list(cos.shape)} and {sin.dtype} {list(sin.shape)}.")


def tabulate_requests(requests: list[StepRequest], page_size: int, num_rows: int) -> tuple[list[int], list[int]]:
    """Three numbers for each request: row, context, where its pages begin; and the pages of all.

    Raises ValueError if a request has no context, too few pages or a row that the step has not.
    """
    table: list[int] = []
    pages: list[int] = []
    for row, context, own_pages in requests:
        if not 1 <= context <= len(own_pages) * page_size:
            raise ValueError(f"A context of {context} tokens does not fit {len(own_pages)} pages of {page_size}.")
        if not 0 <= row < num_rows:
            raise ValueError(f"Row {row} is not one of the step's {num_rows}.")
        table += (row, context, len(pages))
        pages += own_pages
    return table, pages


def decode(
    library: Library,
    plan: DecodePlan,
    qkv: torch.Tensor,
    store: torch.Tensor,
    out: torch.Tensor,
    *,
    window: int | None,
) -> None:
    """Write out[row] for each request of the plan; other rows are left alone.

    qkv: [num_tokens, heads + 2 * kv_heads, head_dim], contiguous, not rotated, left as it is. store: [2, kv_heads,
    num_slots, head_dim], contiguous, gets the new keys and values. out: [num_tokens, heads, head_dim], contiguous.
    window: None, or keys seen with the new one.
    Raises ValueError for shapes or dtypes the kernel does not take.
    """
    check_operands(plan.shape, plan.num_rows, qkv, store, out)
    library.attend(
        None, ctypes.addressof(plan.record), qkv.data_ptr(), store.data_ptr(), out.data_ptr(), store.shape[2],
        window or 0, library.instruction_set, library.num_threads,
    )  # fmt: skip


def record_decode(
    program: Program,
    shape: DecodeShape,
    record: StepRecord,
    qkv: torch.Tensor,
    store: torch.Tensor,
    out: torch.Tensor,
    *,
    window: int | None,
) -> None:
    """Add `decode` to a program: of the requests that a `plan` with this record holds when the program runs.

    qkv, out: for the program's max_rows rows; else as in `decode`. Raises ValueError likewise.
    """
    check_operands(shape, program.max_rows, qkv, store, out)
    result = program.library.attend(
        program.address, ctypes.addressof(record), qkv.data_ptr(), store.data_ptr(), out.data_ptr(), store.shape[2],
        window or 0, program.library.instruction_set, program.num_threads,
    )  # fmt: skip
    program.recorded(result, record, qkv, store, out)


def check_operands(
    shape: DecodeShape, num_rows: int, qkv: torch.Tensor, store: torch.Tensor, out: torch.Tensor
) -> None:
    """Raises ValueError unless these are operands of `decode` for so many rows."""
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    fits = (
        qkv.dtype is store.dtype is out.dtype is shape.dtype
        and qkv.shape == (num_rows, heads + 2 * kv_heads, head_dim)
        and out.shape == (num_rows, heads, head_dim)
        and store.shape == (2, kv_heads, store.shape[2], head_dim)
        and all(tensor.is_contiguous() for tensor in (qkv, store, out))
    )
    if not fits:
        shapes = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (qkv, store, out))
        raise ValueError(
            f"qkv, store, out are {shapes}: they do not fit together, or {num_rows} rows and {shape}, or have gaps."
        )
