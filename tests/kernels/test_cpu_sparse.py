"""Sparse decode attention on the CPU store: the float64 truth, selection, bounds, hard keys, poison, independence."""

import math

import pytest
import torch
from sparse_cpu_case import SparseCase

from vashista.kernels.cpu.attend import decode as dense_decode
from vashista.kernels.cpu.attend import plan as dense_plan
from vashista.kernels.cpu.library import Library
from vashista.kernels.cpu.sparse import (
    UNIT_TOKENS,
    Rule,
    SparseShape,
    decode,
    make_summaries,
    plan,
    summarize,
    summary_bytes,
)

DTYPES = [torch.float32, torch.bfloat16]
RULES = list(Rule)
SCORED = [Rule.MEAN, Rule.MEAN_VARIANCE, Rule.BOX]
SHAPES = [(8, 2, 64, 64), (3, 1, 80, 40), (5, 1, 96, 96), (16, 1, 128, 128), (2, 2, 256, 256), (7, 1, 24, 24)]
"""heads, KV heads, head size, rotated dimensions"""
BORDERS = [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 700, 1031]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_to_the_kept_units_equals_the_reference_and_bounds_hold(
    library: Library, rule: Rule, shape: tuple[int, int, int, int]
) -> None:
    dtype = DTYPES[(rule + SHAPES.index(shape)) % 2]
    case = SparseCase(BORDERS, shape, dtype, rule)
    budgets = torch.tensor([16, 128, 600])[torch.randint(0, 3, (len(BORDERS), shape[1]))]
    case.assert_true(*case.run(library, budgets))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("window", [1, 5, 40, 300])
def test_a_window_hides_older_units_and_older_tokens_of_its_first_one(
    library: Library, rule: Rule, window: int
) -> None:
    case = SparseCase([1, 5, 6, 65, 304, 305, 700, 1031], (4, 2, 24, 24), rule=rule, page=64)
    summarize(library, case.store, case.summaries, case.written())
    for context, slots in zip(case.contexts, case.slots(), strict=True):
        oldest, newest_unit = max(0, context - window), (context - 1) // UNIT_TOKENS * UNIT_TOKENS
        case.store[:, :, slots[: min(oldest, newest_unit)]] = torch.nan
        if rule is not Rule.WINDOW:
            hidden_units = slots[: oldest // UNIT_TOKENS * UNIT_TOKENS : UNIT_TOKENS] // UNIT_TOKENS
            case.summaries.steps[:, hidden_units] = 1e30
    out, made = case.decode(library, 96, window)
    for slots in case.slots():
        case.store[:, :, slots] = case.store[:, :, slots].nan_to_num(0.0)
    case.assert_true(out, made, window)
    for i, context in enumerate(case.contexts):
        oldest = max(0, context - window)
        assert (made.kept[i, :, 0] >= oldest // UNIT_TOKENS).all()


def expected_units(
    best: torch.Tensor, context: int, budget: int, window: int | None, sinks: int, recent: int
) -> list[int]:
    """Kept units of a KV head from its scores, by sorting."""
    oldest = max(0, context - (window or context))
    first, end = oldest // 16, -(-context // 16)
    always = {unit for unit in range(first, end) if unit * 16 < sinks or unit >= max(0, context - recent) // 16}
    count = end - first if budget >= context - oldest else min(end - first, max(budget // 16, len(always)))
    order = sorted(set(range(first, end)) - always, key=lambda unit: (-float(best[unit - first]), unit))
    return sorted(always | set(order[: count - len(always)]))


@pytest.mark.parametrize("rule", SCORED)
@pytest.mark.parametrize("window", [None, 333])
def test_the_selection_equals_an_exact_sort_of_the_scores(library: Library, rule: Rule, window: int | None) -> None:
    for sinks, recent in ((0, 1), (16, 64), (100, 33)):
        case = SparseCase([17, 160, 513, 1500], (6, 2, 64, 64), rule=rule, num_sinks=sinks, num_recent=recent)
        budgets = torch.randint(1, 600, (4, 2))
        _, made = case.run(library, budgets, window)
        for i, context in enumerate(case.contexts):
            best = case.scores(made, i, window).amax(1)
            for head in range(2):
                kept = made.kept[i, head, : made.num_kept[i, head]].tolist()
                assert kept == expected_units(best[head], context, int(budgets[i, head]), window, sinks, recent)


def test_of_equal_scores_the_lower_units_are_kept(library: Library) -> None:
    case = SparseCase([1000], (4, 2, 64, 64), num_sinks=0, num_recent=16)
    case.store[0] = case.store[0] * 0 + 0.25
    _, made = case.run(library, 160)
    assert made.kept[0, :, : made.num_kept[0, 0]].tolist() == [[*range(8), 61, 62]] * 2


def test_without_scores_the_first_and_the_newest_units_are_kept(library: Library) -> None:
    case = SparseCase([1000, 90], (4, 2, 64, 64), rule=Rule.WINDOW, num_sinks=17, num_recent=20)
    out, made = case.run(library, 160)
    assert made.kept[0, 0, : made.num_kept[0, 0]].tolist() == [0, 1, *range(55, 63)]
    assert made.num_kept[1].tolist() == [6, 6]
    case.assert_true(out, made)
    assert made.diagnostics[0, 0, :, 2:4].isnan().all()
    assert (made.diagnostics[0, 0, :, 4] == math.inf).all()
    assert (made.diagnostics[0, 1, :, 2:5] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", SCORED)
@pytest.mark.parametrize("window", [None, 333])
def test_scores_follow_the_rule_and_the_estimate_sums_the_dropped_ones(
    library: Library, rule: Rule, dtype: torch.dtype, window: int | None
) -> None:
    case = SparseCase([1031], (6, 2, 64, 64), dtype, rule)
    oldest = 1031 - (window or 1031)
    if window:  # the first unit, of which 6 tokens are seen, is the best one that is dropped
        first = case.slots()[0][oldest // 16 * 16 : oldest // 16 * 16 + 16]
        case.store[0][:, first] = (2 * case.queries(0).sum(1, keepdim=True)).to(dtype)
    _, made = case.run(library, 64 if window else 256, window)
    scores = case.scores(made, 0, window).double()
    q, slots = case.queries(0), case.slots()[0]
    counts = []
    for i, unit in enumerate(range(oldest // 16, -(-1031 // 16))):
        keys = case.store[0][:, slots[16 * unit : 16 * unit + 16]].double()
        counts.append(min(1031, 16 * unit + 16) - max(oldest, 16 * unit))
        seen = scores[..., i] - math.log(counts[-1])
        expected = torch.einsum("hgd,hd->hg", q, keys.mean(1))
        if rule is Rule.MEAN_VARIANCE:
            expected += torch.einsum("hgd,hd->hg", q * q / 2, keys.var(1, correction=0))
        if rule is Rule.BOX:
            high, low = (q * end.unsqueeze(1) for end in (keys.amax(1), keys.amin(1)))
            outwards = seen - torch.maximum(high, low).sum(-1)
            assert (outwards >= -1e-5).all()
            assert (outwards <= q.abs().sum(-1) * keys.abs().max() / 100 + 1e-5).all()
        else:
            assert torch.allclose(seen, expected, atol=0.05)  # codes of 8 bits
    for head in range(2):
        kept = (made.kept[0, head, : made.num_kept[0, head]] - oldest // 16).tolist()
        left = [unit for unit in range(scores.shape[-1]) if unit not in kept]
        seen = made.diagnostics[0, 0].double().view(2, 3, 6)[head]
        assert torch.allclose(seen[:, 2], scores[head][:, left].logsumexp(-1), atol=1e-5)
        best = (scores[head] - torch.tensor(counts).log())[:, left].amax(-1)
        assert torch.allclose(seen[:, 3], best, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", SCORED)
@pytest.mark.parametrize("count", [1, 5, 16])
def test_summaries_hold_what_their_layout_says(library: Library, rule: Rule, dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(count)
    store = torch.full((2, 3, 64, 40), torch.nan, dtype=dtype)
    keys = (torch.randn(3, count, 40) * torch.rand(40).mul(8).exp2()).to(dtype)
    store[0, :, 32 : 32 + count] = keys
    summaries = make_summaries(rule, 3, 64, 40)
    summaries.steps.fill_(7.0)
    summarize(library, store, summaries, [(32, 32 + count)])
    assert (summaries.steps[:, [0, 1, 3]] == 7).all()
    codes, steps, keys = summaries.codes[:, 2], summaries.steps[:, 2].double(), keys.double()
    first = codes[:, :40].double() * steps[:, :1]
    if rule is Rule.BOX:
        last = codes[:, 40:].double() * steps[:, 1:2]
        assert (first >= keys.amax(1)).all()
        assert (last <= keys.amin(1)).all()
        assert (first - keys.amax(1) <= steps[:, :1]).all()
        assert (keys.amin(1) - last <= steps[:, 1:2]).all()
        return
    assert ((first - keys.mean(1)).abs() <= 0.501 * steps[:, :1]).all()
    distance = (keys - first.unsqueeze(1)).norm(dim=-1).amax(1)
    assert (steps[:, 2] >= distance).all()
    assert (steps[:, 2] <= distance * 1.0001 + 1e-4).all()
    assert (steps[:, 3] >= first.norm(dim=-1)).all()
    if rule is Rule.MEAN_VARIANCE:
        spread = codes[:, 40:].view(torch.uint8).double() * steps[:, 1:2]
        assert ((spread - keys.var(1, correction=0)).abs() <= 0.501 * steps[:, 1:2] + 1e-30).all()


@pytest.mark.parametrize("rule", SCORED)
def test_a_decoded_token_leaves_the_summary_that_summarize_makes(library: Library, rule: Rule) -> None:
    case = SparseCase([1, 16, 17, 700], (4, 2, 64, 64), rule=rule, page=32)
    case.run(library, 64)
    fused = case.summaries
    case.summaries = case.blank()
    runs = [(int(slots[-1]), int(slots[-1]) + 1) for slots in case.slots()]
    summarize(library, case.store, case.summaries, runs)
    for slots in case.slots():
        unit = int(slots[-1]) // UNIT_TOKENS
        assert torch.equal(fused.codes[:, unit], case.summaries.codes[:, unit])
        assert torch.equal(fused.steps[:, unit], case.summaries.steps[:, unit])


def test_a_reused_page_keeps_nothing_of_its_earlier_tokens(library: Library) -> None:
    case = SparseCase([33, 700], (4, 2, 64, 64), torch.bfloat16)
    expected, _ = case.run(library, 64)
    case.summaries.codes.fill_(99)
    case.summaries.steps.fill_(1e30)
    unit = int(case.slots()[0][-1]) // UNIT_TOKENS  # the new token's: it has no other
    case.store[:, :, 16 * unit + 1 : 16 * unit + 16] = 1e30
    summarize(library, case.store, case.summaries, [run for run in case.written() if run[0] // 16 != unit])
    out, made = case.decode(library, 64)
    assert torch.equal(out[case.rows], expected[case.rows])
    case.assert_true(out, made)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factor", [0.0, 1e-41, 1e-20, 1e3, 1e15])
def test_equal_denormal_and_huge_keys(library: Library, rule: Rule, dtype: torch.dtype, factor: float) -> None:
    case = SparseCase([700, 33], (4, 2, 64, 64), dtype, rule)
    case.store[0] = (case.store[0].double() * factor).to(dtype)
    case.qkv[:, case.heads : case.heads + case.kv_heads] *= factor
    case.assert_true(*case.run(library, 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", SCORED)
def test_outliers_and_one_dominating_key(library: Library, rule: Rule, dtype: torch.dtype) -> None:
    case = SparseCase([700, 1500], (4, 2, 64, 64), dtype, rule)
    for slots in case.slots():
        case.store[0, :, slots[::37], 5] = 300.0
        case.store[0, :, slots[::53], 9] = -3e4
    case.assert_true(*case.run(library, 128))
    case = SparseCase([700, 1500], (2, 2, 64, 64), dtype, rule)
    for i, slots in enumerate(case.slots()):
        q = case.queries(i)[:, 0]
        case.store[0][:, slots[333]] = (q / q.norm(dim=-1, keepdim=True) * 1000).to(dtype)
    out, made = case.run(library, 128)
    case.assert_true(out, made)
    for i in range(2):
        assert case.kept_tokens(made, i, None)[:, 333].all()
    assert (made.diagnostics[0, :, :, 1] < 1e-3).all()


@pytest.mark.parametrize("rule", SCORED)
def test_squares_beyond_float32_leave_the_bound_true(library: Library, rule: Rule) -> None:
    case = SparseCase([500], (2, 1, 64, 64), rule=rule)
    case.store[0, :, case.slots()[0][100], 3] = 1e25
    case.store[0, :, case.slots()[0][200], 3] = -1e25
    _, made = case.run(library, 128)
    dropped = case.logits(0).masked_fill(case.kept_tokens(made, 0, None).unsqueeze(1), -math.inf).logsumexp(-1)
    assert (made.diagnostics[0, 0, :, 4].double() >= dropped.flatten()).all()


@pytest.mark.parametrize("rule", SCORED)
def test_keys_too_small_to_be_squared_leave_the_bound_true(library: Library, rule: Rule) -> None:
    case = SparseCase([500, 90], (4, 2, 64, 64), rule=rule)
    case.store[0] *= 1e-24
    case.qkv[:, : case.heads] *= 1e24
    case.qkv[:, case.heads : case.heads + case.kv_heads] *= 1e-24
    case.assert_true(*case.run(library, 128))


@pytest.mark.parametrize("rule", SCORED)
def test_where_codes_are_exact_the_bound_still_covers_the_rounding(library: Library, rule: Rule) -> None:
    case = SparseCase([700, 500, 300, 100], (8, 2, 64, 64), rule=rule, num_recent=16)
    for slots in case.slots():
        keys = torch.randint(-127, 128, (2, 1, 64)).float()
        keys[..., 0] = 127
        case.store[0][:, slots] = keys / 64
    out, made = case.run(library, 64)
    case.assert_true(out, made)
    for i in range(4):
        dropped = case.logits(i).masked_fill(case.kept_tokens(made, i, None).unsqueeze(1), -math.inf).logsumexp(-1)
        over = made.diagnostics[0, i, :, 4].double() - dropped.flatten()
        assert (over <= 0.01).all(), "the bound is loose where nothing was lost"


@pytest.mark.parametrize("rule", SCORED)
def test_the_dropped_share_covers_the_rounding_of_a_huge_key_that_is_kept(library: Library, rule: Rule) -> None:
    case = SparseCase([700, 500, 300, 100], (8, 2, 64, 64), rule=rule, num_recent=16, key_scale=1e-3)
    case.cos, case.sin = torch.ones_like(case.cos), torch.zeros_like(case.sin)
    order, signs = torch.randperm(64), torch.tensor([1.0, -1.0]).repeat(32)
    keys = slice(case.heads, case.heads + case.kv_heads)
    case.qkv[..., order] = case.qkv[..., ::2].repeat_interleave(2, -1)
    case.qkv[:, keys, order] *= signs * 1e7  # at right angles to the queries: all of its logit is rounding
    _, made = case.run(library, 64)
    for i in range(4):
        is_kept, logits = case.kept_tokens(made, i, None).unsqueeze(1), case.logits(i)
        kept, dropped = (
            logits.masked_fill(hidden, -math.inf).logsumexp(-1).flatten() for hidden in (~is_kept, is_kept)
        )
        seen = made.diagnostics[0, i].double()
        assert (seen[:, 4] - seen[:, 0] >= dropped - kept).all()


@pytest.mark.parametrize("rule", SCORED)
def test_where_more_units_than_fit_cannot_be_judged_nothing_is_promised(library: Library, rule: Rule) -> None:
    case = SparseCase([1000], (4, 2, 64, 64), rule=rule)
    case.store[0, 1, case.slots()[0][::16], 5] = torch.nan
    _, made = case.run(library, 128)
    assert made.kept[0, 1, : made.num_kept[0, 1]].tolist() == [0, 1, 2, *range(58, 63)]
    assert (made.diagnostics[0, 0, 2:, 2:5] == math.inf).all()
    assert made.diagnostics[0, 0, :2].isfinite().all()


@pytest.mark.parametrize("rule", SCORED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_key_that_is_not_finite_is_kept_and_reaches_its_head_alone(library: Library, rule: Rule, bad: float) -> None:
    case = SparseCase([100, 1100], (4, 2, 16, 16), rule=rule)
    case.store[0, 1, case.slots()[1][333], 5] = bad
    out, made = case.run(library, 128)
    assert 333 // 16 in made.kept[1, 1, : made.num_kept[1, 1]].tolist()
    assert out[case.rows[0]].isfinite().all()
    assert out[case.rows[1], :2].isfinite().all()
    assert made.diagnostics[0, 0].isnan().sum() == 0
    if math.isnan(bad):
        assert out[case.rows[1], 2:].isnan().all()
        assert made.diagnostics[0, 1, 2:, :2].isnan().all()


@pytest.mark.parametrize("rule", RULES)
def test_a_budget_that_covers_what_is_visible_gives_the_bits_of_the_dense_kernel(library: Library, rule: Rule) -> None:
    for window in (None, 40, 600):
        case = SparseCase([1, 17, 513, 1300], (6, 2, 64, 64), torch.bfloat16, rule, page=32)
        budgets = torch.tensor([[1, 1], [17, 17], [513, 16], [9999, 1300]])
        out, made = case.run(library, budgets, window)
        case.assert_true(out, made, window)
        requests = [(row, n, pages) for row, n, pages in zip(case.rows, case.contexts, case.pages, strict=True)]
        dense = torch.empty_like(out)
        dense_decode(
            library, dense_plan(case.shape, requests, case.cos, case.sin), case.qkv, case.store, dense, window=window
        )
        covered = [case.rows[i] for i in (0, 1, 3)]
        assert torch.equal(out[covered], dense[covered])
        assert torch.equal(out[case.rows[2], :3], dense[case.rows[2], :3])
        assert torch.equal(out[case.rows[2], 3:], dense[case.rows[2], 3:]) == (window == 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [Rule.MEAN_VARIANCE, Rule.BOX])
def test_a_request_has_the_same_bits_in_every_batch_on_every_page_and_thread(
    library: Library, dtype: torch.dtype, rule: Rule
) -> None:
    case = SparseCase([5000, 40, 700, 513], (6, 2, 64, 64), dtype, rule)
    budgets = torch.tensor([[1024, 700], [64, 16], [700, 128], [16, 512]])
    together, made = case.run(library, budgets)
    before = torch.get_num_threads()
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        for i, row in enumerate(case.rows):
            alone, made_alone = case.run(library, budgets, which=[i])
            assert torch.equal(alone[row], together[row])
            assert torch.equal(made_alone.diagnostics[:, 0], made.diagnostics[:, i])
    torch.set_num_threads(before)
    moved, source = case.store.clone(), case.slots()
    case.pages = [pages[::-1] for pages in case.pages]
    for old, new in zip(source, case.slots(), strict=True):
        moved[:, :, new] = case.store[:, :, old]
    case.store, case.summaries = moved, case.blank()
    again, made_again = case.run(library, budgets)
    assert torch.equal(again[case.rows], together[case.rows])
    assert torch.equal(made_again.diagnostics, made.diagnostics)


def test_layers_of_a_step_have_their_own_budgets_and_diagnostics(library: Library) -> None:
    case = SparseCase([700, 90], (4, 2, 64, 64))
    summarize(library, case.store, case.summaries, case.written())
    requests = [(row, n, pages) for row, n, pages in zip(case.rows, case.contexts, case.pages, strict=True)]
    budgets = torch.tensor([[[128, 700], [90, 90]], [[256, 128], [80, 90]]], dtype=torch.int32)
    made = plan(case.shape, requests, budgets, case.cos, case.sin)
    out = torch.empty(len(case.qkv), 4, 64)
    for layer in range(2):
        decode(library, made, layer, case.qkv, case.store, case.summaries, out, window=None)
    assert made.diagnostics[0, :, ::2, 5].tolist() == [[124, 700], [90, 90]]
    assert made.diagnostics[1, :, ::2, 5].tolist() == [[252, 124], [90, 90]]


def test_operands_that_do_not_fit_are_refused(library: Library) -> None:
    with pytest.raises(ValueError, match="Pages of 24"):
        SparseShape(4, 2, 64, 24, 1.0, torch.float32, Rule.MEAN)
    with pytest.raises(ValueError, match="sizes to 256"):
        SparseShape(4, 2, 12, 16, 1.0, torch.float32, Rule.MEAN)
    with pytest.raises(ValueError, match="17 heads on 1"):
        SparseShape(17, 1, 64, 16, 1.0, torch.float32, Rule.MEAN)
    with pytest.raises(ValueError, match="at least 0 and 1"):
        SparseShape(4, 2, 64, 16, 1.0, torch.float32, Rule.MEAN, num_recent=0)
    with pytest.raises(ValueError, match="40 slots"):
        make_summaries(Rule.MEAN, 2, 40, 64)
    case = SparseCase([17, 40], (4, 2, 64, 64))
    good = torch.full((1, 2, 2), 16, dtype=torch.int32)
    with pytest.raises(ValueError, match="17 tokens does not fit 1 pages of 16"):
        plan(case.shape, [(0, 17, [3]), (1, 1, [4])], good, case.cos, case.sin)
    with pytest.raises(ValueError, match="Row 4"):
        plan(case.shape, [(4, 16, [3]), (1, 1, [4])], good, case.cos, case.sin)
    with pytest.raises(ValueError, match="at least 1"):
        plan(case.shape, [(0, 16, [3]), (1, 1, [4])], good * 0, case.cos, case.sin)
    with pytest.raises(ValueError, match="cos and sin"):
        plan(case.shape, [(0, 16, [3]), (1, 1, [4])], good, case.cos.double(), case.sin)
    for runs in ([(0, 10**6)], [(5, 5)], [(-16, 3)], [(0, 8), (8, 16)]):
        with pytest.raises(ValueError, match="Slots"):
            summarize(library, case.store, case.summaries, runs)
    case.summaries = make_summaries(Rule.MEAN, 2, case.store.shape[2], 64)
    with pytest.raises(ValueError, match="do not fit"):
        case.run(library, 16)


def test_a_summary_takes_the_bytes_it_says() -> None:
    for rule in Rule:
        summaries = make_summaries(rule, 3, 160, 64)
        assert summaries.codes.nbytes + summaries.steps.nbytes == 3 * 10 * summary_bytes(64, rule)
