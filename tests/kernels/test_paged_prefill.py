"""Paged prefill against the float64 reference."""

import math

import pytest
import torch

from vashista.kernels.paged_decode import paged_decode
from vashista.kernels.paged_prefill import (
    choose_prefill_tile,
    paged_prefill,
    paged_prefill_reference,
    paged_prefill_triton,
)
from vashista.kernels.paged_tile import TileShape

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    # head_dim, KV heads, group, page size, (context length, queries) of each request
    (64, 2, 4, 16, [(1, 1), (17, 17), (40, 7), (5, 0), (130, 64)]),
    (128, 1, 4, 64, [(65, 65), (128, 1), (63, 30)]),
    (16, 1, 1, 16, [(100, 100)]),
    (24, 2, 5, 32, [(33, 33), (70, 9)]),
    (80, 1, 7, 256, [(258, 20)]),
    (256, 1, 2, 64, [(66, 10)]),
    (40, 1, 20, 128, [(129, 6), (3, 3)]),
]


def starts_of(counts, device):
    return torch.tensor([0, *counts], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def prefill(paged, counts, q, **options):
    """The kernel on poisoned caches, into a poisoned output."""
    paged.poison(counts)
    out = torch.full(q.shape, math.nan, dtype=q.dtype, device=q.device)
    options = {"max_query_len": max(*counts, 1)} | options
    returned = paged_prefill(
        q,
        paged.k_cache,
        paged.v_cache,
        paged.poisoned_table,
        starts_of(counts, q.device),
        paged.lens,
        out=out,
        **options,
    )
    assert returned is out
    return out


def reference(paged, counts, q, **options):
    starts = starts_of(counts, q.device)
    return paged_prefill_reference(q, paged.k_clean, paged.v_clean, paged.table, starts, paged.lens, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_agrees_with_the_reference(paged, judge, shape, dtype):
    head_dim, num_kv_heads, group, page_size, requests = shape
    lens, counts = [length for length, _ in requests], [count for _, count in requests]
    case = paged(lens, head_dim=head_dim, num_kv_heads=num_kv_heads, group=group, page_size=page_size, dtype=dtype)
    q = case.draw_queries(sum(counts))
    out = prefill(case, counts, q, scale=head_dim**-0.5)
    judge(out, reference(case, counts, q, scale=head_dim**-0.5))


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("window", [1, 5, 40, 64, 1000])
def test_a_window_hides_what_lies_before_it(paged, judge, window, page_size):
    lens, counts = [1, 70, 200], [1, 70, 33]
    case = paged(lens, head_dim=16, group=2, page_size=page_size, window=window)
    q = case.draw_queries(sum(counts))
    out = prefill(case, counts, q, scale=0.25, window=window)
    judge(out, reference(case, counts, q, scale=0.25, window=window))


def test_a_softcap_bounds_the_logits(paged, judge):
    case = paged([40, 90])
    q = case.draw_queries(60) * 10
    out = prefill(case, [40, 20], q, scale=0.5, softcap=7.0)
    judge(out, reference(case, [40, 20], q, scale=0.5, softcap=7.0))


@pytest.mark.parametrize("tile", [TileShape(16, 16, 4, 1), TileShape(32, 64, 4, 2), TileShape(64, 16, 4, 2)], ids=str)
@pytest.mark.parametrize("window", [None, 30])
def test_every_tile_shape_gives_the_same_result(paged, judge, tile, window):
    counts = [45, 3]
    case = paged([77, 100], head_dim=16, group=3, page_size=32, window=window).poison(counts)
    q = case.draw_queries(48)
    out = paged_prefill_triton(
        q, case.k_cache, case.v_cache, case.poisoned_table, starts_of(counts, q.device), case.lens,
        scale=0.25, max_query_len=45, window=window, tile=tile,
    )  # fmt: skip
    judge(out, reference(case, counts, q, scale=0.25, window=window))


@pytest.mark.parametrize("max_query_len", [1, 10_000])
def test_a_wrong_max_query_len_changes_nothing_but_the_tile(paged, judge, max_query_len):
    case = paged([50, 20])
    q = case.draw_queries(40)
    out = prefill(case, [30, 10], q, scale=0.125, max_query_len=max_query_len)
    judge(out, reference(case, [30, 10], q, scale=0.125))


def test_chunks_give_what_the_whole_prompt_gives(paged, judge):
    case = paged([90], head_dim=32, group=2)
    q = case.draw_queries(90)
    whole = prefill(case, [90], q, scale=0.2)
    parts = []
    for begin, end in ((0, 7), (7, 8), (8, 64), (64, 90)):
        case.lens.fill_(end)
        starts = starts_of([end - begin], q.device)
        part = q[begin:end]
        parts.append(
            paged_prefill(
                part, case.k_clean, case.v_clean, case.table, starts, case.lens, scale=0.2, max_query_len=len(part)
            )
        )
    judge(torch.cat(parts), whole.double(), 5e-6)


def test_one_query_a_request_gives_what_decode_gives(paged, judge):
    case = paged([90, 1, 16, 33])
    q = case.draw_queries(4)
    out = prefill(case, [1, 1, 1, 1], q, scale=0.125)
    decoded = paged_decode(q, case.k_clean, case.v_clean, case.table, case.lens, scale=0.125)
    judge(out, decoded.double(), 5e-6)


def test_rows_of_no_request_stay_and_rows_of_an_empty_context_are_zero(paged, judge):
    counts = [6, 2, 0]
    case = paged([20, 0, 0])
    q = case.draw_queries(13)
    out = prefill(case, counts, q, scale=0.125)
    judge(out[:6], reference(case, counts, q, scale=0.125)[:6])
    assert (out[6:8] == 0).all()
    assert out[8:].isnan().all()


def test_token_major_caches_and_strided_outputs_are_respected(paged, judge):
    counts = [20, 5]
    case = paged([37, 64], is_token_major=True).poison(counts)
    q = case.draw_queries(25)
    wide = torch.full((25, 8, 100), math.nan, device=q.device)
    paged_prefill(
        q, case.k_cache, case.v_cache, case.poisoned_table, starts_of(counts, q.device), case.lens,
        scale=0.125, max_query_len=20, out=wide[..., 4:68],
    )  # fmt: skip
    judge(wide[..., 4:68].contiguous(), reference(case, counts, q, scale=0.125))
    assert wide[..., :4].isnan().all()
    assert wide[..., 68:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key_with_a_huge_logit_takes_all_the_mass_of_later_queries(paged, judge, dtype):
    case = paged([60], num_kv_heads=1, dtype=dtype)
    page = int(case.table[0, 1])
    q = case.draw_queries(60).abs() + 1
    case.k_clean[page, 0, 4] = 100.0  # position 20
    out = prefill(case, [60], q, scale=3.0)
    assert torch.equal(out[20:], case.v_clean[page, 0, 4].expand(40, 4, 64))
    assert not torch.equal(out[19], out[20])


def test_a_query_group_larger_than_the_tile_gets_a_tile_that_holds_it(device):
    q = torch.zeros(4, 100, 64, dtype=torch.float32, device=device)
    assert choose_prefill_tile(q, 100, 1).rows >= 100


def test_no_tokens_give_an_empty_output(paged):
    case = paged([5])
    q = case.draw_queries(0)
    starts = torch.zeros(2, dtype=torch.int32, device=q.device)
    out = paged_prefill(q, case.k_clean, case.v_clean, case.table, starts, case.lens, scale=0.125, max_query_len=1)
    assert out.shape == (0, 8, 64)
