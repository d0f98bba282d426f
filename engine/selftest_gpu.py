"""The Triton kernels against their references, on small random shapes, on the GPU at hand.

`engine/selftest.py` calls these checks where there is a GPU; tests run them in Triton's interpreter. The shapes are
those of the served models but for their lengths: bfloat16, query groups, pages in any order, contexts that end inside
pages. Outputs are NaN before, pages of no request too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vashista.engine.selftest_check import Check, CheckFailed
from vashista.kernels import triton_guard
from vashista.kernels.key_summary import Rule, make_level, summarize
from vashista.kernels.paged_decode import paged_decode, paged_decode_reference
from vashista.kernels.paged_prefill import paged_prefill, paged_prefill_reference
from vashista.kernels.paged_reference import gather_tokens
from vashista.kernels.rope_write import rope_and_write, rope_and_write_reference
from vashista.kernels.selection import ScoreOptions
from vashista.kernels.sparse_attend import attend_reference
from vashista.kernels.sparse_decode import SparsePlan, make_plan, sparse_decode
from vashista.kernels.unit_score import score_reference
from vashista.kernels.unit_select import select_reference

REMEDY = (
    "Install the versions of torch and triton that deploy/lock pins, empty Triton's cache (~/.triton/cache), and see "
    "that its disk is not full and a C compiler is there; until then serve with --device cpu."
)
GROUP_TOKENS = 16
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2.5e-3}
"""Relative error of a result as a whole; rounding to bfloat16 alone costs 1.7e-3."""
SCORE_LIMIT = 0.02
"""Nats that a score of the kernel may be off."""


@dataclass(frozen=True)
class Size:
    """How large the cases are."""

    contexts: tuple[int, ...] = (1, 63, 700, 3000)
    chunks: tuple[int, ...] = (1, 63, 130, 64)
    """Prompt tokens of each context that the prompt kernel computes."""
    head_dim: int = 128
    num_kv_heads: int = 4
    group: int = 4
    page_size: int = 64
    budget: int = 512
    dtype: torch.dtype = torch.bfloat16


def gpu_checks(device: torch.device, size: Size | None = None) -> list[Check]:
    """Of all Triton kernels."""
    looks: dict[str, Callable[[Case], str]] = {
        "GPU kernels: rotation and cache write": check_write,
        "GPU kernels: dense attention": check_dense,
        "GPU kernels: prompt attention": check_prompt,
        "GPU kernels: sparse attention": check_sparse,
    }
    chosen = size or Size()
    return [Check(name, lambda look=look: _with_triton(look, device, chosen), REMEDY) for name, look in looks.items()]  # type: ignore[misc]


def _with_triton(look: Callable[[Case], str], device: torch.device, size: Size) -> str:
    if triton_guard.triton is None:
        raise CheckFailed("there is a GPU, but the triton package is not installed: install vashista[cuda]")
    return look(Case(device, size))


class Case:
    """Requests on scattered pages; everything else in the caches is NaN."""

    def __init__(self, device: torch.device, size: Size) -> None:
        self.device, self.size = device, size
        self.dice = torch.Generator().manual_seed(0)
        self.scale = size.head_dim**-0.5
        self.num_heads = size.num_kv_heads * size.group
        counts = [-(-context // size.page_size) for context in size.contexts]
        order = torch.randperm(sum(counts) + 2, generator=self.dice).tolist()
        # What lies behind a request's last page in the table is a page full of NaN.
        table = torch.full((len(counts), max(counts) + 1), order.pop(), dtype=torch.int32)
        for row, count in enumerate(counts):
            table[row, :count] = torch.tensor([order.pop() for _ in range(count)])
        self.table = table.to(device)
        self.lens = torch.tensor(size.contexts, dtype=torch.int32, device=device)
        position = [torch.arange(context) for context in size.contexts]
        self.slots = [table[row, p // size.page_size].long() * size.page_size + p % size.page_size
                      for row, p in enumerate(position)]  # fmt: skip
        num_pages = sum(counts) + 2
        self.keys, self.values = (self._cache(num_pages) for _ in range(2))

    def _cache(self, num_pages: int) -> torch.Tensor:
        size = self.size
        flat = torch.full((num_pages * size.page_size, size.num_kv_heads, size.head_dim), math.nan)
        for slots in self.slots:
            flat[slots] = torch.randn(len(slots), size.num_kv_heads, size.head_dim, generator=self.dice)
        paged = flat.view(num_pages, size.page_size, size.num_kv_heads, size.head_dim).transpose(1, 2).contiguous()
        return paged.to(self.device, size.dtype)

    def normal(self, *shape: int) -> torch.Tensor:
        """Normal numbers of the case's dtype."""
        return torch.randn(*shape, generator=self.dice).to(self.device, self.size.dtype)

    def queries(self, num_rows: int) -> torch.Tensor:
        """[num_rows, num_heads, head_dim]"""
        return self.normal(num_rows, self.num_heads, self.size.head_dim)

    def compare(self, what: str, result: torch.Tensor, reference: torch.Tensor) -> float:
        """Relative error; raises CheckFailed where it is too large."""
        if not bool(result.isfinite().all()):
            raise CheckFailed(f"{what}: the result holds numbers that are not finite")
        error = float((result.double() - reference).norm() / reference.norm().clamp_min(1e-30))
        limit = LIMITS[result.dtype]
        if not error <= limit:
            raise CheckFailed(f"{what}: {error:.1e} from the reference, at most {limit:.0e} is right")
        return error


def check_write(case: Case) -> str:
    """Rotated queries, and rotated keys and values in the caches."""
    size = case.size
    rows = len(size.contexts)
    q, k, v = case.queries(rows), case.normal(rows, size.num_kv_heads, size.head_dim), case.normal(
        rows, size.num_kv_heads, size.head_dim)  # fmt: skip
    angles = torch.randn(rows, size.head_dim // 2, generator=case.dice).to(case.device)
    slots = torch.stack([slots[-1] for slots in case.slots]).to(case.device)
    slots[0] = -1  # a token that is not to be written
    exact = rope_and_write_reference(q, k, v, angles.cos(), angles.sin(), case.keys, case.values, slots)
    rope_and_write(q, k, v, angles.cos(), angles.sin(), case.keys, case.values, slots)
    error = 0.0
    for what, result, reference in zip(("queries", "keys", "values"), (q, case.keys, case.values), exact, strict=True):
        is_there = ~reference.isnan()
        if not torch.equal(is_there, ~result.isnan()):
            raise CheckFailed(f"{what}: a slot of no token was written")
        error = max(error, case.compare(what, result[is_there], reference[is_there]))
    return f"largest error {error:.0e}"


def check_dense(case: Case) -> str:
    """Decode attention over whole contexts."""
    q = case.queries(len(case.size.contexts))
    out = torch.full_like(q, math.nan)
    paged_decode(q, case.keys, case.values, case.table, case.lens, scale=case.scale, out=out)
    exact, _ = paged_decode_reference(q, case.keys, case.values, case.table, case.lens, scale=case.scale)
    return f"error {case.compare('the output', out, exact):.0e}"


def check_prompt(case: Case) -> str:
    """Causal attention of prompt chunks, each the end of its context."""
    chunks = [min(chunk, context) for chunk, context in zip(case.size.chunks, case.size.contexts, strict=True)]
    starts = torch.tensor([0, *chunks]).cumsum(0).int().to(case.device)
    q = case.queries(sum(chunks))
    out = torch.full_like(q, math.nan)
    paged_prefill(
        q, case.keys, case.values, case.table, starts, case.lens, scale=case.scale, max_query_len=max(chunks), out=out
    )
    exact = paged_prefill_reference(q, case.keys, case.values, case.table, starts, case.lens, scale=case.scale)
    return f"error {case.compare('the output', out, exact):.0e}"


def check_sparse(case: Case) -> str:
    """Ranking, selection and attention of the product's rule; its bound; the dense bits where all is kept."""
    size = case.size
    level = make_level(case.keys, Rule.MEAN_VARIANCE, GROUP_TOKENS)
    level.steps.fill_(math.nan)
    summarize(case.keys, torch.cat(case.slots).to(case.device), level)
    q = case.queries(len(size.contexts))
    budgets = torch.full((len(size.contexts), size.num_kv_heads), size.budget, dtype=torch.int32, device=case.device)
    budgets[:, -1] = max(size.contexts)
    max_context = case.table.shape[1] * size.page_size
    plan = make_plan(
        q, case.keys, (level,), ScoreOptions(scale=case.scale), max_context=max_context, max_budget=size.budget
    )
    out = torch.full_like(q, math.nan)
    caches = (case.keys, case.values)
    sparse_decode(q, caches, (level,), case.table, case.lens, budgets, plan, out=out)
    dense = paged_decode(q, *caches, case.table, case.lens, scale=case.scale, max_context=max_context)
    error, num_heads = 0.0, 0
    for row, context in enumerate(size.contexts):
        for head in range(size.num_kv_heads):
            heads = slice(head * size.group, (head + 1) * size.group)
            if int(budgets[row, head]) >= context:
                if not torch.equal(out[row, heads], dense[row, heads]):
                    raise CheckFailed(f"a budget that covers {context} tokens has not the bits of dense attention")
                continue
            keys, values = (gather_tokens(cache, case.table[row], context)[head] for cache in caches)
            scores = score_reference(q[row, heads], level, case.table[row], head, context, plan.options)
            kept = _check_kept(plan, row * size.num_kv_heads + head, scores, context, size.budget)
            exact, _ = attend_reference(q[row, heads], keys, values, kept, plan.options)
            error = max(error, case.compare(f"a context of {context}", out[row, heads], exact))
            _check_bound(plan, row * size.num_kv_heads + head, q[row, heads].double() @ keys.double().T, kept)
            num_heads += 1
    return f"largest error {error:.0e}; {num_heads} selections and bounds hold; the dense bits where all is kept"


def _check_kept(plan: SparsePlan, pair: int, scores: torch.Tensor, context: int, budget: int) -> torch.Tensor:
    """The kept positions; raises CheckFailed unless scores are right and the kept groups are the best by them."""
    options, fine = plan.options, plan.fine
    own = fine.scores[pair, : len(scores)]
    off = float((own.double() - scores).abs().max())
    if not off < SCORE_LIMIT:
        raise CheckFailed(f"a context of {context}: a score is off by {off:.3f} nats")
    unit = torch.arange(len(scores), device=own.device)
    is_forced = (unit * GROUP_TOKENS < options.num_sinks) | ((unit + 1) * GROUP_TOKENS > context - options.num_recent)
    expected = select_reference(own, is_forced, budget // GROUP_TOKENS)
    kept = fine.units[pair, : int(fine.num_kept[pair])].long()
    if not torch.equal(kept, expected):
        raise CheckFailed(f"a context of {context}: the kept groups are not those of the best scores")
    position = (kept[:, None] * GROUP_TOKENS + torch.arange(GROUP_TOKENS, device=own.device)).flatten()
    return position[position < context]


def _check_bound(plan: SparsePlan, pair: int, products: torch.Tensor, kept: torch.Tensor) -> None:
    """products: [group, context], float64, not scaled."""
    is_dropped = torch.ones(products.shape[1], dtype=torch.bool, device=products.device)
    is_dropped[kept] = False
    dropped = (products[:, is_dropped] * plan.options.scale).logsumexp(1).max()
    if not float(plan.fine.mass[pair, 3]) >= float(dropped):
        raise CheckFailed("the bound of the dropped mass is below the dropped mass")
