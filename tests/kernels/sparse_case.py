"""One batch for sparse decode: pages, summaries, budgets, and calls that judge themselves."""

import math
from dataclasses import dataclass, field

import torch

from vashista.kernels.key_summary import GROUP_TOKENS, Rule, SummaryLevel, make_level, summarize
from vashista.kernels.selection import ScoreOptions
from vashista.kernels.sparse_decode import SparsePlan, make_plan, sparse_decode, sparse_decode_reference


def slots_of(case, requests=None, *, every: int = 1) -> torch.Tensor:
    """Slots of all tokens of a `Paged` case, request after request, position after position, int64.

    every: of so many tokens the last one alone, and a request's last.
    """
    slots = []
    for request, length in enumerate(case.context_lens):
        if requests is None or request in requests:
            position = torch.arange(length, device=case.device)
            position = position[(position % every == every - 1) | (position == length - 1)]
            page = case.table[request, position // case.page_size].long()
            slots.append(page * case.page_size + position % case.page_size)
    return torch.cat(slots)


@dataclass
class SparseCase:
    """A `Paged` case with summaries; budget: tokens for every pair, or a tensor; without a rule there are no levels.

    max_budget: what the plan has room for, at most; pairs with more must attend to their whole context.
    """

    paged: object
    budget: int | torch.Tensor
    rule: Rule | None = Rule.MEAN_VARIANCE
    coarse_unit: int | None = None
    candidates: int | None = None
    options: dict = field(default_factory=dict)
    max_budget: int = 512

    def __post_init__(self) -> None:
        case = self.paged
        self.options = {"scale": case.head_dim**-0.5, "num_recent": 16, "window": case.window} | self.options
        case.poison()
        units = [] if self.rule is None else [unit for unit in (16, self.coarse_unit) if unit]
        self.levels: tuple[SummaryLevel, ...] = tuple(make_level(case.k_clean, self.rule, unit) for unit in units)
        for level in self.levels:  # what a reused page would hold
            for plane in level.planes:
                plane.random_(0, 256)
            level.steps.fill_(math.nan)
        if self.levels:
            # what is written is the same as with all tokens' slots, by fewer programs
            summarize(case.k_clean, slots_of(case, every=GROUP_TOKENS), *self.levels)
        self.q = case.draw_queries(len(case.context_lens))
        budgets = self.budget
        if isinstance(budgets, int):
            budgets = torch.full((len(case.context_lens), case.num_kv_heads), budgets)
        self.budgets = budgets.to(case.device).int()
        visible = case.lens if case.window is None else case.lens.clamp(max=case.window)
        assert ((self.budgets <= self.max_budget) | (self.budgets >= visible[:, None])).all(), "no plan is for these"
        self.plan = self.make_plan()

    def make_plan(self) -> SparsePlan:
        case = self.paged
        return make_plan(
            self.q, case.k_cache, self.levels, ScoreOptions(**self.options),
            max_context=case.table.shape[1] * case.page_size,
            max_budget=max(int(self.budgets.clamp(max=self.max_budget).max()), 16),
            max_candidate_tokens=self.candidates,
        )  # fmt: skip

    def run(self, slots: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of the kernels, on poisoned caches, into poisoned outputs."""
        case = self.paged
        out = torch.full(self.q.shape, math.nan, dtype=self.q.dtype, device=case.device)
        lse = torch.full(self.q.shape[:2], math.nan, device=case.device)
        for selection in (self.plan.fine, self.plan.coarse):
            if selection is not None:
                for tensor in (selection.scores, selection.keys, selection.bounds, selection.part_sums, selection.mass):
                    tensor.fill_(math.nan)
                for numbers in (selection.units, selection.parts, selection.num_kept):
                    numbers.fill_(-1)
        returned = sparse_decode(
            self.q, (case.k_cache, case.v_cache), self.levels, case.poisoned_table, case.lens, self.budgets, self.plan,
            out=out, lse=lse, slots=slots,
        )  # fmt: skip
        assert returned is out
        return out, lse

    def kept(self) -> list[list[int]]:
        """Groups kept of each pair by the last call; empty for dense pairs."""
        fine = self.plan.fine
        return [row[:count].tolist() for row, count in zip(fine.units, fine.num_kept.tolist(), strict=True)]

    def check(self, judge, tolerance=None, slots=None) -> None:
        """Run, and compare output, lse and kept sets with the float64 reference."""
        case = self.paged
        out, lse = self.run(slots)
        expected, expected_lse, kept = sparse_decode_reference(
            self.q, (case.k_clean, case.v_clean), self.levels, case.table, case.lens, self.budgets, self.plan
        )
        assert self.kept() == [groups or [] for groups in kept]
        judge(out, expected, tolerance)
        is_empty = expected_lse == -math.inf
        assert ((lse == -math.inf) == is_empty).all()
        assert torch.allclose(lse.double()[~is_empty], expected_lse[~is_empty], rtol=1e-5, atol=1e-5)
        assert (self.plan.runs.counters == 0).all()
