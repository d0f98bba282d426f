"""The compiled CPU kernels against float64, on small random shapes, with every instruction set of the processor.

`engine/selftest.py` calls these checks. Each kernel writes into outputs full of NaN, from stores that are NaN wherever
no request's token lies, so that an element that was not computed, or read from a neighbour, cannot pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from vashista.engine.selftest_check import Check, CheckFailed, CheckSkipped
from vashista.kernels.cpu import attend, library, linear, norm, sparse

REMEDY = (
    "Install the package again, for this processor; if that changes nothing, remove vashista/kernels/cpu/native*.so, "
    "and torch computes instead."
)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
"""Relative error of a result as a whole, after the reference is rounded to its dtype."""
HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 64, 16
GROUP = HEADS // KV_HEADS
SCALE = HEAD_DIM**-0.5
CONTEXTS = (1, 17, 130, 700)
NUM_SHARED_TOKENS = 200
"""Budget of the sparse check, but for the KV heads that get their whole context."""
RULES = (sparse.Rule.MEAN_VARIANCE, sparse.Rule.MEAN, sparse.Rule.BOX, sparse.Rule.WINDOW)
DTYPES = (torch.float32, torch.bfloat16)


def cpu_checks() -> list[Check]:
    """Of all compiled kernels."""
    looks: dict[str, Callable[[library.Library], str]] = {
        "CPU kernels: products, norms, gates": check_products,
        "CPU kernels: dense attention": check_dense,
        "CPU kernels: sparse attention": check_sparse,
    }
    return [Check(name, lambda look=look: _with_every_set(look), REMEDY) for name, look in looks.items()]  # type: ignore[misc]


def _with_every_set(look: Callable[[library.Library], str]) -> str:
    """Run a check with each instruction set that the processor has, and leave the best one in use."""
    found = library.load()
    if found is None:
        if library.status() == "no compiled kernels":
            raise CheckSkipped("this installation has no compiled kernels: torch computes, slower")
        raise CheckFailed(library.status())
    best, names = found.instruction_set, found.set_names
    try:
        for index, name in enumerate(names):
            found.instruction_set = index
            try:
                text = look(found)
            except CheckFailed as problem:
                raise CheckFailed(f"{name}: {problem}") from None
    finally:
        found.instruction_set = best
    return f"{', '.join(names)}: {text}"


class Worst:
    """The largest relative error seen; raises at once where one is too large."""

    def __init__(self) -> None:
        self.error = 0.0

    def see(self, what: str, result: torch.Tensor, reference: torch.Tensor) -> None:
        """Compare with a float64 reference."""
        if not bool(result.isfinite().all()):
            raise CheckFailed(f"{what}: the result holds numbers that are not finite")
        rounded = reference.to(result.dtype).double()
        error = float((result.double() - rounded).norm() / rounded.norm().clamp_min(1e-30))
        most = LIMITS[result.dtype]
        if not error <= most:
            raise CheckFailed(f"{what}: {error:.1e} from the reference, at most {most:.0e} is right")
        self.error = max(self.error, error)

    def __str__(self) -> str:
        return f"largest error {self.error:.0e}"


def check_products(native: library.Library) -> str:
    """Products of few rows with everything that is fused into them, norms, and gates."""
    worst, dice = Worst(), _dice()
    for dtype in DTYPES:
        weight, bias = _normal(dice, 98, 77).to(dtype), _normal(dice, 98).to(dtype)
        scale = torch.rand(77, generator=dice).to(dtype)
        for rows in (1, 5, 17):
            x, rest = _normal(dice, rows, 77).to(dtype), _normal(dice, rows, 98).to(dtype)
            plain, exact = linear.linear(native, x, weight, bias, rest), linear.linear_reference(x, weight, bias, rest)
            worst.see("a product", plain, exact)
            gated = linear.linear(native, x, weight / 9, bias, norm=scale, eps=1e-6, gated=True)
            exact = linear.linear_reference(x, weight / 9, bias, norm=scale, eps=1e-6, gated=True)
            worst.see("a gated product of a norm", gated, exact)
            normed = norm.rms_norm(native, x, scale, 1e-6)
            worst.see("a norm", normed, norm.rms_norm_reference(x, scale, 1e-6))
            worst.see("a gate", norm.silu_mul(native, rest), norm.silu_mul_reference(rest))
    return str(worst)


class Case:
    """Decoding requests of CONTEXTS tokens on scattered pages, with the newest token still to be written."""

    def __init__(self, dice: torch.Generator, dtype: torch.dtype, key_scale: float = 1.0) -> None:
        counts = [-(-context // PAGE) for context in CONTEXTS]
        order = torch.randperm(sum(counts) + 2, generator=dice).tolist()
        self.pages = [[order.pop() for _ in range(count)] for count in counts]
        self.store = torch.full((2, KV_HEADS, (sum(counts) + 2) * PAGE, HEAD_DIM), math.nan, dtype=dtype)
        self.slots = [
            (torch.tensor(pages).unsqueeze(1) * PAGE + torch.arange(PAGE)).flatten()[:context]
            for pages, context in zip(self.pages, CONTEXTS, strict=True)
        ]
        for slots in self.slots:
            drawn = _normal(dice, 2, KV_HEADS, len(slots) - 1, HEAD_DIM)
            drawn[0] *= key_scale
            self.store[:, :, slots[:-1]] = drawn.to(dtype)
        self.qkv = _normal(dice, len(CONTEXTS), HEADS + 2 * KV_HEADS, HEAD_DIM).to(dtype)
        angles = _normal(dice, len(CONTEXTS), HEAD_DIM // 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.requests = [(row, context, self.pages[row]) for row, context in enumerate(CONTEXTS)]

    def dense(self, native: library.Library) -> torch.Tensor:
        """[requests, HEADS, HEAD_DIM] of the dense kernel."""
        out = torch.full((len(CONTEXTS), HEADS, HEAD_DIM), math.nan, dtype=self.store.dtype)
        shape = attend.DecodeShape(HEADS, KV_HEADS, HEAD_DIM, PAGE, SCALE, self.store.dtype)
        plan = attend.plan(shape, self.requests, self.cos, self.sin)
        attend.decode(native, plan, self.qkv, self.store, out, window=None)
        return out

    def sparse(
        self, native: library.Library, rule: sparse.Rule, budgets: torch.Tensor
    ) -> tuple[torch.Tensor, sparse.SparsePlan]:
        """The same of the sparse kernel, and what it kept. budgets: [requests, KV_HEADS], int32."""
        shape = sparse.SparseShape(HEADS, KV_HEADS, HEAD_DIM, PAGE, SCALE, self.store.dtype, rule)
        summaries = sparse.make_summaries(rule, KV_HEADS, self.store.shape[2], HEAD_DIM)
        summaries.steps.fill_(math.nan)
        runs = [(slot, slot + 1) for slots in self.slots for slot in slots[:-1].tolist()]
        sparse.summarize(native, self.store, summaries, _joined(runs))
        plan = sparse.plan(shape, self.requests, budgets.unsqueeze(0), self.cos, self.sin)
        out = torch.full((len(CONTEXTS), HEADS, HEAD_DIM), math.nan, dtype=self.store.dtype)
        sparse.decode(native, plan, 0, self.qkv, self.store, summaries, out, window=None)
        return out, plan

    def logits(self, row: int) -> torch.Tensor:
        """[KV_HEADS, GROUP, context], float64, of the keys in the store."""
        x, half = self.qkv[row, :HEADS].double(), HEAD_DIM // 2
        cos, sin = self.cos[row].double(), self.sin[row].double()
        first, second = x[:, :half], x[:, half:]
        rotated: torch.Tensor = torch.cat((first * cos - second * sin, second * cos + first * sin), 1) * SCALE
        keys = self.store[0][:, self.slots[row]].double()
        return rotated.view(KV_HEADS, GROUP, HEAD_DIM) @ keys.transpose(1, 2)

    def attention(self, row: int, kept: torch.Tensor | None = None) -> torch.Tensor:
        """[HEADS, HEAD_DIM], float64, over the kept tokens: [KV_HEADS, context] bool, or over all."""
        logits = self.logits(row)
        if kept is not None:
            logits = logits.masked_fill(~kept.unsqueeze(1), -math.inf)
        values = self.store[1][:, self.slots[row]].double()
        attended: torch.Tensor = logits.softmax(-1) @ values
        return attended.view(HEADS, HEAD_DIM)


def check_dense(native: library.Library) -> str:
    """Decode attention over the whole context, the write of the new key included."""
    worst, dice = Worst(), _dice()
    for dtype in DTYPES:
        case = Case(dice, dtype)
        out = case.dense(native)
        for row, context in enumerate(CONTEXTS):
            worst.see(f"a context of {context}", out[row], case.attention(row))
    return str(worst)


def check_sparse(native: library.Library) -> str:
    """Attention over what was kept; bounds of what was dropped; and the dense bits where nothing is."""
    worst, dice = Worst(), _dice()
    num_heads = 0
    # Keys close to each other make bounds that say something.
    for rule, (dtype, key_scale) in itertools.product(RULES, zip(DTYPES, (0.02, 1.0), strict=True)):
        case = Case(dice, dtype, key_scale)
        budgets = torch.full((len(CONTEXTS), KV_HEADS), NUM_SHARED_TOKENS, dtype=torch.int32)
        budgets[:, 1] = max(CONTEXTS)
        out, plan = case.sparse(native, rule, budgets)
        dense = case.dense(native)
        for row, context in enumerate(CONTEXTS):
            kept = _kept_tokens(plan, row, context)
            worst.see(f"{rule.name.lower()}, a context of {context}", out[row], case.attention(row, kept))
            num_heads += _check_bounds(case.logits(row), kept, plan.diagnostics[0, row].double(), rule)
            covered = slice(0 if context <= NUM_SHARED_TOKENS else GROUP, HEADS)
            if not torch.equal(out[row, covered], dense[row, covered]):
                raise CheckFailed(f"{rule.name.lower()}: a budget that covers {context} tokens has not the dense bits")
    return f"{worst}; {num_heads} bounds hold; the dense bits where all is kept"


def _kept_tokens(plan: sparse.SparsePlan, row: int, context: int) -> torch.Tensor:
    """[KV_HEADS, context] bool."""
    unit = torch.arange(context) // sparse.UNIT_TOKENS
    rows = [torch.isin(unit, plan.kept[row, head, : plan.num_kept[row, head]]) for head in range(KV_HEADS)]
    return torch.stack(rows)


def _check_bounds(logits: torch.Tensor, kept: torch.Tensor, seen: torch.Tensor, rule: sparse.Rule) -> int:
    """Whether the dropped mass is below its bound; returns the number of heads that dropped anything."""
    hidden = kept.unsqueeze(1)
    log_kept = logits.masked_fill(~hidden, -math.inf).logsumexp(-1).flatten()
    log_dropped = logits.masked_fill(hidden, -math.inf).logsumexp(-1).flatten()
    drops = log_dropped > -math.inf
    bound = seen[:, 4] - seen[:, 0]
    if bool((bound < log_dropped - log_kept)[drops].any()) or bool(bound.isnan()[drops].any()):
        raise CheckFailed(f"{rule.name.lower()}: the bound of the dropped mass is below the dropped mass")
    if bool((seen[:, 0] - log_kept).abs().max() > 1e-4):
        raise CheckFailed(f"{rule.name.lower()}: the kept mass is not that of the kept tokens")
    return int(drops.sum())


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of neighbouring slots of one unit made into one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(runs):
        if joined and joined[-1][1] == start and start % sparse.UNIT_TOKENS:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _dice() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _normal(dice: torch.Generator, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=dice)
