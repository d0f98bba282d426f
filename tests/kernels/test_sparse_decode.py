"""Sparse decode against the float64 reference: output, log-sum-exp, kept groups and masses."""

import math

import pytest
import torch
from sparse_case import SparseCase, slots_of

from vashista.kernels import paged_decode as dense
from vashista.kernels import selection, sparse_attend, unit_score
from vashista.kernels.key_summary import Rule, summarize
from vashista.kernels.paged_decode import paged_decode
from vashista.kernels.requirements import KernelInputError
from vashista.kernels.selection import ScoreOptions, make_selection
from vashista.kernels.sparse_decode import make_plan, resize_plan, sparse_decode
from vashista.kernels.triton_guard import INTERPRETED, jit, tl
from vashista.kernels.unit_score import count_wanted, deal_tiles, score_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}
SHAPES = [
    # head_dim, KV heads, group, page size, context lengths
    (64, 2, 4, 16, [1, 15, 16, 17, 0, 133]),
    (128, 1, 4, 64, [63, 64, 65, 300]),
    (80, 1, 16, 32, [255, 257]),
    (96, 2, 3, 64, [129]),
    (256, 1, 1, 64, [190]),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one after the other: a few show every path."""
    if INTERPRETED:
        monkeypatch.setattr(unit_score, "PROGRAMS_PER_MULTIPROCESSOR", 1)
        monkeypatch.setattr(dense, "PROGRAMS_PER_MULTIPROCESSOR", 1)


RULES = pytest.mark.parametrize("rule", list(Rule), ids=lambda rule: rule.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_lse_and_kept_groups_agree_with_the_reference(paged, judge, shape, dtype):
    head_dim, num_kv_heads, group, page_size, lens = shape
    case = paged(lens, head_dim=head_dim, num_kv_heads=num_kv_heads, group=group, page_size=page_size, dtype=dtype)
    SparseCase(case, 64).check(judge, TOLERANCE[dtype])


@RULES
@pytest.mark.parametrize(("is_sum", "candidates"), [(False, 128), (True, None)])
def test_every_rule_with_and_without_a_coarse_level(paged, judge, rule, is_sum, candidates):
    case = paged([330, 17], page_size=64, num_kv_heads=1)
    SparseCase(
        case, 64, rule, coarse_unit=64 if candidates else None, candidates=candidates, options={"is_sum": is_sum}
    ).check(judge)


@pytest.mark.parametrize(
    ("window", "page_size", "options"),
    [(None, 64, {}), (None, 16, {"num_sinks": 40, "num_recent": 30}), (100, 32, {}), (41, 64, {"num_sinks": 0})],
    ids=str,
)
def test_without_levels_sinks_and_the_newest_groups_are_kept(paged, judge, window, page_size, options):
    case = paged([700, 1, 0, 97, 256], num_kv_heads=2, window=window, page_size=page_size)
    budgets = torch.tensor([[64, 512], [64, 64], [16, 16], [96, 80], [16, 300]])
    sparse = SparseCase(case, budgets, None, options=options)
    sparse.check(judge)
    kept, mass = sparse.kept(), sparse.plan.fine.mass
    if window is None:
        num_sinks = -(-sparse.plan.options.num_sinks // 16)
        newest = 4 - num_sinks if num_sinks == 1 else 3  # 30 recent tokens touch three groups
        assert kept[0] == [*range(num_sinks), *range(44 - newest, 44)]
        assert kept[1] == [*range(num_sinks), *range(44 - 32 + num_sinks, 44)]
    for row, groups in zip(mass, kept, strict=True):
        if groups:
            assert row[3] == math.inf
            assert row[:3].isnan().all()
        else:
            assert (row == -math.inf).all()


def test_a_coarse_level_that_keeps_every_unit_gives_what_the_fine_one_gives(paged):
    case = paged([250, 5], page_size=64, num_kv_heads=1)
    flat, tall = SparseCase(case, 48), SparseCase(case, 48, coarse_unit=32, candidates=256)
    tall.q.copy_(flat.q)
    assert torch.equal(flat.run()[0], tall.run()[0])
    assert flat.kept() == tall.kept()
    # the same numbers, summed up in blocks of other sizes
    torch.testing.assert_close(flat.plan.fine.mass, tall.plan.fine.mass, rtol=1e-6, atol=1e-6)


@jit()
def _deal_kernel(
    dealt, context_lens, budgets, window, max_coarse, num_candidates, per_kept, full_context, num_sinks, num_recent,
    num_kv_heads, HAS_WINDOW: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Of each pair what the level of 16 below one of 64 deals out: (candidates, tiles of 16 of them)."""
    pair = tl.program_id(0)
    high, budget = tl.load(context_lens + pair // num_kv_heads), tl.load(budgets + pair)
    wanted = count_wanted(high, budget, max_coarse, num_candidates, per_kept, full_context, 64)
    _, _, num_items, num_tiles, _ = deal_tiles(
        high, budget, window, wanted, max_coarse, num_sinks, num_recent, 99, 16, 16, 4, HAS_WINDOW
    )
    tl.store(dealt + 2 * pair, num_items)
    tl.store(dealt + 2 * pair + 1, num_tiles)


@pytest.mark.parametrize("window", [None, 200])
def test_candidates_follow_each_pairs_own_budget_and_context(paged, judge, window):
    case = paged([400, 333, 200, 129, 90], page_size=64, num_kv_heads=2, window=window)
    budgets = torch.tensor([[32, 96], [128, 0], [96, 500], [64, 48], [48, 96]])
    sparse = SparseCase(case, budgets, coarse_unit=64, candidates=512)
    plan = make_plan(
        sparse.q, case.k_cache, sparse.levels, ScoreOptions(**sparse.options), max_context=sparse.plan.max_context,
        max_budget=512, max_candidate_tokens=512, candidates_per_kept=2, full_context=200,
    )  # fmt: skip
    sparse.plan = plan
    sparse.check(judge)
    assert plan.coarse is not None
    opened = plan.coarse.num_kept.view(5, 2).tolist()
    if window is None:
        # the unit of the sinks and those of the recent 16 are always opened
        assert [opened[0], opened[2][0], opened[3], opened[4][0]] == [[2, 3], 4, [3, 3], 2]
    # the next level has as many tiles as what is opened fills, dealt out before anything is
    dealt = torch.full((10, 2), -1, dtype=torch.int32, device=case.device)
    options = plan.options
    _deal_kernel[(10,)](
        dealt, case.lens, sparse.budgets, window or 0, plan.coarse.units.shape[1], plan.num_candidates, 2, 200,
        options.num_sinks, options.num_recent, 2, HAS_WINDOW=window is not None,
    )  # fmt: skip
    visible = [min(length, window or length) for length in case.context_lens for _ in range(2)]
    is_sparse = sparse.budgets.flatten() < torch.tensor(visible, device=case.device)
    assert (dealt[is_sparse, 0] == 4 * plan.coarse.num_kept[is_sparse]).all()
    assert torch.equal(dealt[:, 1], torch.where(is_sparse, -(-dealt[:, 0] // 16), 0))
    assert 2 <= is_sparse.sum() < 10


@pytest.mark.parametrize(("window", "coarse_unit"), [(16, None), (50, 32), (150, 32), (150, None), (1000, None)])
def test_a_window_hides_what_lies_before_it(paged, judge, window, coarse_unit):
    case = paged([1, 50, 51, 253], page_size=32, window=window, num_kv_heads=1)
    SparseCase(case, 48, coarse_unit=coarse_unit, candidates=64 if coarse_unit else None).check(judge)


@RULES
def test_a_softcap_bounds_logits_and_scores(paged, judge, rule):
    case = paged([200, 90], num_kv_heads=1)
    sparse = SparseCase(case, 48, rule, options={"softcap": 3.0, "scale": 0.5})
    sparse.q.mul_(2)
    sparse.check(judge)
    assert (sparse.plan.fine.scores[0, :13] <= 2 * 3.0 + 50 + math.log(16)).all()


@pytest.mark.parametrize("programs", [2, 5])
def test_any_split_gives_the_same_set_and_result(paged, judge, monkeypatch, programs):
    monkeypatch.setattr(unit_score, "PROGRAMS_PER_MULTIPROCESSOR", programs)
    monkeypatch.setattr(dense, "PROGRAMS_PER_MULTIPROCESSOR", programs)
    monkeypatch.setattr(sparse_attend, "SPARSE_RUN_TILES", 2)
    SparseCase(paged([1500, 0, 40], head_dim=64, num_kv_heads=1, group=1), 256).check(judge)


@pytest.mark.parametrize(
    ("dtype", "window"), [(torch.float32, None), (torch.bfloat16, 40), (torch.float16, None)], ids=str
)
def test_budgets_that_cover_the_context_give_the_bits_of_paged_decode(paged, monkeypatch, dtype, window):
    monkeypatch.setattr(dense, "MIN_RUN_KEYS", 16)
    case = paged([1, 64, 0, 65, 300], dtype=dtype, window=window, page_size=64)
    sparse = SparseCase(case, 300)
    out, lse = sparse.run()
    expected_lse = torch.empty_like(lse)
    expected = paged_decode(
        sparse.q, case.k_cache, case.v_cache, case.poisoned_table, case.lens, scale=case.head_dim**-0.5, window=window,
        lse=expected_lse, max_context=sparse.plan.max_context,
    )  # fmt: skip
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert sparse.kept() == [[]] * 10
    assert (sparse.plan.fine.mass == -math.inf).all()


def test_each_request_and_kv_head_has_its_own_budget(paged, judge):
    case = paged([200, 200, 200], num_kv_heads=2)
    sparse = SparseCase(case, torch.tensor([[32, 200], [199, 0], [500, 64]]))
    sparse.check(judge)
    # 0 and 32 are less than the sink and the two groups that the recent 16 tokens touch
    assert [len(groups) for groups in sparse.kept()] == [3, 0, 12, 3, 0, 4]


def test_sinks_and_the_recent_window_are_kept_whatever_they_score(paged, judge):
    case = paged([260], num_kv_heads=1)
    sparse = SparseCase(case, 96, options={"num_sinks": 20, "num_recent": 30})
    case.k_clean[case.table[0, :2].long()] = -sparse.q[0, 0] * 9
    case.k_clean[case.table[0, 14:17].long()] = -sparse.q[0, 0] * 9
    again = SparseCase(case, 96, options={"num_sinks": 20, "num_recent": 30})
    again.q.copy_(sparse.q)
    again.check(judge)
    assert {0, 1, 14, 15, 16} <= set(again.kept()[0])
    assert len(again.kept()[0]) == 6


@pytest.mark.parametrize(("rule", "dtype"), list(zip(Rule, DTYPES, strict=True)), ids=str)
def test_equal_keys_keep_the_lowest_groups(paged, judge, rule, dtype):
    case = paged([210], num_kv_heads=1, dtype=dtype)
    case.k_clean[:] = case.k_clean[:1, :, :1]
    sparse = SparseCase(case, 96, rule)
    sparse.check(judge, TOLERANCE[dtype])
    # the last group has 2 tokens and the one before lies in the recent 16: both are kept
    assert sparse.kept()[0] == [0, 1, 2, 3, 12, 13]


@RULES
@pytest.mark.parametrize("position", [20, 209])
def test_one_key_with_a_huge_logit_is_found_and_takes_all_the_mass(paged, rule, position):
    case = paged([210], num_kv_heads=1, group=4)
    sparse = SparseCase(case, 64, rule)
    case.k_clean[case.table[0, position // 16].long(), 0, position % 16] = 500.0 * sparse.q[0, 0].sign()
    again = SparseCase(case, 64, rule)
    again.q.copy_(sparse.q[:, :1].expand(-1, 4, -1))
    out, _ = again.run()
    assert position // 16 in again.kept()[0]
    page = case.table[0, position // 16].long()
    assert torch.equal(out[0, 0], case.v_clean[page, 0, position % 16])


@pytest.mark.parametrize("kind", ["denormal", "outlier", "immense"])
def test_adversarial_keys_give_finite_outputs_and_exact_sets(paged, judge, kind):
    case = paged([230], num_kv_heads=1)
    if kind == "denormal":
        case.k_clean *= 1e-41
    elif kind == "outlier":
        case.k_clean[..., 5] *= 1e4
    else:
        case.k_clean *= 1e15
    sparse = SparseCase(case, 64)
    out, _ = sparse.run()
    assert torch.isfinite(out).all()
    assert len(sparse.kept()[0]) == 4
    sparse.check(judge)


@RULES
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_masses_are_those_of_the_scores(paged, rule, softcap):
    case = paged([333], num_kv_heads=1, page_size=64)
    sparse = SparseCase(case, 64, rule, options={"softcap": softcap})
    sparse.run()
    exact = score_reference(sparse.q[0], sparse.levels[0], case.table[0], 0, 333, sparse.plan.options)
    is_kept = torch.zeros(len(exact), dtype=torch.bool, device=exact.device)
    is_kept[sparse.kept()[0][:-1]] = True  # the newest token's group enters no mass
    exact = exact[:-1]
    is_kept = is_kept[:-1]
    expected = [exact[is_kept].logsumexp(0), exact[~is_kept].logsumexp(0), exact[~is_kept].max()]
    assert torch.allclose(sparse.plan.fine.mass[0, :3].double(), torch.stack(expected), atol=1e-4)


def test_masses_of_two_levels_add_what_the_coarse_one_dropped(paged):
    case = paged([640], num_kv_heads=1, page_size=64)
    sparse = SparseCase(case, 64, coarse_unit=64, candidates=256)
    sparse.run()
    coarse, fine = sparse.plan.coarse, sparse.plan.fine
    options = sparse.plan.options
    pages = score_reference(sparse.q[0], sparse.levels[1], case.table[0], 0, 640, options)
    groups = score_reference(sparse.q[0], sparse.levels[0], case.table[0], 0, 640, options)
    opened = coarse.units[0, : int(coarse.num_kept[0])].long()
    is_opened = torch.isin(torch.arange(10, device=opened.device), opened)
    is_dropped = is_opened.repeat_interleave(4)
    is_dropped[sparse.kept()[0]] = False
    dropped = torch.cat((pages[~is_opened], groups[is_dropped]))
    assert len(opened) == 4
    assert torch.allclose(fine.mass[0, 1:3].double(), torch.stack((dropped.logsumexp(0), dropped.max())), atol=1e-4)


@RULES
def test_a_step_writes_the_summaries_that_summarize_writes(paged, rule):
    case = paged([200, 0, 64, 17], page_size=64, num_kv_heads=1)
    sparse = SparseCase(case, 64, rule, coarse_unit=64, candidates=64)
    slots = torch.tensor([-1 if length == 0 else length - 1 for length in case.context_lens], device=case.device)
    for request, position in enumerate(slots.tolist()):
        if position >= 0:
            slots[request] = int(case.table[request, position // 64]) * 64 + position % 64
    before = [[part.clone() for part in (*level.planes, level.steps)] for level in sparse.levels]
    out = sparse.run()[0].clone()
    for level in sparse.levels:
        for plane in level.planes:
            plane[slots[[0, 2, 3]] // 64] = 77
        level.steps[slots[[0, 2, 3]] // 64] = math.nan
    for level in sparse.levels:  # all but what this step's tokens touch
        summarize(case.k_clean, slots_of(case)[[n for n in range(281) if n not in (199, 263, 280)]], level)
    args = (case.k_cache, case.v_cache), sparse.levels, case.poisoned_table, case.lens, sparse.budgets, sparse.plan
    again = sparse_decode(sparse.q, *args, slots=slots)
    assert torch.equal(again, out)
    live = slots_of(case)
    for level, parts in zip(sparse.levels, before, strict=True):
        unit = live % 64 // level.unit_tokens
        for part, written in zip((*level.planes, level.steps), parts, strict=True):
            assert torch.equal(part[live // 64, :, unit], written[live // 64, :, unit])


def test_a_box_never_scores_below_the_largest_logit_of_its_group(paged):
    case = paged([170], num_kv_heads=1)
    sparse = SparseCase(case, 64, Rule.BOX)
    sparse.run()
    keys = case.k_clean[case.table[0, :11].long(), 0].flatten(0, 1)[:160].view(10, 16, 64)
    largest = torch.einsum("hd,gtd->hgt", sparse.q[0], keys).amax((0, 2)) * sparse.plan.options.scale
    assert (sparse.plan.fine.scores[0, :10] - math.log(16) >= largest - 1e-4).all()


def test_inputs_are_left_as_they_are(paged):
    case = paged([133, 20])
    sparse = SparseCase(case, 48)
    tensors = [sparse.q, case.k_cache, case.v_cache, case.poisoned_table, case.lens, sparse.budgets]
    tensors += [*sparse.levels[0].planes, sparse.levels[0].steps]
    before = [tensor.clone() for tensor in tensors]
    sparse.run()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())


def test_what_does_not_fit_is_named(paged):
    case = paged([100], page_size=64)
    sparse = SparseCase(case, 48, coarse_unit=64, candidates=64)
    caches = (case.k_cache, case.v_cache)
    inputs = (case.table, case.lens, sparse.budgets)
    options = ScoreOptions(scale=0.1)
    with pytest.raises(KernelInputError, match=r"1 levels were given; the plan was made for 2"):
        sparse_decode(sparse.q, caches, sparse.levels[:1], *inputs, sparse.plan)
    twice = [torch.cat((tensor, tensor)) for tensor in (sparse.q, *inputs)]
    with pytest.raises(KernelInputError, match=r"the plan was made for 2 pairs of request and KV head, not 4"):
        sparse_decode(twice[0], caches, sparse.levels, *twice[1:], sparse.plan)
    with pytest.raises(KernelInputError, match=r"candidates were limited, but there is no coarse level"):
        make_plan(
            sparse.q, case.k_cache, sparse.levels[:1], options, max_context=100, max_budget=64, candidates_per_kept=4
        )
    with pytest.raises(KernelInputError, match=r"0 levels were given; the plan was made for 2"):
        sparse_decode(sparse.q, caches, (), *inputs, sparse.plan)
    plain = SparseCase(case, 48, None)
    with pytest.raises(KernelInputError, match=r"1 levels were given; the plan was made for 0"):
        sparse_decode(sparse.q, caches, sparse.levels[:1], *inputs, plain.plan)
    with pytest.raises(KernelInputError, match=r"slots were given, but there are no levels"):
        sparse_decode(sparse.q, caches, (), *inputs, plain.plan, slots=case.lens.long())
    with pytest.raises(KernelInputError, match=r"units of 64 tokens, not 16"):
        make_plan(sparse.q, case.k_cache, sparse.levels[1:], options, max_context=100, max_budget=64)
    with pytest.raises(KernelInputError, match=r"32 candidate tokens cannot hold a budget of 64"):
        make_plan(
            sparse.q, case.k_cache, sparse.levels, options, max_context=100, max_budget=64, max_candidate_tokens=32
        )
    with pytest.raises(KernelInputError, match=r"20 sinks and 16 recent tokens .* at most 16 and 16"):
        resize_plan(sparse.plan, ScoreOptions(scale=0.1, num_sinks=20, num_recent=16))
    with pytest.raises(KernelInputError, match=r"num_recent is 0"):
        ScoreOptions(scale=0.1, num_recent=0)
    with pytest.raises(KernelInputError, match=r"40000 units are to be ranked; at most 32768 are possible"):
        make_selection(1, 40000, 8, case.device, max_forced=1)


def dropped_masses(sparse: SparseCase, request: int, head: int) -> torch.Tensor:
    """log of the mass that each query head of a pair really drops, float64, by its keys; [group]."""
    case, options = sparse.paged, sparse.plan.options
    length, pair = case.context_lens[request], request * case.num_kv_heads + head
    group = sparse.q.shape[1] // case.num_kv_heads
    pages = case.table[request, : -(-length // case.page_size)].long()
    keys = case.k_clean[pages, head].flatten(0, 1)[:length].double()
    logits = sparse.q[request, head * group : (head + 1) * group].double() @ keys.T * options.scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    position = torch.arange(length, device=keys.device)
    is_kept = torch.isin(position // 16, torch.tensor(sparse.kept()[pair], device=keys.device))
    is_kept |= position < (0 if options.window is None else length - options.window)
    return logits.masked_fill(is_kept, -math.inf).logsumexp(1)


KEY_KINDS = ["normal", "outlier", "equal", "dominating", "denormal", "huge", "offset"]


@RULES
@pytest.mark.parametrize("kind", KEY_KINDS)
def test_the_bound_of_the_dropped_mass_is_never_below_it(paged, rule, kind):
    case = paged([333, 90], num_kv_heads=1, page_size=64, dtype=torch.bfloat16 if kind == "offset" else torch.float32)
    keys = case.k_clean
    if kind == "outlier":
        keys[..., 3] *= 3e3
    elif kind == "equal":
        keys[:] = keys[:1, :, :1]
    elif kind == "dominating":
        keys[case.table[0, 2].long(), 0, 7] *= 40
    elif kind == "denormal":
        keys *= 1e-41
    elif kind == "huge":
        keys *= 1e12
    elif kind == "offset":
        keys += 300
    is_tall = kind in {"normal", "dominating"}
    sparse = SparseCase(
        case, 64, rule, coarse_unit=64 if is_tall else None, candidates=128 if is_tall else None,
        options={"softcap": 5.0 if kind == "equal" else None, "window": 200 if kind == "normal" else None},
    )  # fmt: skip
    sparse.run()
    bounds = sparse.plan.fine.mass[:, 3].double()
    for request in range(2):
        assert (dropped_masses(sparse, request, 0) <= bounds[request]).all()
        assert torch.isfinite(bounds[request])


def test_the_bound_is_near_where_the_keys_of_a_group_are_alike(paged):
    case = paged([320], num_kv_heads=1, group=1)
    pages = case.k_clean[case.table[0, :20].long()]
    case.k_clean[case.table[0, :20].long()] = pages[:, :, :1] + 0.001 * pages
    sparse = SparseCase(case, 64)
    sparse.run()
    exact = dropped_masses(sparse, 0, 0)
    assert exact[0] <= sparse.plan.fine.mass[0, 3] <= exact[0] + 0.1
    assert (sparse.plan.fine.mass[0, 1] - exact[0]).abs() <= 0.05


@pytest.mark.parametrize(
    ("rule", "window", "num_sinks"),
    [(Rule.MEAN, 900, 0), (Rule.BOX, None, 20), (Rule.MEAN_VARIANCE, None, 20), (Rule.MEAN_VARIANCE, 900, 0)],
)
def test_a_selection_in_two_steps_gives_what_one_step_gives(paged, judge, monkeypatch, rule, window, num_sinks):
    case = paged([1100, 40, 833], num_kv_heads=1, page_size=64, window=window)
    options = {"num_sinks": num_sinks, "num_recent": 40}
    one = SparseCase(case, 96, rule, options=options)
    monkeypatch.setattr(selection, "ONE_STEP_UNITS", 16)
    two = SparseCase(case, 96, rule, options=options)
    assert (one.plan.fine.part_units, two.plan.fine.part_units) == (0, 4)
    two.q.copy_(one.q)
    one.run()
    two.check(judge)
    assert one.kept() == two.kept()
    assert torch.allclose(one.plan.fine.mass, two.plan.fine.mass, atol=1e-4)


def test_equal_scores_are_kept_from_the_lowest_index_in_two_steps(paged, judge, monkeypatch):
    monkeypatch.setattr(selection, "ONE_STEP_UNITS", 16)
    case = paged([1100], num_kv_heads=1, page_size=64)
    case.k_clean[:] = case.k_clean[:1, :, :1]
    sparse = SparseCase(case, 96)
    sparse.check(judge)
    assert sparse.kept()[0] == [0, 1, 2, 3, 67, 68]


@RULES
def test_the_bound_is_log_two_above_keys_that_lie_along_the_query_half_on_either_side(paged, rule):
    case = paged([320], num_kv_heads=1, group=1)
    sparse = SparseCase(case, 64, rule)
    query = sparse.q[0, 0].clone()
    sign = 1 - 2 * (torch.arange(16, device=case.device) % 2)
    keys = sign[:, None] * query / query.square().sum() * 20 / sparse.plan.options.scale
    case.k_clean[case.table[0, :20].long()] = keys
    again = SparseCase(case, 64, rule)
    again.q[0, 0] = query
    again.run()
    bound, exact = again.plan.fine.mass[0, 3], dropped_masses(again, 0, 0)[0]
    assert exact + 0.69 <= bound <= exact + 0.95
