"""Sinks plus the newest tokens on a GPU: what it keeps and says, beside the CPU's module and the rule in torch."""

from __future__ import annotations

import math

import pytest
import torch

from vashista.engine.attention.interface import Attention, AttentionShape
from vashista.engine.attention.rules import Groups, dropped_mass, group_scores, keep, logits_of
from vashista.engine.attention.sparse_cpu import SparseCpuAttention
from vashista.engine.attention.sparse_triton import SparseTritonAttention
from vashista.engine.errors import SettingsError
from vashista.engine.step import EVERYTHING, Selection, Span, StepInput
from vashista.engine.support import SpanSupport
from vashista.engine.support_profile import Rule
from vashista.kernels import paged_decode
from vashista.kernels.cpu import library as cpu_library
from vashista.kernels.cpu.sparse import Rule as CpuRule
from vashista.kernels.triton_guard import INTERPRETED, triton

pytestmark = pytest.mark.skipif(triton is None, reason="the triton package is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, DIM, PAGE, WINDOWS = 4, 2, 64, 16, (None, 102)
PROMPTS = (168, 37, 130)
BUDGETS = torch.tensor([[112, 128], [EVERYTHING, 16]], dtype=torch.int32)
"""[layer, KV head]; 16 is less than sinks and recent tokens take."""
AUDITS = [(0, 0), (0, 1), (1, 1)]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after the other."""
    if INTERPRETED:
        monkeypatch.setattr(paged_decode, "PROGRAMS_PER_MULTIPROCESSOR", 1)


def shape_on(device: torch.device, dim: int = DIM) -> AttentionShape:
    return AttentionShape(2, HEADS, KV_HEADS, dim, dim**-0.5, PAGE, WINDOWS, torch.float32, device)


def pages_of(index: int) -> list[int]:
    return list(range(24 * index, 24 * index + 24))[::-1]


def decode_spans(selections: dict[int, Selection]) -> list[Span]:
    """A token of each request, of which those in `selections` are sparse."""
    return [Span(i, 1, length + 1, pages_of(i), selections.get(i)) for i, length in enumerate(PROMPTS)]


def angles_of(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions[:, None] * torch.logspace(0, -3, DIM // 2, device=positions.device)
    return angles.cos(), angles.sin()


def begin(attention: Attention, spans: list[Span], device: torch.device) -> None:
    positions = torch.cat([torch.arange(span.start, span.context_len) for span in spans]).to(device)
    attention.begin(StepInput(positions, positions, spans, positions[:0]), *angles_of(positions))


def qkv_of(num_tokens: int, seed: int) -> torch.Tensor:
    """[layers, num_tokens, heads, head_dim]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(WINDOWS), num_tokens, HEADS + 2 * KV_HEADS, DIM, generator=generator)


def play(
    attention: Attention, selections: dict[int, Selection], device: torch.device
) -> tuple[list[torch.Tensor], list[SpanSupport]]:
    """Reads the prompts, then decodes a token of each: that step's outputs of each layer, and its support."""
    attention.allocate(24 * len(PROMPTS))
    starts = [sum(PROMPTS[:i]) for i in range(len(PROMPTS))]
    prompts = [Span(starts[i], length, length, pages_of(i)) for i, length in enumerate(PROMPTS)]
    outs: list[torch.Tensor] = []
    for seed, spans in enumerate((prompts, decode_spans(selections))):
        begin(attention, spans, device)
        qkv = qkv_of(sum(span.num_queries for span in spans), seed).to(device)
        outs = [attention.forward(layer, qkv[layer].clone()).cpu() for layer in range(len(WINDOWS))]
    return outs, attention.take_support()


def on_gpu() -> SparseTritonAttention:
    return SparseTritonAttention("sinks_recent", None, shape_on(DEVICE))


def same(ours: SpanSupport, theirs: SpanSupport) -> None:
    assert (ours.num_dense, ours.tokens_attended, ours.tokens_visible) == (
        theirs.num_dense, theirs.tokens_attended, theirs.tokens_visible,
    )  # fmt: skip
    for name in ("dropped_mass_bound", "dropped_mass_estimate", "support_gap"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), nan_ok=True)
    assert [(audit.layer, audit.kv_head) for audit in ours.audits] == [(a.layer, a.kv_head) for a in theirs.audits]
    for one, other in zip(ours.audits, theirs.audits, strict=True):
        assert one.dropped_mass == pytest.approx(other.dropped_mass, abs=1e-5)
        assert one.effective_support == pytest.approx(other.effective_support, rel=1e-4)
        assert one.support_90 == pytest.approx(other.support_90, abs=1)


def test_it_keeps_and_says_what_the_module_of_the_cpu_does() -> None:
    if cpu_library.load() is None:
        pytest.skip("no compiled kernels here")
    selections = {0: Selection(BUDGETS, AUDITS), 2: Selection(BUDGETS, [])}
    theirs = SparseCpuAttention("sinks_recent", CpuRule.WINDOW, shape_on(torch.device("cpu")))
    outs, supports = play(on_gpu(), selections, DEVICE)
    expected, reported = play(theirs, selections, torch.device("cpu"))
    for out, right in zip(outs, expected, strict=True):
        assert (out - right).norm() <= 1e-5 * right.norm()
    assert len(supports) == len(reported) == 2
    for ours, other in zip(supports, reported, strict=True):
        same(ours, other)


def test_it_keeps_what_the_rule_says_and_audits_what_that_loses() -> None:
    attention = on_gpu()
    outs, (support,) = play(attention, {0: Selection(BUDGETS, AUDITS)}, DEVICE)
    length, lost = PROMPTS[0] + 1, {}
    for layer, window in enumerate(WINDOWS):
        first = 0 if window is None else length - window
        keys, values = (x.cpu().double()[:, first:] for x in attention.read_cache(layer, pages_of(0), length))
        assert attention._sparse is not None
        query = attention._sparse.queries[layer, 0].cpu().double()
        groups = Groups(length - first, first)
        scores = group_scores(Rule.WINDOW, query, keys, DIM**-0.5, groups)
        kept = keep(scores, BUDGETS[layer].tolist(), groups)
        logits = logits_of(query, keys, DIM**-0.5)
        is_kept = kept[:, groups.of_tokens()].repeat_interleave(HEADS // KV_HEADS, 0)
        p = logits.masked_fill(~is_kept, -math.inf).softmax(1).view(KV_HEADS, -1, length - first)
        expected = (p @ values).view(-1)
        assert (outs[layer][0].double() - expected).norm() <= 1e-5 * expected.norm()
        for head, mass in enumerate(dropped_mass(logits, kept, groups).view(KV_HEADS, -1).amax(1).tolist()):
            lost[layer, head] = mass
    assert [audit.dropped_mass for audit in support.audits] == pytest.approx([lost[pair] for pair in AUDITS], abs=1e-5)
    assert min(lost[pair] for pair in AUDITS) > 0.1
    assert support.num_dense == 1
    assert support.dropped_mass_bound == 3.0  # nothing is known of three head-steps
    assert math.isnan(support.dropped_mass_estimate)
    assert math.isnan(support.support_gap)


def test_fixed_tensors_give_what_a_step_gives_and_padding_nothing() -> None:
    attention = on_gpu()
    selections = {0: Selection(BUDGETS, AUDITS), 2: Selection(BUDGETS, [])}
    outs, supports = play(attention, selections, DEVICE)
    spans, rows = decode_spans(selections), 4
    fixed = attention.fix(attention.graph_key(spans, rows), rows)
    positions = torch.tensor([*PROMPTS, 0], device=DEVICE)
    attention.use(fixed, *angles_of(positions))
    attention.fill(fixed, spans)
    qkv = qkv_of(len(PROMPTS), 1).to(DEVICE)
    for layer, expected in enumerate(outs):
        padded = torch.cat((qkv[layer], qkv[layer][:1]))
        assert torch.equal(attention.forward(layer, padded)[:3].cpu(), expected)
    for ours, theirs in zip(attention.take_support(), supports, strict=True):
        same(ours, theirs)


def test_it_keeps_no_summaries_and_serves_the_shapes_of_the_others() -> None:
    assert on_gpu().page_bytes() == shape_on(DEVICE).page_bytes
    with pytest.raises(SettingsError, match="head_dim is 24; summaries need"):
        SparseTritonAttention("sinks_recent", None, shape_on(DEVICE, dim=24))
