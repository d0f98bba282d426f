"""Tiles of paged keys and values against some rows of queries: the step that decode and prefill share.

Owns the tile's shape (`TileShape`), the device limits it is chosen by, and
`attend_tiles`, the Triton function that loads tiles through the page table and folds them into a running softmax.
Called by `paged_decode.py` and `paged_prefill.py`.

The running softmax of a row is (acc, peak, total): with logits s_i in units of log 2,
peak = max s_i, total = sum 2^(s_i - peak), acc = sum 2^(s_i - peak) v_i  (Milakov and Gimelshein, arXiv 1805.02867).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vashista.kernels.requirements import require
from vashista.kernels.triton_guard import IS_INTERPRETED, jit, next_power_of_two, round_to, tl, triton

INTERPRETER_MULTIPROCESSORS = 4


@dataclass(frozen=True)
class TileShape:
    """How much one program handles at a time."""

    rows: int
    """Query rows (query heads times tokens), a power of two of at least 16."""
    keys: int
    """Keys a tile, a power of two of at least 16."""
    num_warps: int
    num_stages: int
    """Triton's pipeline depth: one tile at work, the others in flight."""


@dataclass(frozen=True)
class DeviceLimits:
    """What the launch code asks of a device."""

    num_multiprocessors: int
    shared_bytes: int
    """Shared memory one program may take."""


@lru_cache(maxsize=64)
def device_limits(device: torch.device) -> DeviceLimits:
    """Read once a device; the interpreter gets small numbers, so that tests see several programs."""
    if device.type != "cuda":
        return DeviceLimits(INTERPRETER_MULTIPROCESSORS, 99 << 10)
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return DeviceLimits(properties["multiprocessor_count"], properties["max_shared_mem"])


def fit_keys(most: int, rows: int, q: torch.Tensor, shared_bytes: int) -> int:
    """The most keys a tile, from 16 to `most`, whose keys, values and queries fit into shared memory.

    Raises KernelInputError when not even 16 keys fit beside the rows of queries.
    """
    row_bytes = next_power_of_two(q.shape[2]) * q.element_size()
    weight_bytes = 4 if q.dtype == torch.float32 else 0  # 16-bit weights stay in registers
    keys = most
    while rows * (row_bytes + keys * weight_bytes) + 2 * keys * row_bytes > shared_bytes:
        keys //= 2
        require(
            keys >= 16,
            f"{rows} query rows of {row_bytes} bytes do not fit into this device's {shared_bytes} bytes of shared"
            " memory; possible are a smaller query group, a smaller head_dim, or a 16-bit dtype",
        )
    return keys


def fit_stages(tile_bytes: int, fixed_bytes: int, shared_bytes: int, most: int) -> int:
    """The deepest pipeline, to `most`, whose tiles of keys and values fit into shared memory beside `fixed_bytes`."""
    return max(1, min(most, (shared_bytes - fixed_bytes) // tile_bytes))


@jit()
def load_pages(page_row, start, low, high, KEYS: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Pages of the tokens start .. start + KEYS, int32: one number where a page holds the tile, else [KEYS].

    `start` is a multiple of KEYS. Reads the table only where a token lies in [low, high), and gives 0 elsewhere.
    `attend_tiles` loads the pages of the next tile while it works on this one: the address of a tile must not wait
    for the table, or Triton keeps half as many tiles in flight (seen in its shared memory, Triton 3.7.1).
    """
    if PAGE_SIZE >= KEYS:
        return tl.load(page_row + start // PAGE_SIZE, mask=start < high, other=0)
    else:  # noqa: RET505 - Triton compiles one branch alone only when both are written
        position = start + tl.arange(0, KEYS)
        is_inside = (position >= low) & (position < high)
        return tl.load(page_row + position // PAGE_SIZE, mask=is_inside, other=0)


@jit()
def add_product(acc, left, right):
    """acc + left @ right in float32. The interpreter's tl.dot is wrong for bfloat16 operands, so it gets float32."""
    if IS_INTERPRETED:
        return acc + tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:  # noqa: RET505 - Triton compiles one branch alone only when both are written
        return tl.dot(left, right, acc, input_precision="ieee")


@jit()
def attend_tile(
    acc,
    peak,
    total,
    query,
    start,
    low,
    high,
    row_low,
    row_high,
    pages,
    k_head,
    v_head,
    k_page_stride,
    k_token_stride,
    v_page_stride,
    v_token_stride,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Fold keys start .. start + KEYS into (acc [ROWS, DIM], peak [ROWS], total [ROWS]), all float32; return the three.

    query: [ROWS, DIM]. Only positions in [low, high) are read, so that unwritten slots and freed pages may hold
    anything. With IS_PARTIAL, row r attends to positions row_low[r] .. row_high[r]; without, the caller knows that
    every row attends to the whole tile. With IS_SPLIT the weights enter the second product as two numbers of the
    values' dtype, which leaves the output's own rounding as the only one that matters. pages: of this tile, from
    `load_pages`; k_head, v_head: pointers to the KV head in page 0.
    """
    position = start + tl.arange(0, KEYS)
    dim = tl.arange(0, DIM)
    is_read = ((position >= low) & (position < high))[:, None] & (dim < HEAD_DIM)[None, :]
    page = pages.to(tl.int64)
    slot = (position % PAGE_SIZE).to(tl.int64)
    k_offset = page * k_page_stride + slot * k_token_stride
    key = tl.load(k_head + k_offset[:, None] + dim[None, :], mask=is_read, other=0.0)
    logits = add_product(tl.zeros([query.shape[0], KEYS], dtype=tl.float32), query, tl.trans(key))
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which stays right where exp overflows
        logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (logits * scale / softcap)) + 1.0))
        logits = logits * 1.4426950408889634  # 1 / ln 2: exp2 is the machine's own
    else:
        logits = logits * (scale * 1.4426950408889634)
    if IS_PARTIAL:
        is_seen = (position[None, :] >= row_low[:, None]) & (position[None, :] <= row_high[:, None])
        logits = tl.where(is_seen, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    # a row that has seen no key yet has peak -inf; 0 in its place keeps inf - inf away
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(logits - shift[:, None])
    fade = tl.exp2(peak - shift)
    total = total * fade + tl.sum(weight, 1)
    acc = acc * fade[:, None]
    v_offset = page * v_page_stride + slot * v_token_stride
    value = tl.load(v_head + v_offset[:, None] + dim[None, :], mask=is_read, other=0.0)
    coarse = round_to(weight, value.dtype)
    acc = add_product(acc, coarse, value)
    if IS_SPLIT:
        acc = add_product(acc, round_to(weight - coarse.to(tl.float32), value.dtype), value)
    return acc, new_peak, total


@jit()
def attend_tiles(
    acc,
    peak,
    total,
    query,
    begin,
    end,
    low,
    high,
    row_low,
    row_high,
    page_row,
    k_head,
    v_head,
    k_page_stride,
    k_token_stride,
    v_page_stride,
    v_token_stride,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """`attend_tile` for the tiles begin .. end of KEYS keys each; page_row: pointer to the request's page table."""
    pages = load_pages(page_row, begin * KEYS, low, high, KEYS, PAGE_SIZE)
    for tile in range(begin, end):
        next_pages = load_pages(page_row, (tile + 1) * KEYS, low, high, KEYS, PAGE_SIZE)
        acc, peak, total = attend_tile(
            acc, peak, total, query, tile * KEYS, low, high, row_low, row_high, pages, k_head, v_head,
            k_page_stride, k_token_stride, v_page_stride, v_token_stride, scale, softcap,
            HEAD_DIM, DIM, KEYS, PAGE_SIZE, HAS_SOFTCAP, IS_PARTIAL, IS_SPLIT,
        )  # fmt: skip
        pages = next_pages
    return acc, peak, total
