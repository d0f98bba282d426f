"""Paged CPU attention against a float64 reference: chunks, scattered pages, windows, poison in unused slots."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vashista.engine.attention.dense_cpu import DenseCpuAttention, clip_runs, merge, page_runs
from vashista.engine.attention.interface import AttentionShape
from vashista.engine.step import Span, StepInput

PAGE = 16
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Relative error; bfloat16 includes the rounding of rotated keys and queries, half a unit in the last of 8 bits."""


def make_attention(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int | None) -> DenseCpuAttention:
    shape = AttentionShape(1, heads, kv_heads, dim, dim**-0.5, PAGE, (window,), dtype, torch.device("cpu"))
    attention = DenseCpuAttention(shape)
    attention.allocate(40)
    attention._store[0].fill_(torch.nan)
    return attention


def reference(qkv: torch.Tensor, heads: int, kv_heads: int, angles: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whole-context causal attention of one request in float64. qkv: [tokens, heads + 2 kv_heads, dim]."""
    qkv = qkv.double()
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    half = angles.shape[-1]
    cos, sin = angles.double().cos().unsqueeze(1), angles.double().sin().unsqueeze(1)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

    q, k = rotated(q), rotated(k).repeat_interleave(heads // kv_heads, 1)
    v = v.repeat_interleave(heads // kv_heads, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    distance = torch.arange(len(q)).unsqueeze(1) - torch.arange(len(q))
    hidden = (distance < 0) | (distance >= (window or len(q)))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary"), [(4, 2, 64, 64), (6, 2, 24, 24), (3, 3, 80, 40)])
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("chunks", [[1] * 9, [7, 1, 24, 1], [33, 2, 15, 16, 17, 1, 1]])
def test_requests_in_any_chunks_on_any_pages_equal_the_reference(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, rotary: int, window: int | None, chunks: list[int]
) -> None:
    torch.manual_seed(0)
    attention = make_attention(heads, kv_heads, dim, dtype, window)
    total = sum(chunks)
    page_lists = [[5, 6, 7, 1, 0, 30, 31][: -(-total // PAGE)], [20, 12, 13, 14, 9, 10, 39][: -(-total // PAGE)]]
    data = [torch.randn(total, heads + 2 * kv_heads, dim).to(dtype) for _ in page_lists]
    angles = torch.arange(total).unsqueeze(1) * torch.logspace(0, -4, rotary // 2)
    outputs: list[list[torch.Tensor]] = [[], []]
    for end, size in zip(itertools.accumulate(chunks), chunks, strict=True):
        positions = torch.arange(end - size, end)
        spans = [Span(i * size, size, end, pages) for i, pages in enumerate(page_lists)]
        both = positions.repeat(2)
        step = StepInput(both, both, spans, both)
        attention.begin(step, angles[both].cos(), angles[both].sin())
        out = attention.forward(0, torch.cat([qkv[positions] for qkv in data]))
        for i in range(2):
            outputs[i].append(out[i * size : (i + 1) * size])
    for qkv, parts in zip(data, outputs, strict=True):
        expected = reference(qkv, heads, kv_heads, angles, window)
        error = (torch.cat(parts).double() - expected).norm() / expected.norm()
        assert error <= LIMITS[dtype]


def test_merging_parts_equals_attention_to_all_keys() -> None:
    scores, values = torch.randn(3, 12, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    parts = []
    for keys in (slice(0, 1), slice(1, 8), slice(8, 12)):
        parts.append((scores[:, keys].softmax(-1) @ values[keys], scores[:, keys].logsumexp(-1)))
    torch.testing.assert_close(merge(parts), scores.softmax(-1) @ values)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True), st.data())
def test_runs_cover_exactly_the_tokens_in_order(pages: list[int], data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(1, len(pages) * PAGE))
    first = data.draw(st.integers(0, num_tokens))
    last = data.draw(st.integers(first, num_tokens))
    slots = [page * PAGE + offset for page in pages for offset in range(PAGE)]
    runs = page_runs(pages, num_tokens, PAGE)
    assert [slot for start, end in runs for slot in range(start, end)] == slots[:num_tokens]
    assert all(end != start for (_, end), (start, _) in itertools.pairwise(runs))
    clipped = clip_runs(runs, first, last)
    assert [slot for start, end in clipped for slot in range(start, end)] == slots[first:last]
