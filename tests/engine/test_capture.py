"""Capturing attention: what is captured is what the wrapped module attends with, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vashista.engine.attention.capture import Captured, CapturingAttention
from vashista.engine.attention.dense_cpu import DenseCpuAttention
from vashista.engine.attention.dense_triton import DenseTritonAttention
from vashista.engine.attention.interface import Attention, AttentionShape
from vashista.engine.step import Span, StepInput
from vashista.kernels.cpu import library as cpu_library
from vashista.kernels.triton_guard import triton

PAGE = 16
HEADS, KV_HEADS, DIM = 4, 2, 64
PAGES = [7, 2, 3, 9, 5]
CHUNKS = [20, 1, 1, 30, 18]
WATCHED = {0, 19, 20, 21, 40, 69}
LAYERS = 2
NEEDS_TRITON = pytest.mark.skipif(triton is None, reason="the triton package is not installed")
KERNEL_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where the Triton kernels run: the GPU, else the interpreter's CPU."""


def make(kind: type[Any], window: int | None, dtype: torch.dtype) -> tuple[Attention, AttentionShape]:
    device = KERNEL_DEVICE if kind is DenseTritonAttention else torch.device("cpu")
    shape = AttentionShape(LAYERS, HEADS, KV_HEADS, DIM, DIM**-0.5, PAGE, (None, window), dtype, device)
    attention: Attention = kind(shape)
    attention.allocate(12)
    return attention, shape


def run(attention: Attention, shape: AttentionShape) -> dict[tuple[int, int], torch.Tensor]:
    """Outputs by (layer, position) of one request in chunks, on the CPU; the same tokens every time."""
    generator = torch.Generator().manual_seed(0)
    outputs = {}
    start = 0
    for num_tokens in CHUNKS:
        end = start + num_tokens
        positions = torch.arange(start, end, device=shape.device)
        angles = positions[:, None] * torch.logspace(0, -3, DIM // 2, device=shape.device)
        step = StepInput(positions, positions, [Span(0, num_tokens, end, PAGES)], positions[:0])
        attention.begin(step, angles.cos(), angles.sin())
        for layer in range(LAYERS):
            qkv = torch.randn(num_tokens, HEADS + 2 * KV_HEADS, DIM, generator=generator)
            out = attention.forward(layer, qkv.to(shape.device, shape.dtype)).cpu()
            outputs.update({(layer, start + i): out[i].clone() for i in range(num_tokens)})
        start = end
    return outputs


def attended(seen: Captured, scale: float) -> torch.Tensor:
    """Softmax attention of what was captured, float64, on the CPU."""
    keys, values = (x.cpu().double().repeat_interleave(HEADS // KV_HEADS, 0) for x in (seen.keys, seen.values))
    logits = torch.einsum("hd,htd->ht", seen.query.cpu().double(), keys) * scale
    return torch.einsum("ht,htd->hd", logits.softmax(1), values).flatten()


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["compiled", "torch", pytest.param("triton", marks=NEEDS_TRITON)])
def test_captured_queries_keys_and_values_give_the_modules_own_output(
    kind: str, dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "torch":
        monkeypatch.setattr(cpu_library, "load", lambda: None)
    inner, shape = make(DenseTritonAttention if kind == "triton" else DenseCpuAttention, window, dtype)
    captured: list[Captured] = []
    attention = CapturingAttention(inner, shape, captured.append)
    attention.watch(WATCHED)
    outputs = run(attention, shape)
    assert [(seen.layer, seen.position) for seen in captured] == [
        (layer, position)
        for chunk in ({0, 19}, {20}, {21}, {40}, {69})
        for layer in range(LAYERS)
        for position in sorted(chunk)
    ]
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    for seen in captured:
        assert seen.first == (max(0, seen.position + 1 - window) if window and seen.layer == 1 else 0)
        assert seen.keys.shape == seen.values.shape == (KV_HEADS, seen.position + 1 - seen.first, DIM)
        assert seen.query.dtype is seen.keys.dtype is dtype
        expected = attended(seen, shape.scale)
        error = (outputs[seen.layer, seen.position].double() - expected).norm() / expected.norm()
        assert error < limit


def test_the_outputs_are_those_of_the_wrapped_module_to_the_bit() -> None:
    plain = run(*make(DenseCpuAttention, 24, torch.float32))
    inner, shape = make(DenseCpuAttention, 24, torch.float32)
    attention = CapturingAttention(inner, shape, lambda seen: None)
    attention.watch(WATCHED)
    watched = run(attention, shape)
    assert all(torch.equal(plain[place], watched[place]) for place in plain)


def test_nothing_is_read_back_where_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, shape = make(DenseCpuAttention, None, torch.float32)

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(inner, "read_cache", never)
    attention = CapturingAttention(inner, shape, never)
    attention.watch({70, 71})  # beyond the end
    run(attention, shape)
