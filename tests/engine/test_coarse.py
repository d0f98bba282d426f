"""The coarse level of a GPU's sparse attention: when it ranks, what it keeps, and that no step leaves it behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from vashista.engine.attention import coarse, sparse_triton
from vashista.engine.attention.interface import AttentionShape
from vashista.engine.attention.plan_key import PlanKey
from vashista.engine.attention.sparse_triton import SparseTritonAttention
from vashista.engine.errors import SettingsError
from vashista.engine.step import EVERYTHING, Selection, Span, StepInput
from vashista.kernels.key_summary import Rule, make_level, summarize
from vashista.kernels.selection import ScoreOptions
from vashista.kernels.sparse_attend import attend_reference
from vashista.kernels.sparse_decode import keep_reference, resize_plan
from vashista.kernels.triton_guard import triton

needs_triton = pytest.mark.skipif(triton is None, reason="the triton package is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE, HEADS, KV_HEADS, DIM, NUM_PAGES = 64, 2, 1, 64, 24
BUDGET = 96
"""More than sinks, recent tokens and their rest: one group is chosen at least."""


def shape_of(windows: tuple[int | None, ...] = (None, 200), page_size: int = PAGE) -> AttentionShape:
    return AttentionShape(
        len(windows), HEADS, KV_HEADS, DIM, DIM**-0.5, page_size, windows, torch.float32, DEVICE
    )  # fmt: skip


class Played:
    """A module whose requests are given random queries, keys and values."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape
        self.attention = SparseTritonAttention("vashista", Rule.MEAN_VARIANCE, shape)
        self.attention.allocate(NUM_PAGES)
        for levels in self.attention._levels:  # what a reused page would hold
            for level in levels:
                for plane in level.planes:
                    plane.fill_(77)
                level.steps.fill_(torch.nan)

    def draw(self, pages: list[int], num_tokens: int, context: int) -> torch.Tensor:
        """What a request's newest tokens have, the same each time; [layers, num_tokens, heads, dim]."""
        generator = torch.Generator().manual_seed(1000 * pages[0] + context)
        size = (self.shape.num_layers, num_tokens, HEADS + 2 * KV_HEADS, DIM)
        return torch.randn(size, generator=generator).to(DEVICE, self.shape.dtype)

    def run(self, *spans: tuple[list[int], int, int, int | None]) -> list[torch.Tensor]:
        """A step of (pages, new tokens, context after it, budget or None for dense); the outputs of each layer."""
        size = (self.shape.num_layers, KV_HEADS)
        made, at = [], 0
        for pages, num_tokens, context, budget in spans:
            selection = None
            if budget is not None:
                selection = Selection(torch.full(size, budget, dtype=torch.int32), [(0, 0)])
            made.append(Span(at, num_tokens, context, pages, selection))
            at += num_tokens
        positions = torch.cat([torch.arange(span.start, span.context_len) for span in made]).to(DEVICE)
        angles = positions[:, None] * torch.logspace(0, -3, DIM // 2, device=DEVICE)
        self.attention.begin(StepInput(positions, positions, made, positions[:0]), angles.cos(), angles.sin())
        drawn = torch.cat([self.draw(*span[:3]) for span in spans], 1)
        return [self.attention.forward(layer, qkv) for layer, qkv in enumerate(drawn)]

    def summaries(self, pages: list[int], context: int) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Of each layer and level a request's planes and steps, and what its keys have, anew."""
        position = torch.arange(context, device=DEVICE)
        slots = torch.tensor(pages, device=DEVICE)[position // PAGE] * PAGE + position % PAGE
        for keys, levels in zip(self.attention._store.keys, self.attention._levels, strict=True):
            assert [level.unit_tokens for level in levels] == [16, 64]
            fresh = [make_level(keys, Rule.MEAN_VARIANCE, level.unit_tokens) for level in levels]
            summarize(keys, slots, *fresh)
            for level, made in zip(levels, fresh, strict=True):
                units = (slots // level.unit_tokens).unique()
                per_page = PAGE // level.unit_tokens
                place = (units // per_page, slice(None), units % per_page)
                yield tuple([part[place] for part in (*each.planes, each.steps)] for each in (level, made))

    def assert_written(self, pages: list[int], context: int) -> None:
        """All summaries of a request are those that its keys have, anew."""
        for parts, others in self.summaries(pages, context):
            assert all(map(torch.equal, parts, others))


@pytest.fixture
def is_tall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels from the first token on, and few candidates."""
    monkeypatch.setattr(coarse, "COARSE_CONTEXT", 0)
    monkeypatch.setattr(coarse, "CANDIDATES_PER_KEPT", 2)
    monkeypatch.setattr(sparse_triton, "PLAN_CONTEXT", 512)


FIRST, SECOND = [3, 9, 1, 14, 0, 22, 7], [3, 9, 1, 14, 2, 5, 11]


@needs_triton
@pytest.mark.usefixtures("is_tall")
def test_every_kind_of_step_keeps_both_levels_up_to_date() -> None:
    played = Played(shape_of((None,)))
    played.run((FIRST, 200, 200, None))  # a prompt in chunks that end inside of units
    played.run((FIRST, 73, 273, None))
    played.run((SECOND, 40, 296, None))  # the first four pages are shared
    for context in range(274, 277):
        played.run((FIRST, 1, context, BUDGET))
    played.run((FIRST, 1, 277, None), (SECOND, 1, 297, BUDGET))
    played.run((FIRST, 1, 278, None))
    coarse.COARSE_CONTEXT = 1 << 20  # the fixture sets it back
    played.attention._plans.clear()
    for context in range(279, 282):  # a unit of 16 begins
        played.run((FIRST, 1, context, BUDGET), (SECOND, 1, context + 19, BUDGET))
    played.assert_written(FIRST, 281)
    played.assert_written(SECOND, 300)
    played.run(([22, 3], 70, 70, None))  # its pages are given to another
    played.run(([22, 3], 1, 71, BUDGET))
    played.assert_written([22, 3], 71)


@needs_triton
@pytest.mark.usefixtures("is_tall")
def test_a_step_keeps_the_best_groups_of_the_best_units() -> None:
    played = Played(shape_of())
    played.run((FIRST, 440, 440, None), (SECOND[4:], 100, 100, None))
    outs = played.run((FIRST, 1, 441, BUDGET), (SECOND[4:], 1, 101, None))
    attention, step = played.attention, played.attention._sparse
    assert step is not None
    assert step.plan.coarse is not None
    assert step.plan.num_candidates == 4
    assert step.num_kept[:, 1].tolist() == [0, 0]
    for layer, window in enumerate(played.shape.layer_windows):
        options = ScoreOptions(scale=played.shape.scale, window=window)
        plan = step.plan if window is None else resize_plan(step.plan, options)
        query, row = step.queries[layer, 0], torch.tensor(FIRST, device=DEVICE, dtype=torch.int32)
        kept = keep_reference(query, attention._levels[layer], row, 0, 441, BUDGET, plan)
        assert step.units[layer, 0, : int(step.num_kept[layer, 0])].tolist() == kept.tolist()
        assert len(kept) < 28
        keys, values = attention.read_cache(layer, FIRST, 441)
        tokens = (kept[:, None] * 16 + torch.arange(16, device=DEVICE)).flatten()
        tokens = tokens[(tokens < 441) & (tokens >= 441 - (window or 441))]
        out, _ = attend_reference(query, keys[0], values[0], tokens, options)
        assert (outs[layer][0].double().view(HEADS, DIM) - out).norm() <= 1e-5 * out.norm()
    assert [support.num_dense for support in attention.take_support()] == [0]


@needs_triton
def test_a_request_keeps_the_same_groups_beside_others_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coarse, "COARSE_CONTEXT", 256)
    monkeypatch.setattr(coarse, "CANDIDATES_PER_KEPT", 1)
    monkeypatch.setattr(sparse_triton, "PLAN_CONTEXT", 256)
    monkeypatch.setattr(sparse_triton, "skips_dense", lambda num_pairs, device: True)  # as where clusters attend
    played = Played(shape_of((None,)))
    attention = played.attention
    for cache in (attention._store.keys[0], attention._store.values[0]):
        cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(1)))
    summarize(attention._store.keys[0], torch.arange(NUM_PAGES * PAGE, device=DEVICE), *attention._levels[0])
    short, dense = ([12, 13, 15, 23], 1, 250, 128), ([16, 17, 18, 19, 20], 1, 270, None)
    long, longer = ([2, 5, 11, 4, 6, 8], 1, 330, 240), (FIRST, 1, 441, 112)

    def kept(*spans: tuple[list[int], int, int, int | None]) -> list[list[int]]:
        played.run(*spans)
        step = attention._sparse
        assert step is not None
        return [step.units[0, row, : int(count)].tolist() for row, count in enumerate(step.num_kept[0])]

    alone = {span[2]: kept(span)[0] for span in (short, long, longer)} | {dense[2]: []}
    assert [len(groups) for groups in alone.values()] == [8, 13, 7, 0]  # of 330 tokens four units are opened
    for company in ([short, long, longer, dense], [longer, short], [long, longer], [dense, short]):
        assert kept(*company) == [alone[span[2]] for span in company]
    plans = [(key.num_rows, key.is_mixed, key.has_dense) for key in attention._plans]
    assert plans[:3] == [(1, False, False)] * 3
    assert plans[3:] == [(4, True, True), (2, True, False), (2, False, False), (2, True, True)]


@needs_triton
@pytest.mark.usefixtures("is_tall")
def test_a_captured_step_ranks_in_two_levels_too() -> None:
    played = Played(shape_of((None,)))
    played.run((FIRST, 440, 440, None))
    attention = played.attention
    (eager,) = played.run((FIRST, 1, 441, BUDGET))
    supports = attention.take_support()
    size = torch.full((1, KV_HEADS), BUDGET, dtype=torch.int32)
    spans = [Span(0, 1, 441, FIRST, Selection(size, [(0, 0)]))]
    key = attention.graph_key(spans, 2)
    fixed = attention.fix(key, 2)
    angles = torch.tensor([440.0, 0.0], device=DEVICE)[:, None] * torch.logspace(0, -3, DIM // 2, device=DEVICE)
    attention.use(fixed, angles.cos(), angles.sin())
    attention.fill(fixed, spans)
    assert attention._sparse is not None
    assert attention._sparse.plan.coarse is not None
    out = attention.forward(0, played.draw(FIRST, 1, 441)[0].repeat(2, 1, 1))
    assert (out[0] - eager[0]).norm() <= 1e-5 * eager[0].norm()
    (ours,), (theirs,) = attention.take_support(), supports
    assert ours.tokens_attended == theirs.tokens_attended
    assert ours.dropped_mass_estimate == pytest.approx(theirs.dropped_mass_estimate, abs=1e-4)
    assert ours.audits[0].dropped_mass == pytest.approx(theirs.audits[0].dropped_mass, abs=1e-5)
    played.assert_written(FIRST, 441)


@needs_triton
def test_a_captured_prompt_writes_both_levels() -> None:
    played = Played(shape_of((None,)))
    attention, rows = played.attention, 96
    fixed = attention.fix_prompts(rows, 2)
    for start, end in ((0, 70), (70, 166), (166, 170)):  # of one graph; the first and the last have padding
        for is_warm_up in (True, False) if start == 0 else (False,):
            positions = torch.arange(rows, device=DEVICE) + start
            angles = positions[:, None] * torch.logspace(0, -3, DIM // 2, device=DEVICE)
            attention.use(fixed, angles.cos(), angles.sin())
            if not is_warm_up:
                attention.fill(fixed, [Span(0, end - start, end, FIRST)])
            attention.forward(0, played.draw(FIRST, rows, end)[0])
            if is_warm_up:  # all of it is padding, and nothing is written
                assert all((plane == 77).all() for level in attention._levels[0] for plane in level.planes)
    played.assert_written(FIRST, 170)


@pytest.mark.parametrize("context", [1, 16384, 16385, 65536, 65537, 100000, 131072, 131073, 600000])
def test_a_step_is_ranked_alike_captured_or_not(context: int) -> None:
    """Captured ones know their greatest context to a power of two only."""
    rounded = -(-context // sparse_triton.PLAN_CONTEXT) * sparse_triton.PLAN_CONTEXT
    attention = SparseTritonAttention("vashista", Rule.MEAN_VARIANCE, shape_of((None,)))
    budgets = torch.full((1, KV_HEADS), 1024, dtype=torch.int32)
    key = attention.graph_key([Span(0, 1, context, [], Selection(budgets, []))], 1)
    assert isinstance(key, PlanKey)
    assert not key.is_mixed
    assert coarse.candidate_tokens(64, key.max_context, 1024) == coarse.candidate_tokens(64, rounded, 1024)


@pytest.mark.parametrize(
    ("page_size", "rule", "is_mixed"),
    [(64, Rule.MEAN_VARIANCE, True), (32, Rule.BOX, True), (16, Rule.MEAN_VARIANCE, False), (64, None, False)],
)
def test_a_short_context_beside_a_long_one_takes_another_graph_only_where_there_are_two_levels(
    page_size: int, rule: Rule | None, is_mixed: bool
) -> None:
    attention = SparseTritonAttention("vashista", rule, shape_of((None,), page_size))
    selection = Selection(torch.full((1, KV_HEADS), 1024, dtype=torch.int32), [])
    short, long = (Span(0, 1, context, [], selection) for context in (5000, 100_000))
    mixed = attention.graph_key([short, long], 2)
    assert isinstance(mixed, PlanKey)
    assert mixed.is_mixed == is_mixed
    assert (mixed == attention.graph_key([long, long], 2)) == (not is_mixed)


def test_two_levels_rank_long_contexts_alone_where_pages_hold_units() -> None:
    assert [coarse.coarse_tokens(size) for size in (16, 32, 48, 64, 96, 128)] == [None, 32, None, 64, 32, 64]
    assert coarse.candidate_tokens(64, coarse.COARSE_CONTEXT, 1024) is None
    assert coarse.candidate_tokens(64, coarse.COARSE_CONTEXT + 1, 1024) == 4096
    assert coarse.candidate_tokens(16, coarse.COARSE_CONTEXT + 1, 1024) is None
    assert coarse.candidate_tokens(64, 1 << 20, 1 << 15) == 1 << 16
    assert coarse.candidate_tokens(64, 1 << 20, coarse.MAX_CANDIDATES) == coarse.MAX_CANDIDATES
    assert [coarse.longest_context(size) for size in (16, 32, 64)] == [1 << 19, 1 << 20, 1 << 21]


def test_heads_that_keep_more_than_can_be_ranked_attend_to_everything() -> None:
    attention = SparseTritonAttention("vashista", Rule.MEAN_VARIANCE, shape_of((None,) * 3))
    budgets = torch.tensor([[1024], [1 << 17], [EVERYTHING]], dtype=torch.int32)
    spans = [Span(0, 1, (1 << 19) + 1, [], Selection(budgets, []))]
    assert attention.graph_key(spans, 1) == (1, 1 << 20, 1024, False, True)
    assert attention._stack_budgets(spans).flatten().tolist() == [1024, EVERYTHING, EVERYTHING]
    assert budgets.flatten().tolist() == [1024, 1 << 17, EVERYTHING]  # the request's own stay, alone as beside others


@needs_triton
@pytest.mark.parametrize("company", [[], [(SECOND[4:], 1, 101, None)]])
def test_an_audit_of_a_head_that_keeps_too_much_to_be_ranked_finds_nothing_dropped(
    monkeypatch: pytest.MonkeyPatch, company: list[tuple[list[int], int, int, int | None]]
) -> None:
    monkeypatch.setattr(coarse, "MAX_CANDIDATES", 64)
    played = Played(shape_of())
    played.run((FIRST, 440, 440, None), (SECOND[4:], 100, 100, None))
    played.run((FIRST, 1, 441, BUDGET), *company)
    (support,) = played.attention.take_support()
    assert support.num_dense == 2
    assert support.tokens_attended == support.tokens_visible == 441 + 200
    (audit,) = support.audits
    assert audit.dropped_mass == 0.0
    assert audit.support_90 > 1


@pytest.mark.parametrize(("page_size", "longest"), [(16, 1 << 19), (64, 1 << 21)])
def test_contexts_that_cannot_be_ranked_are_refused_at_the_start(page_size: int, longest: int) -> None:
    shape = shape_of((None,), page_size)
    SparseTritonAttention("vashista", Rule.MEAN_VARIANCE, replace(shape, max_context=longest))
    with pytest.raises(SettingsError, match=f"ranks contexts of at most {longest}. Lower max_context") as caught:
        SparseTritonAttention("vashista", Rule.MEAN_VARIANCE, replace(shape, max_context=longest + 1))
    assert "with which 2097152 are possible" in str(caught.value)


def test_a_query_group_that_is_too_large_is_refused_at_the_start() -> None:
    SparseTritonAttention("vashista", Rule.MEAN_VARIANCE, replace(shape_of(), num_heads=16))
    with pytest.raises(SettingsError, match="17 heads; sparse decode takes at most 16; attention = dense takes all"):
        SparseTritonAttention("vashista", Rule.MEAN_VARIANCE, replace(shape_of(), num_heads=17))


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_page_takes_the_bytes_it_says(page_size: int) -> None:
    attention = SparseTritonAttention("vashista", Rule.MEAN_VARIANCE, shape_of(page_size=page_size))
    attention.allocate(3)
    store = [*attention._store.keys, *attention._store.values]
    records = [level.first.untyped_storage() for levels in attention._levels for level in levels]
    taken = sum(tensor.nbytes for tensor in store) + sum(len(record) for record in records)
    assert taken == 3 * attention.page_bytes()
