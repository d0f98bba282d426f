"""Paged decode against the float64 reference."""

import math

import pytest
import torch

from vashista.kernels import paged_decode as module
from vashista.kernels.paged_decode import count_programs, paged_decode, paged_decode_reference, paged_decode_triton
from vashista.kernels.paged_tile import TileShape, fit_keys
from vashista.kernels.requirements import KernelInputError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    # head_dim, KV heads, group, page size, context lengths
    (64, 2, 4, 16, [1, 15, 16, 17, 0, 33]),
    (128, 1, 4, 64, [63, 64, 65, 200]),
    (16, 1, 1, 16, [100, 0, 0]),
    (24, 2, 5, 32, [31, 33, 1]),
    (80, 1, 16, 256, [255, 257]),
    (256, 1, 3, 64, [70]),
    (40, 1, 20, 128, [129, 5]),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}


@pytest.fixture
def short_runs(monkeypatch):
    """Lets small contexts be split over several programs."""
    monkeypatch.setattr(module, "MIN_RUN_KEYS", 16)


def decode(paged, q, **options):
    """The kernel on poisoned caches, into poisoned outputs: (out, lse)."""
    paged.poison()
    out = torch.full(q.shape, math.nan, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], math.nan, device=q.device)
    returned = paged_decode(
        q, paged.k_cache, paged.v_cache, paged.poisoned_table, paged.lens, out=out, lse=lse, **options
    )
    assert returned is out
    return out, lse


def reference(paged, q, **options):
    return paged_decode_reference(q, paged.k_clean, paged.v_clean, paged.table, paged.lens, **options)


def check_lse(lse, expected):
    """Compare log-sum-exps, where -inf must meet -inf."""
    is_empty = expected == -math.inf
    assert ((lse == -math.inf) == is_empty).all()
    assert torch.allclose(lse.double()[~is_empty], expected[~is_empty], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_lse_agree_with_the_reference(paged, judge, short_runs, shape, dtype):
    head_dim, num_kv_heads, group, page_size, lens = shape
    case = paged(lens, head_dim=head_dim, num_kv_heads=num_kv_heads, group=group, page_size=page_size, dtype=dtype)
    q = case.draw_queries(len(lens))
    out, lse = decode(case, q, scale=head_dim**-0.5)
    expected, expected_lse = reference(case, q, scale=head_dim**-0.5)
    judge(out, expected, TOLERANCE[dtype])
    check_lse(lse, expected_lse)


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("window", [1, 16, 50, 1000])
def test_a_window_hides_what_lies_before_it(paged, judge, short_runs, window, page_size):
    case = paged([1, 49, 50, 51, 180], page_size=page_size, window=window)
    q = case.draw_queries(5)
    out, lse = decode(case, q, scale=0.125, window=window)
    expected, expected_lse = reference(case, q, scale=0.125, window=window)
    judge(out, expected)
    check_lse(lse, expected_lse)


def test_a_softcap_bounds_the_logits(paged, judge, short_runs):
    case = paged([40, 90])
    q = case.draw_queries(2) * 10
    out, lse = decode(case, q, scale=0.5, softcap=7.0)
    expected, expected_lse = reference(case, q, scale=0.5, softcap=7.0)
    judge(out, expected)
    check_lse(lse, expected_lse)
    assert (lse <= 7.0 + math.log(90) + 1e-4).all()


def test_token_major_caches_and_strided_outputs_are_respected(paged, judge):
    case = paged([37, 64, 20], is_token_major=True).poison()
    q = case.draw_queries(3)
    wide = torch.full((3, 8, 100), math.nan, device=q.device)
    paged_decode(q, case.k_cache, case.v_cache, case.poisoned_table, case.lens, scale=0.125, out=wide[..., 4:68])
    judge(wide[..., 4:68].contiguous(), reference(case, q, scale=0.125)[0])
    assert wide[..., :4].isnan().all()
    assert wide[..., 68:].isnan().all()


@pytest.mark.parametrize(("programs", "keys", "long_run"), [(1, 16, 4096), (3, 64, 4096), (10, 16, 4096), (2, 16, 64)])
def test_any_split_gives_the_same_result(paged, judge, monkeypatch, programs, keys, long_run):
    monkeypatch.setattr(module, "LONG_RUN_KEYS", long_run)
    monkeypatch.setattr(module, "MIN_RUN_KEYS", 16)
    monkeypatch.setattr(module, "PROGRAMS_PER_MULTIPROCESSOR", programs)
    case = paged([300, 0, 5, 90], head_dim=16, group=2).poison()
    q = case.draw_queries(4)
    out = paged_decode_triton(
        q, case.k_cache, case.v_cache, case.poisoned_table, case.lens, scale=0.3, tile=TileShape(16, keys, 4, 2)
    )
    judge(out, reference(case, q, scale=0.3)[0])


def test_more_requests_than_the_padding_of_64(paged, judge):
    lens = torch.randint(0, 40, (70,), generator=torch.Generator().manual_seed(3)).tolist()
    case = paged(lens, head_dim=16, num_kv_heads=1, group=1)
    q = case.draw_queries(70)
    out, _ = decode(case, q, scale=0.25)
    judge(out, reference(case, q, scale=0.25)[0])


def test_a_context_longer_than_max_context_is_still_attended_whole(paged, judge, short_runs):
    case = paged([200, 3])
    q = case.draw_queries(2)
    out, _ = decode(case, q, scale=0.125, max_context=16)
    judge(out, reference(case, q, scale=0.125)[0])


def test_short_contexts_take_fewer_programs(device):
    q = torch.zeros(2, 8, 64, device=device)
    assert count_programs(q, 2, 10, 64)[0] == 4 + 4
    assert count_programs(q, 2, None, 64)[0] > 4 + 4


def test_the_tile_shrinks_until_shared_memory_holds_it_and_says_when_nothing_fits(device):
    q = torch.zeros(1, 128, 128, device=device)
    assert fit_keys(32, 128, q, 227 << 10) == 32
    assert fit_keys(32, 128, q, 99 << 10) == 16
    with pytest.raises(
        KernelInputError, match=r"128 query rows of 512 bytes do not fit into this device's 65536 bytes"
    ):
        fit_keys(32, 128, q, 64 << 10)


def test_padding_rows_are_zero(paged):
    case = paged([0, 0, 0])
    out, lse = decode(case, case.draw_queries(3), scale=0.125)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_an_empty_batch_gives_an_empty_output(paged):
    case = paged([5]).poison()
    q = case.draw_queries(0)
    out = paged_decode(q, case.k_cache, case.v_cache, case.table[:0], case.lens[:0], scale=0.125)
    assert out.shape == (0, 8, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_keys_give_the_mean_of_the_values(paged, judge, short_runs, dtype):
    case = paged([100, 17], dtype=dtype)
    case.k_clean[:] = case.k_clean[:1, :, :1]
    q = case.draw_queries(2)
    out, _ = decode(case, q, scale=0.125)
    judge(out, reference(case, q, scale=0.125)[0], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, 50, 99])
def test_one_key_with_a_huge_logit_takes_all_the_mass(paged, short_runs, position, dtype):
    case = paged([100], num_kv_heads=1, dtype=dtype)
    page, slot = int(case.table[0, position // 16]), position % 16
    q = case.draw_queries(1).abs() + 1
    case.k_clean[page, 0, slot] = 100.0
    out, lse = decode(case, q, scale=3.0)
    assert (lse > 1e4).all()
    assert torch.equal(out[0], case.v_clean[page, 0, slot].expand(4, 64))


def test_very_negative_logits_still_sum_to_one(paged, judge, short_runs):
    case = paged([100])
    case.v_clean[:] = 1.0
    q = case.draw_queries(1) * 1000
    out, _ = decode(case, q, scale=1.0)
    judge(out, torch.ones_like(out, dtype=torch.float64), 1e-6)


def test_inputs_are_left_as_they_are(paged):
    case = paged([33, 20]).poison()
    q = case.draw_queries(2)
    before = [t.clone() for t in (q, case.k_cache, case.v_cache, case.poisoned_table, case.lens)]
    paged_decode(q, case.k_cache, case.v_cache, case.poisoned_table, case.lens, scale=0.125)
    for tensor, copy in zip((q, case.k_cache, case.v_cache, case.poisoned_table, case.lens), before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())
