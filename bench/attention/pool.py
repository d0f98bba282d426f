"""What the attention benchmark runs on: one pool of pages, layers with page tables of their own, a timer of graphs.

Called by `run.py`. A layer's requests take their pages from the pool in shuffled order; the layers of a case share no
page, so that calls on one layer after the other find the L2 cache cold.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vashista.kernels.key_summary import SummaryLevel

ROOT = Path(__file__).resolve().parent.parent.parent


def make_package() -> None:
    """Let `vashista.kernels` be imported from the checkout, not installed: a folder of links on the path."""
    folder = Path(tempfile.mkdtemp())
    (folder / "vashista").mkdir()
    for name in ("engine", "kernels"):
        (folder / "vashista" / name).symlink_to(ROOT / name)
    sys.path.insert(0, str(folder))


@dataclass(frozen=True)
class Shape:
    """The attention of one layer."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token, bfloat16."""
        return 4 * self.num_kv_heads * self.head_dim


class Pool:
    """Caches and summaries of `num_tokens` tokens; every key is random, every summary made by the kernel."""

    def __init__(self, shape: Shape, num_tokens: int) -> None:
        self.shape = shape
        size = (num_tokens // shape.page_size, shape.num_kv_heads, shape.page_size, shape.head_dim)
        self.keys = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        self.values = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        self.levels: tuple[SummaryLevel, ...] = ()
        """Groups of 16, and larger units if asked for."""

    def summarize(self, rule: str, coarse_unit: int | None) -> None:
        """Rank by this rule from now on; WINDOW keeps sinks and the newest groups, and has no levels."""
        from vashista.kernels.key_summary import Rule, make_level, summarize

        self.levels = ()
        if rule == "WINDOW":
            return
        self.levels = tuple(make_level(self.keys, Rule[rule], unit) for unit in (16, coarse_unit) if unit)
        num_tokens = self.keys.shape[0] * self.shape.page_size
        for begin in range(0, num_tokens, 1 << 20):
            slots = torch.arange(begin, min(begin + (1 << 20), num_tokens), device="cuda")
            summarize(self.keys, slots, *self.levels)

    def layers(self, batch: int, context: int, count: int) -> list[Layer]:
        """`count` layers of `batch` requests of `context` tokens."""
        pages = -(-context // self.shape.page_size)
        order = torch.randperm(self.keys.shape[0], device="cuda")[: count * batch * pages].int()
        return [Layer(self, table) for table in order.view(count, batch, pages)]


class Layer:
    """One layer's queries, page table and slots of the step's tokens."""

    def __init__(self, pool: Pool, table: torch.Tensor) -> None:
        shape, batch = pool.shape, table.shape[0]
        self.table = table
        context = table.shape[1] * shape.page_size
        self.lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.q = torch.randn(batch, shape.num_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
        self.out = torch.full_like(self.q, float("nan"))
        self.lse = torch.full((batch, shape.num_heads), float("nan"), device="cuda")
        self.slots = table[:, -1].long() * shape.page_size + shape.page_size - 1


def time_us(call: Callable[[Layer], object], layers: list[Layer], repeats: int = 15) -> float:
    """Median microseconds a layer of a CUDA graph that calls every layer once."""
    for layer in layers[:2]:
        call(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            call(layer)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(layers))
    return sorted(times)[len(times) // 2]
