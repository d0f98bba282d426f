"""Paged CPU attention against a float64 reference: chunks, scattered pages, windows, poison in unused slots."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vashista.engine.attention.dense_cpu import DenseCpuAttention
from vashista.engine.attention.interface import AttentionShape
from vashista.engine.attention.prompt_cpu import clip_runs, merge, page_runs
from vashista.engine.step import Span, StepInput
from vashista.kernels.cpu import library as cpu_library

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
@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_requests_in_any_chunks_on_any_pages_equal_the_reference(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, rotary: int, window: int | None, chunks: list[int],
    kernels: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if kernels == "torch":
        monkeypatch.setattr(cpu_library, "load", lambda: None)
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


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_a_step_mixes_prompt_chunks_and_single_queries_in_any_order(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "torch":
        monkeypatch.setattr(cpu_library, "load", lambda: None)
    torch.manual_seed(0)
    heads, kv_heads, dim = 4, 2, 16
    attention = make_attention(heads, kv_heads, dim, torch.float32, None)
    sizes, pages = [20, 1, 37, 1, 3], [[4, 9], [8], [1, 2, 0], [5], [7]]
    data = [torch.randn(size + 1, heads + 2 * kv_heads, dim) for size in sizes]
    angles = torch.arange(64).unsqueeze(1) * torch.logspace(0, -4, dim // 2)
    outputs: list[list[torch.Tensor]] = [[] for _ in data]
    for parts in ([(0, 20), (0, 1), (0, 37), (0, 1), (0, 3)], [(20, 21), (1, 2), (37, 38), (1, 2), (3, 4)]):
        starts = [0, *itertools.accumulate(end - start for start, end in parts)]
        spans = [Span(at, end - start, end, own) for at, (start, end), own in zip(starts, parts, pages, strict=False)]
        positions = torch.cat([torch.arange(start, end) for start, end in parts])
        attention.begin(
            StepInput(positions, positions, spans, positions), angles[positions].cos(), angles[positions].sin()
        )
        qkv = torch.cat([own[start:end] for own, (start, end) in zip(data, parts, strict=True)])
        for own, out in zip(
            outputs, attention.forward(0, qkv).split([end - start for start, end in parts]), strict=True
        ):
            own.append(out)
    for qkv, parts_out in zip(data, outputs, strict=True):
        expected = reference(qkv, heads, kv_heads, angles[: len(qkv)], None)
        assert (torch.cat(parts_out).double() - expected).norm() <= LIMITS[torch.float32] * expected.norm()


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
