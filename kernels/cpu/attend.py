"""Decode attention over the engine's CPU store, with rotation and cache write: the doors of attend.h.

`vashista.engine.attention.dense_cpu` makes one `DecodePlan` a step for the requests that have a single query and calls
`decode` once a layer. Float32 or bfloat16, the same for queries and store; sums in float32. A request's result has the
same bits in every batch, on any pages, on any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vashista.kernels.cpu.library import DTYPES, Library

MAX_HEAD_DIM = 256


@dataclass(slots=True)
class DecodePlan:
    """The decoding requests of one step, and scratch that its layers share."""

    requests: torch.Tensor
    """[num_requests, 3], int64: row in the step, context with the new token, where its pages begin in `pages`."""
    pages: torch.Tensor
    """int64: the pages of all requests."""
    items: torch.Tensor
    open_items: torch.Tensor
    partial: dict[int, torch.Tensor] = field(default_factory=dict)
    """By window: scratch for partial results."""


def supports(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such heads."""
    return dtype in DTYPES and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def plan(requests: list[tuple[int, int, list[int]]], page_size: int, num_kv_heads: int) -> DecodePlan:
    """requests: row in the step, context length with the new token (at least 1), pages in order, enough for it.

    Raises ValueError if a request has no context or too few pages.
    """
    table: list[int] = []
    pages: list[int] = []
    for row, context, own_pages in requests:
        if not 1 <= context <= len(own_pages) * page_size:
            raise ValueError(f"A context of {context} tokens does not fit {len(own_pages)} pages of {page_size}.")
        table += (row, context, len(pages))
        pages += own_pages
    return DecodePlan(
        torch.tensor(table, dtype=torch.int64),
        torch.tensor(pages, dtype=torch.int64),
        torch.empty(len(requests) + 1, dtype=torch.int64),
        torch.empty(len(requests) * num_kv_heads, dtype=torch.int32),
    )


def decode(
    library: Library,
    plan: DecodePlan,
    qkv: torch.Tensor,
    store: torch.Tensor,
    out: torch.Tensor,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    page_size: int,
    window: int | None,
    scale: float,
) -> None:
    """Write out[row] for each request of the plan; other rows are left alone.

    qkv: [num_tokens, heads + 2 * kv_heads, head_dim], contiguous, not rotated, left as it is. store: [2, kv_heads,
    num_slots, head_dim], contiguous, gets the new keys and values. out: [num_tokens, heads, head_dim], contiguous.
    cos, sin: [num_tokens, rotary_dim / 2], float32. window: None, or keys seen with the new one.
    Raises ValueError for shapes or dtypes the kernel does not take.
    """
    _, kv_heads, num_slots, head_dim = store.shape
    heads = out.shape[1]
    _check(qkv, store, out, cos, sin)
    num_requests = plan.items.shape[0] - 1
    key = window or 0
    num_items = library.plan(plan.requests.data_ptr(), num_requests, kv_heads, key, plan.items.data_ptr())
    if key not in plan.partial:
        plan.partial[key] = torch.empty(num_items * (heads // kv_heads) * (head_dim + 2))
    library.attend(
        qkv.data_ptr(), store.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), plan.requests.data_ptr(),
        plan.pages.data_ptr(), plan.items.data_ptr(), plan.open_items.data_ptr(), plan.partial[key].data_ptr(),
        num_requests, heads, kv_heads, head_dim, 2 * cos.shape[1], page_size, num_slots, key, scale,
        DTYPES[store.dtype], library.instruction_set, library.num_threads,
    )  # fmt: skip


def _check(qkv: torch.Tensor, store: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    _, kv_heads, _, head_dim = store.shape
    num_tokens, heads = out.shape[:2]
    fits = (
        supports(head_dim, store.dtype)
        and qkv.dtype is store.dtype
        and out.dtype is store.dtype
        and qkv.shape == (num_tokens, heads + 2 * kv_heads, head_dim)
        and out.shape == (num_tokens, heads, head_dim)
        and heads % kv_heads == 0
        and cos.shape == sin.shape
        and 2 * cos.shape[1] <= head_dim
        and cos.dtype is sin.dtype is torch.float32
        and all(tensor.is_contiguous() for tensor in (qkv, store, out, cos, sin))
    )
    if not fits:
        shapes = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (qkv, store, out, cos, sin))
        raise ValueError(f"qkv, store, out, cos, sin are {shapes}: they do not fit together or are not contiguous.")
