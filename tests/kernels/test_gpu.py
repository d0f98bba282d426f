"""What needs a real device: large caches, long contexts, CUDA graphs, several programs at work at once."""

import math

import pytest
import torch

from vashista.kernels import triton_guard
from vashista.kernels.paged_decode import _paged_decode_kernel, paged_decode, paged_decode_reference
from vashista.kernels.paged_prefill import paged_prefill, paged_prefill_reference
from vashista.kernels.rope_write import rope_and_write

pytestmark = pytest.mark.gpu
TOLERANCE = 2.5e-3


def relative_error(out, reference):
    assert torch.isfinite(out).all()
    return ((out.double() - reference).norm() / reference.norm()).item()


def make(lens, num_pages):
    """bfloat16 caches of `num_pages` pages, requests' pages drawn from all of them, queries."""
    torch.manual_seed(0)
    page_size, num_kv_heads, num_heads, head_dim = 64, 8, 32, 128
    caches = [
        torch.randn(num_pages, num_kv_heads, page_size, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    ]
    table = torch.zeros(len(lens), max(-(-length // page_size) for length in lens), dtype=torch.int32, device="cuda")
    order = torch.randperm(num_pages, device="cuda").int()
    first = 0
    for row, length in enumerate(lens):
        count = -(-length // page_size)
        table[row, :count] = order[first : first + count]
        first += count
    q = torch.randn(len(lens), num_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    return q, *caches, table, torch.tensor(lens, dtype=torch.int32, device="cuda")


def test_the_kernels_are_compiled_here():
    assert not triton_guard.INTERPRETED


def test_a_cache_of_more_than_two_to_the_31_elements_is_addressed():
    page_elements = 8 * 64 * 128
    num_pages = 2**31 // page_elements + 5000
    q, k_cache, v_cache, table, lens = make([1000, 77], num_pages)
    assert k_cache.numel() > 2**31
    table[0, :16] = torch.arange(num_pages - 16, num_pages, device="cuda").int()
    slot = torch.tensor([int(table[0, 15]) * 64 + 39, -1], device="cuda")
    angles = torch.ones(2, 64, device="cuda")
    k, v = torch.randn(2, 2, 8, 128, device="cuda", dtype=torch.bfloat16)
    rope_and_write(q, k, v, angles, angles * 0, k_cache, v_cache, slot)  # cos 1, sin 0: no rotation
    assert torch.equal(k_cache[table[0, 15].long(), :, 39], k[0])
    assert torch.equal(v_cache[table[0, 15].long(), :, 39], v[0])
    expected, _ = paged_decode_reference(q, k_cache, v_cache, table, lens, scale=0.1)
    assert relative_error(paged_decode(q, k_cache, v_cache, table, lens, scale=0.1), expected) < TOLERANCE
    chunk = torch.randn(120, 32, 128, device="cuda", dtype=torch.bfloat16)
    starts = torch.tensor([0, 100, 120], dtype=torch.int32, device="cuda")
    expected = paged_prefill_reference(chunk, k_cache, v_cache, table, starts, lens, scale=0.1)
    out = paged_prefill(chunk, k_cache, v_cache, table, starts, lens, scale=0.1, max_query_len=100)
    assert relative_error(out, expected) < TOLERANCE


@pytest.mark.parametrize(
    "lens", [[131_072], [131_071, 1, 0, 500], [4097] * 40, [1] * 300], ids=["one", "mixed", "forty", "many"]
)
@pytest.mark.parametrize("window", [None, 4096])
def test_decode_of_long_and_many_contexts(lens, window):
    case = make(lens, sum(-(-length // 64) for length in lens) + 7)
    lse = torch.full((len(lens), 32), math.nan, device="cuda")
    out = paged_decode(*case, scale=128**-0.5, window=window, lse=lse)
    expected, expected_lse = paged_decode_reference(*case, scale=128**-0.5, window=window)
    assert relative_error(out, expected) < 2e-3
    assert torch.allclose(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_prefill_of_long_chunks(window, softcap):
    lens, counts = [5000, 3000, 700, 64], [1500, 3000, 1, 64]
    _, k_cache, v_cache, table, context_lens = make(lens, 200)
    q = torch.randn(sum(counts), 32, 128, device="cuda", dtype=torch.bfloat16)
    starts = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
    options = {"scale": 128**-0.5, "window": window, "softcap": softcap}
    out = paged_prefill(q, k_cache, v_cache, table, starts, context_lens, max_query_len=3000, **options)
    expected = paged_prefill_reference(q, k_cache, v_cache, table, starts, context_lens, **options)
    assert relative_error(out, expected) < TOLERANCE


def test_a_graph_of_decode_follows_lengths_and_pages_put_into_its_inputs():
    q, k_cache, v_cache, table, lens = make([3000, 1, 10, 64], 100)
    out, lse = torch.empty_like(q), torch.empty(4, 32, device="cuda")
    paged_decode(q, k_cache, v_cache, table, lens, scale=0.1, out=out, lse=lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_decode(q, k_cache, v_cache, table, lens, scale=0.1, out=out, lse=lse)
    for new_lens in ([1, 3000, 0, 17], [64, 65, 63, 3008], [0, 0, 0, 0]):
        lens.copy_(torch.tensor(new_lens))
        table.copy_(torch.randint(0, 100, table.shape))
        q.normal_()
        out.fill_(math.nan)
        graph.replay()
        expected, _ = paged_decode_reference(q, k_cache, v_cache, table, lens, scale=0.1)
        assert (out.double() - expected).norm() <= 2e-3 * expected.norm()
        assert torch.isfinite(out).all()


def test_a_graph_of_prefill_follows_the_chunks_put_into_its_inputs():
    _, k_cache, v_cache, table, lens = make([500, 300], 100)
    q = torch.randn(256, 32, 128, device="cuda", dtype=torch.bfloat16)
    starts = torch.tensor([0, 200, 256], dtype=torch.int32, device="cuda")
    out = torch.empty_like(q)
    paged_prefill(q, k_cache, v_cache, table, starts, lens, scale=0.1, max_query_len=256, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_prefill(q, k_cache, v_cache, table, starts, lens, scale=0.1, max_query_len=256, out=out)
    for split in (1, 128, 255):
        starts[1] = split
        out.fill_(math.nan)
        graph.replay()
        expected = paged_prefill_reference(q, k_cache, v_cache, table, starts, lens, scale=0.1)
        assert relative_error(out, expected) < TOLERANCE


def test_other_lengths_and_batches_compile_nothing_new():
    q, k_cache, v_cache, table, lens = make([300] * 17, 100)
    paged_decode(q, k_cache, v_cache, table, lens, scale=0.1)
    compiled = sum(len(caches[0]) for caches in _paged_decode_kernel.device_caches.values())
    for num_requests in (1, 2, 16):
        rows = slice(0, num_requests)
        paged_decode(q[rows], k_cache, v_cache, table[rows, :num_requests], lens[rows].clamp(max=60), scale=0.1)
    assert sum(len(caches[0]) for caches in _paged_decode_kernel.device_caches.values()) == compiled


def test_repeated_runs_give_the_same_bits():
    case = make([20_000, 700, 3], 400)
    first = paged_decode(*case, scale=0.1)
    assert all(torch.equal(paged_decode(*case, scale=0.1), first) for _ in range(20))
