"""Decode attention to a kept part of the context on the CPU, and the key summaries that choose it: doors of sparse.h.

The context of a request is cut into units of 16 tokens. A summary of each unit's keys gives a score to the unit, for
every query head; a KV head keeps the first and the newest units and the best of the others, up to its budget, and
attends to these alone. What was left out is reported: as an estimate, as a bound that is certain, and as the list of
what was kept, so that an audit can measure it.

`vashista.engine.attention` makes the `Summaries` of each layer once, a `SparsePlan` a step for the sparse requests that
have a single query, and calls `decode` once a layer; after a prompt chunk (and after a dense step whose cache a sparse
request may read later) it calls `summarize` with the slots that were written. Float32 or bfloat16, the same for queries
and store; sums in float32. A request's result has the same bits in every batch, on any pages, on any number of threads.
A KV head whose budget covers its visible context takes the dense kernel's own path and has the dense kernel's bits.

Rules, for the n keys of a unit, with m their mean, v their variance in each dimension, h and l their largest and least:
    MEAN           log n + scale q.m                                     (Vashista, arXiv 2602.13804)
    MEAN_VARIANCE  log n + scale q.m + scale^2 / 2 sum_d q_d^2 v_d       (the second cumulant)
    BOX            log n + scale sum_d max(q_d h_d, q_d l_d)             (Quest, arXiv 2406.10774)
    WINDOW         none: the first units and the newest ones
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum

import torch

from vashista.kernels.cpu.attend import (
    CUT_TOKENS,
    DecodeShape,
    StepRequest,
    check_operands,
    check_rotation,
    rotate_by,
    supports,
    tabulate_requests,
)
from vashista.kernels.cpu.large_pages import large_empty
from vashista.kernels.cpu.library import DTYPES, Library
from vashista.kernels.cpu.program import Program
from vashista.kernels.cpu.step_memory import StepMemory

UNIT_TOKENS = 16
"""Tokens of a unit: what is ranked, kept and attended to."""
MAX_GROUP = 16
"""Query heads that may share a KV head."""
DIAGNOSTICS = ("log_kept_mass", "entropy", "log_dropped_estimate", "max_dropped_score", "log_dropped_bound", "num_kept")
"""Columns of `SparsePlan.diagnostics`, of one query head:

log_kept_mass         log of the sum of exp(logit) over the kept tokens, exact to float32
entropy               of the attention inside the kept set, nats; exp of it is the effective support
log_dropped_estimate  log of the sum of exp(score) over the dropped units; -inf if none was, NaN for WINDOW
max_dropped_score     the largest score of a dropped unit, less log n: for one of its tokens; -inf or NaN likewise
log_dropped_bound     certainly at least log of the sum of exp(logit) over the dropped tokens, rounding of the kernel
                      included, also that of log_kept_mass, so that the dropped share which follows from the two is
                      certain; -inf if none was dropped, +inf where nothing is known (WINDOW, keys beyond 1e19)
num_kept              kept tokens
"""


class Rule(IntEnum):
    """What a summary holds and how units are ranked; see the module's text."""

    MEAN = 0
    MEAN_VARIANCE = 1
    BOX = 2
    WINDOW = 3


_PLANES = {Rule.MEAN: 1, Rule.MEAN_VARIANCE: 2, Rule.BOX: 2, Rule.WINDOW: 0}
_NUM_STEPS = 4


@dataclass(frozen=True, slots=True)
class Summaries:
    """Key summaries of one layer. Unit u holds the slots 16 u to 16 u + 15. Nothing is read before it was written."""

    rule: Rule
    codes: torch.Tensor
    """[kv_heads, num_units, planes * head_dim], int8: mean; mean, variance (uint8 in fact); or box top, box bottom."""
    steps: torch.Tensor
    """[kv_heads, num_units, 4], float32: step of each plane; radius (no key is further from the decoded mean; box: 0);
    norm of what was decoded, for the bound's rounding."""


@dataclass(frozen=True, slots=True)
class SparseShape(DecodeShape):
    """What all layers and steps of a model share."""

    rule: Rule
    num_sinks: int = 16
    """Tokens at the start that are always kept; whole units."""
    num_recent: int = 64
    """Tokens at the end that are always kept, at least 1; whole units."""

    def __post_init__(self) -> None:
        """Raises ValueError for what the kernel does not take."""
        DecodeShape.__post_init__(self)
        if self.num_heads // self.num_kv_heads > MAX_GROUP:
            raise ValueError(
                f"{self.num_heads} heads on {self.num_kv_heads} KV heads: possible are 1 to {MAX_GROUP} heads on each."
            )
        if self.page_size % UNIT_TOKENS or self.page_size < UNIT_TOKENS:
            raise ValueError(f"Pages of {self.page_size} tokens: possible are multiples of {UNIT_TOKENS}.")
        if self.num_sinks < 0 or self.num_recent < 1:
            raise ValueError(f"{self.num_sinks} first and {self.num_recent} newest tokens: at least 0 and 1 are kept.")


class StepRecord(ctypes.Structure):
    """struct sparse_step of tasks.h: what a step's layers share. The library reads it while a layer runs."""

    _fields_ = (
        *((name, c_void_p) for name in ("cos", "sin", "requests", "offsets", "pages", "items", "open", "scratch")),
        *((name, c_void_p) for name in ("partial", "budgets", "kept", "num_kept", "diagnostics")),
        *((name, c_int64) for name in ("num_requests", "heads", "kv_heads", "head_dim", "rotary", "page_size")),
        *((name, c_int64) for name in ("max_units", "num_sinks", "num_recent", "rule", "bf16")),
        ("scale", c_double),
    )
    memory: StepMemory
    """What the record points to; so are the tensors of `held`."""
    held: tuple[torch.Tensor, ...]


def make_record(shape: SparseShape) -> StepRecord:
    """A record of no requests, for `plan` to fill in step after step and for `record_decode`."""
    record = StepRecord(
        heads=shape.num_heads, kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, page_size=shape.page_size,
        num_sinks=shape.num_sinks, num_recent=shape.num_recent, rule=int(shape.rule), bf16=DTYPES[shape.dtype],
        scale=shape.scale,
    )  # fmt: skip
    record.memory = StepMemory()
    return record


@dataclass(frozen=True, slots=True)
class SparsePlan:
    """The sparse requests of one step, results, and scratch that its layers share. Made by `plan`."""

    shape: SparseShape
    num_rows: int
    diagnostics: torch.Tensor
    """[num_layers, num_requests, num_heads, 6], float32: see DIAGNOSTICS. A layer's are written by its `decode`."""
    kept: torch.Tensor
    """[num_requests, kv_heads, max_units], int32: the kept units of the layer decoded last, ascending; unit u holds
    the request's tokens 16 u to 16 u + 15. Only the first `num_kept` are written."""
    num_kept: torch.Tensor
    """[num_requests, kv_heads], int32: kept units of the layer decoded last."""
    scratch: torch.Tensor
    offsets: list[int]
    record: StepRecord


def summary_bytes(head_dim: int, rule: Rule = Rule.MEAN_VARIANCE) -> int:
    """Bytes of one unit's summary for one KV head of one layer."""
    return _PLANES[rule] * head_dim + 4 * _NUM_STEPS if rule is not Rule.WINDOW else 0


def make_summaries(rule: Rule, kv_heads: int, num_slots: int, head_dim: int) -> Summaries:
    """Unwritten summaries for a store of `num_slots` slots; what is not written takes no memory.

    Raises ValueError if the slots are not whole units.
    """
    if num_slots % UNIT_TOKENS:
        raise ValueError(f"{num_slots} slots are not units of {UNIT_TOKENS} tokens.")
    num_units = 0 if rule is Rule.WINDOW else num_slots // UNIT_TOKENS
    codes = large_empty((kv_heads, num_units, _PLANES[rule] * head_dim), torch.int8)
    return Summaries(rule, codes, large_empty((kv_heads, num_units, _NUM_STEPS), torch.float32))


def summarize(library: Library, store: torch.Tensor, summaries: Summaries, runs: list[tuple[int, int]]) -> None:
    """Make anew the summaries of all units that the slot ranges [start, end) touch.

    store: as in `decode`, the runs' keys written. A unit's summary covers its slots from its first one to the end of
    the run, or to the unit's own end: what lies before `start` in its unit must have been written earlier, and what
    lies behind `end` is not read. No two runs may touch the same unit. Rule WINDOW has nothing to do.
    Raises ValueError for such ranges, ranges outside the store and operands that do not fit.
    """
    _, kv_heads, num_slots, head_dim = store.shape
    if not _fits(summaries, store) or not supports(head_dim, store.dtype) or not store.is_contiguous():
        raise ValueError(
            f"The store is {store.dtype} {list(store.shape)}, the summaries {summaries.rule.name} "
            f"{list(summaries.codes.shape)}: they do not fit together."
        )
    free_from = 0
    for start, end in sorted(runs):
        if not free_from <= start < end <= num_slots:
            raise ValueError(f"Slots {start} to {end} are no range of their own units in a store of {num_slots}.")
        free_from = -(-end // UNIT_TOKENS) * UNIT_TOKENS
    if summaries.rule is Rule.WINDOW or not runs:
        return
    table = torch.tensor(runs, dtype=torch.int64)
    items = torch.empty(len(runs) + 1, dtype=torch.int64)
    result = library.summarize(
        store.data_ptr(), summaries.codes.data_ptr(), summaries.steps.data_ptr(), table.data_ptr(), items.data_ptr(),
        len(runs), kv_heads, head_dim, num_slots, summaries.rule, DTYPES[store.dtype], library.instruction_set,
        library.num_threads,
    )  # fmt: skip
    assert result == 0


def _fits(summaries: Summaries, store: torch.Tensor) -> bool:
    _, kv_heads, num_slots, head_dim = store.shape
    num_units = 0 if summaries.rule is Rule.WINDOW else num_slots // UNIT_TOKENS
    return (
        summaries.codes.shape == (kv_heads, num_units, _PLANES[summaries.rule] * head_dim)
        and summaries.steps.shape == (kv_heads, num_units, _NUM_STEPS)
        and num_slots % UNIT_TOKENS == 0
    )


def plan(
    shape: SparseShape,
    requests: list[StepRequest],
    budgets: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    record: StepRecord | None = None,
) -> SparsePlan:
    """Prepare a step.

    budgets: [num_layers, num_requests, kv_heads], int32, tokens, at least 1 each: the units kept are budget // 16, but
    never fewer than the first and newest ones that the shape asks for; a budget of at least the visible tokens keeps
    them all. cos, sin: [num_tokens, rotary_dim / 2], float32, of all rows of the step. record: one that `make_record`
    made for the shape, to be filled in; else a new one. A plan and its results hold until the next one with its
    record. Raises ValueError for what does not fit.
    """
    num_layers, group = budgets.shape[0], shape.num_heads // shape.num_kv_heads
    _check_budgets(budgets, (num_layers, len(requests), shape.num_kv_heads))
    check_rotation(cos, sin, shape.head_dim)
    table, pages = tabulate_requests(requests, shape.page_size, cos.shape[0])
    offsets: list[int] = []
    num_floats = num_parts = max_units = 0
    for _, context, _ in requests:
        offsets.append(num_floats)
        num_units = -(-context // UNIT_TOKENS)
        max_units = max(max_units, num_units)
        num_floats += shape.num_kv_heads * (2 * group + 1) * _padded(num_units)
        num_parts += -(-context // CUT_TOKENS)
    num_pairs, max_units = len(requests) * shape.num_kv_heads, _padded(max_units)
    record = record or make_record(shape)
    memory = record.memory
    scratch = memory.room("scratch", num_floats, torch.float32)
    size = shape.num_kv_heads * num_parts * group * (shape.head_dim + 3)
    kept = memory.shaped("kept", (len(requests), shape.num_kv_heads, max_units), torch.int32)
    num_kept = memory.shaped("num_kept", (len(requests), shape.num_kv_heads), torch.int32)
    found = (num_layers, len(requests), shape.num_heads, len(DIAGNOSTICS))
    diagnostics = memory.shaped("diagnostics", found, torch.float32)
    budgets = budgets.contiguous()
    record.requests, record.pages = memory.table("requests", table), memory.table("pages", pages)
    record.offsets, record.scratch = memory.table("offsets", offsets), scratch.data_ptr()
    record.items = memory.room("items", 2 * num_pairs + 1, torch.int64).data_ptr()
    record.open = memory.room("open", 3 * num_pairs, torch.int32).data_ptr()
    record.partial = memory.room("partial", size, torch.float32).data_ptr()
    record.budgets, record.diagnostics = budgets.data_ptr(), diagnostics.data_ptr()
    record.kept, record.num_kept = kept.data_ptr(), num_kept.data_ptr()
    record.num_requests, record.rotary, record.max_units = len(requests), 2 * cos.shape[1], max_units
    record.held = (*rotate_by(record, cos, sin), budgets)
    return SparsePlan(shape, cos.shape[0], diagnostics, kept, num_kept, scratch, offsets, record)


def _check_budgets(budgets: torch.Tensor, size: tuple[int, int, int]) -> None:
    is_small = bool(budgets.numel()) and int(budgets.min()) < 1
    if budgets.shape != size or budgets.dtype is not torch.int32 or is_small:
        raise ValueError(
            f"Budgets are {budgets.dtype} {list(budgets.shape)}: needed are int32, at least 1, for each layer, "
            f"{size[1]} requests and {size[2]} KV heads."
        )


def _padded(num_units: int) -> int:
    return -(-num_units // UNIT_TOKENS) * UNIT_TOKENS


def decode(
    library: Library,
    plan: SparsePlan,
    layer: int,
    qkv: torch.Tensor,
    store: torch.Tensor,
    summaries: Summaries,
    out: torch.Tensor,
    *,
    window: int | None,
) -> None:
    """Rotate and write the new key and value, bring their unit's summary up to date, select, and attend.

    Writes out[row] for each request of the plan; other rows are left alone. Also plan.diagnostics[layer], plan.kept and
    plan.num_kept. layer: the row of the plan's budgets and diagnostics. qkv: [num_tokens, heads + 2 * kv_heads,
    head_dim], contiguous, not rotated, left as it is. store: [2, kv_heads, num_slots, head_dim], contiguous, gets the
    new keys and values. out: [num_tokens, heads, head_dim], contiguous. window: None, or keys seen with the new one;
    first tokens outside of it are neither seen nor kept. The summaries of all earlier units must be up to date, and
    pages inside the store.
    Raises ValueError for shapes or dtypes that do not fit the plan.
    """
    _check(plan.shape, plan.num_rows, qkv, store, summaries, out)
    if not 0 <= layer < plan.diagnostics.shape[0]:
        raise ValueError(f"Layer {layer} is not one of the plan's {plan.diagnostics.shape[0]}.")
    library.sparse(
        None, ctypes.addressof(plan.record), qkv.data_ptr(), store.data_ptr(), out.data_ptr(),
        summaries.codes.data_ptr(), summaries.steps.data_ptr(), layer, store.shape[2], window or 0,
        library.instruction_set, library.num_threads,
    )  # fmt: skip


def record_decode(
    program: Program,
    shape: SparseShape,
    record: StepRecord,
    layer: int,
    qkv: torch.Tensor,
    store: torch.Tensor,
    summaries: Summaries,
    out: torch.Tensor,
    *,
    window: int | None,
) -> None:
    """Add `decode` of a layer to a program: of the requests that a `plan` with this record holds when it runs.

    That plan must have so many layers. qkv, out: for the program's max_rows rows; else as in `decode`. Raises
    ValueError likewise.
    """
    _check(shape, program.max_rows, qkv, store, summaries, out)
    result = program.library.sparse(
        program.address, ctypes.addressof(record), qkv.data_ptr(), store.data_ptr(), out.data_ptr(),
        summaries.codes.data_ptr(), summaries.steps.data_ptr(), layer, store.shape[2], window or 0,
        program.library.instruction_set, program.num_threads,
    )  # fmt: skip
    program.recorded(result, record, qkv, store, summaries, out)


def _check(
    shape: SparseShape, num_rows: int, qkv: torch.Tensor, store: torch.Tensor, summaries: Summaries, out: torch.Tensor
) -> None:
    check_operands(shape, num_rows, qkv, store, out)
    if summaries.rule is not shape.rule or not _fits(summaries, store):
        raise ValueError(
            f"The summaries are {summaries.rule.name} {list(summaries.codes.shape)}, the store {list(store.shape)}: "
            f"they do not fit together or the rule, {shape.rule.name}."
        )
