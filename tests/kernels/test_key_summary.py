"""Summaries against the exact planes of their keys."""

import math

import pytest
import torch
from quick_summary import summarize_quickly
from sparse_case import slots_of

from vashista.kernels.key_summary import Rule, decode_summaries, make_level, summarize, summarize_reference
from vashista.kernels.requirements import KernelInputError
from vashista.kernels.triton_guard import INTERPRETED

SHAPES = [(64, 16, 16), (80, 32, 32), (96, 64, 64), (128, 64, 32), (256, 64, 64), (64, 128, 128)]


def check(level, case, request=0, kv_head=0):
    """Each stored plane is the exact one to half a step; a box holds every key, and the radius reaches every one."""
    length = case.context_lens[request]
    keys = case.k_clean[case.table[request].long(), kv_head].flatten(0, 1)[:length].double()
    units = keys.split(level.unit_tokens)
    first, second = decode_summaries(level, case.table[request], kv_head, len(units))
    for unit, chunk in enumerate(units):
        exact_first, exact_second = summarize_reference(chunk, level.rule)
        largest = exact_first.abs().max() / 127
        if level.rule == Rule.BOX:
            slack = 1e-6 * chunk.abs().max()
            assert (first[unit] >= chunk - slack).all()
            assert (second[unit] <= chunk + slack).all()
            assert (first[unit] - exact_first <= 1.001 * largest + slack).all()
            assert (exact_second - second[unit] <= 1.001 * exact_second.abs().max() / 127 + slack).all()
            continue
        assert ((first[unit] - exact_first).abs() <= 0.501 * largest + 1e-30).all()
        radius = level.steps[case.table[request, unit * level.unit_tokens // case.page_size], kv_head].double()
        radius = radius[unit % (case.page_size // level.unit_tokens), 2]
        farthest = (chunk - first[unit]).norm(dim=1).max()
        assert farthest <= radius <= 1.0001 * farthest + 1e-17
        if level.rule == Rule.MEAN_VARIANCE:
            # half of a seventh, and what rounding the table to integers adds
            off = (second[unit].sqrt() - exact_second.sqrt()).abs()
            assert (off <= 0.083 * exact_second.max().sqrt() + 1e-6 * chunk.abs().max()).all()


@pytest.mark.parametrize("rule", list(Rule), ids=lambda rule: rule.name)
@pytest.mark.parametrize(("head_dim", "page_size", "unit"), SHAPES)
def test_summaries_are_the_planes_of_the_keys_to_half_a_step(paged, rule, head_dim, page_size, unit):
    case = paged([2 * page_size + 21], head_dim=head_dim, page_size=page_size, num_kv_heads=1).poison()
    levels = [make_level(case.k_clean, rule, size) for size in {16, unit}]
    for level in levels:
        summarize(case.k_cache, slots_of(case), level)
        check(level, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_token_major", [False, True])
def test_both_levels_are_written_in_one_call_for_any_dtype_and_strides(paged, dtype, is_token_major):
    case = paged([70, 0, 64, 1], page_size=64, dtype=dtype, is_token_major=is_token_major).poison()
    levels = make_level(case.k_clean, Rule.MEAN_VARIANCE, 16), make_level(case.k_clean, Rule.MEAN_VARIANCE, 64)
    summarize(case.k_cache, slots_of(case), *levels)
    for level in levels:
        for request in (0, 2, 3):
            check(level, case, request, kv_head=1)


@pytest.mark.skipif(not INTERPRETED, reason="compares with Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 64), (80, 16), (256, 128)])
def test_what_other_tests_make_by_numpy_are_the_same_bits(paged, dtype, head_dim, page_size):
    case = paged([page_size + 21, 0, 16, 1, 33], head_dim=head_dim, page_size=page_size, dtype=dtype)
    case.k_clean[int(case.table[4, 0]), 1] = 0
    slots = slots_of(case, every=16)
    for unit in {16, min(page_size, 64)}:
        one, two = (make_level(case.k_clean, Rule.MEAN_VARIANCE, unit) for _ in range(2))
        for level in (one, two):
            for part in (*level.planes, level.steps):
                part.fill_(77)
        summarize(case.k_clean, slots, one)
        summarize_quickly(case.k_clean, slots, two)
        for part, other in zip((*one.planes, one.steps), (*two.planes, two.steps), strict=True):
            assert torch.equal(part, other)


def test_the_last_token_of_each_group_is_enough_to_write_all_summaries(paged):
    case = paged([150, 0, 64, 1], page_size=64)
    levels = []
    for every in (1, 16):
        two = [make_level(case.k_clean, Rule.MEAN_VARIANCE, unit) for unit in (16, 64)]
        for level in two:
            for part in (*level.planes, level.steps):
                part.fill_(77)
        summarize(case.k_clean, slots_of(case, every=every), *two)
        levels.append(two)
    for one, other in zip(*levels, strict=True):
        assert all(map(torch.equal, (*one.planes, one.steps), (*other.planes, other.steps)))


@pytest.mark.parametrize("rule", list(Rule), ids=lambda rule: rule.name)
def test_token_after_token_gives_the_bits_of_all_at_once_whatever_the_page_held(paged, rule):
    case = paged([35], page_size=32, num_kv_heads=1).poison()
    slots = slots_of(case)
    pages = case.table[0, :2].long()
    levels = []
    for chunks in ([slots], slots.split(1), slots.split(7)):
        level = make_level(case.k_clean, rule, 16)
        for plane in level.planes:
            plane.random_(0, 256)
        level.steps.fill_(math.nan)
        for chunk in chunks:
            summarize(case.k_cache, chunk, level)
        levels.append([part[pages].flatten(0, 2)[:3] for part in (*level.planes, level.steps)])
    for parts in levels[1:]:
        assert all(map(torch.equal, parts, levels[0]))


def test_padding_tokens_and_other_pages_are_left_alone(paged):
    case = paged([20, 20], num_kv_heads=1).poison()
    level = make_level(case.k_clean, Rule.MEAN_VARIANCE, 16)
    for plane in level.planes:
        plane.fill_(99)
    level.steps.fill_(5.0)
    mine = slots_of(case, {0})
    padding = torch.full((3,), -1, dtype=torch.int64, device=case.device)
    summarize(case.k_cache, torch.cat((padding, mine, padding)), level)
    check(level, case)
    others = torch.ones(len(level.first), dtype=torch.bool, device=case.device)
    others[case.table[0, :2].long()] = False
    assert all((plane[others] == 99).all() for plane in level.planes)
    assert (level.steps[others] == 5.0).all()


@pytest.mark.parametrize("rule", list(Rule), ids=lambda rule: rule.name)
@pytest.mark.parametrize("kind", ["equal", "outlier", "denormal", "zero"])
def test_adversarial_keys_are_summarised_finitely(paged, rule, kind):
    case = paged([40], num_kv_heads=1)
    if kind == "equal":
        case.k_clean[:] = case.k_clean[:1, :, :1]
    elif kind == "outlier":
        case.k_clean[..., 3] = 3e4
    elif kind == "denormal":
        case.k_clean *= 1e-41
    else:
        case.k_clean *= 0
    case.poison()
    level = make_level(case.k_clean, rule, 16)
    summarize(case.k_cache, slots_of(case), level)
    if kind in {"equal", "outlier"}:
        check(level, case)
    first, second = decode_summaries(level, case.table[0], 0, 3)
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()


def test_sizes_that_cannot_be_summarised_are_named(device):
    cache = torch.zeros(2, 1, 64, 72, device=device)
    with pytest.raises(KernelInputError, match=r"head_dim is 72; summaries need a multiple of 16"):
        make_level(cache, Rule.MEAN, 16)
    with pytest.raises(KernelInputError, match=r"a unit of 128 tokens was asked for; .* 16 to 64"):
        make_level(cache[..., :64], Rule.MEAN, 128)
    level = make_level(cache[..., :64], Rule.MEAN, 16)
    with pytest.raises(KernelInputError, match=r"the summary's first plane has shape"):
        summarize(cache[:1, :, :, :64], torch.zeros(1, dtype=torch.int64, device=device), level)
