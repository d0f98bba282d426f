"""Inputs and judgement of the kernel tests; they run in Triton's interpreter, or on a GPU where there is one."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from cpu_kernels import library, threads  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from vashista.kernels import triton_guard

NEED_TRITON = {
    "test_paged_decode.py",
    "test_paged_prefill.py",
    "test_rope_write.py",
    "test_compile.py",
    "test_gpu.py",
    "test_key_summary.py",
    "test_unit_select.py",
    "test_sparse_decode.py",
    "test_sparse_gpu.py",
    "test_support_sums.py",
}
# bfloat16: rounding the output alone costs 1.7e-3; prefill also rounds the weights, as FlashAttention does
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 2.5e-3}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, and say why."""
    for item in items:
        if item.path.parent.name != "kernels":
            continue
        if item.path.name in NEED_TRITON and triton_guard.triton is None:
            item.add_marker(pytest.mark.skip(reason="the triton package is not installed"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: the GPU, else the interpreter's CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert triton_guard.INTERPRETED, "triton was imported before TRITON_INTERPRET=1 was set: set it for the whole run"
    return torch.device("cpu")


@dataclass
class Paged:
    """Requests' keys and values in shuffled pages; `clean` caches for the reference, poisoned ones for the kernel."""

    context_lens: list[int]
    head_dim: int = 64
    num_kv_heads: int = 2
    group: int = 4
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    is_token_major: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        """Draw the caches, then poison what no query of the last positions may see."""
        used = [-(-length // self.page_size) for length in self.context_lens]
        num_pages = sum(used) + 3
        order = torch.randperm(num_pages - 1, device=self.device).int() + 1
        self.table = torch.zeros(len(used), max(used, default=0) + 2, dtype=torch.int32, device=self.device)
        self.lens = torch.tensor(self.context_lens, dtype=torch.int32, device=self.device)
        first = 0
        for request, count in enumerate(used):
            self.table[request, :count] = order[first : first + count]
            first += count
        self.k_clean, self.v_clean = self._draw(num_pages), self._draw(num_pages)
        self.k_cache, self.v_cache = self.k_clean, self.v_clean

    def _draw(self, num_pages: int) -> torch.Tensor:
        shape = (num_pages, self.num_kv_heads, self.page_size, self.head_dim)
        if not self.is_token_major:
            return torch.randn(shape, device=self.device).to(self.dtype)
        wide = torch.randn(num_pages, self.page_size, self.num_kv_heads, self.head_dim + 8, device=self.device)
        return wide.to(self.dtype).transpose(1, 2)[..., : self.head_dim]

    def poison(self, num_queries: list[int] | None = None) -> "Paged":
        """NaN in every slot outside the contexts and windows, page 0 (all NaN) in the table's unused entries."""
        is_live = torch.zeros(self.k_clean.shape[0], self.page_size, dtype=torch.bool, device=self.device)
        poisoned_table = torch.zeros_like(self.table)
        for request, length in enumerate(self.context_lens):
            queries = 1 if num_queries is None else num_queries[request]
            low = 0 if self.window is None else max(length - queries - self.window + 1, 0)
            position = torch.arange(low, length, device=self.device)
            pages = self.table[request, position // self.page_size].long()
            is_live[pages, position % self.page_size] = True
            poisoned_table[request, position // self.page_size] = pages.int()
        mask = ~is_live[:, None, :, None]
        self.k_cache = self._masked(self.k_clean, mask)
        self.v_cache = self._masked(self.v_clean, mask)
        self.poisoned_table = poisoned_table
        return self

    @staticmethod
    def _masked(cache: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """A copy with the same strides."""
        copy = torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=cache.device)
        return copy.copy_(cache).masked_fill_(mask, math.nan)

    def draw_queries(self, num_rows: int) -> torch.Tensor:
        """[num_rows, num_heads, head_dim], a strided view of a wider qkv tensor."""
        num_heads = self.num_kv_heads * self.group
        qkv = torch.randn(num_rows, num_heads + 2 * self.num_kv_heads, self.head_dim, device=self.device)
        return qkv.to(self.dtype)[:, :num_heads]


@pytest.fixture
def paged(device: torch.device) -> Callable[..., Paged]:
    """Makes a `Paged` on the device, from a fixed seed."""
    torch.manual_seed(20)

    def make(context_lens: list[int], **options: object) -> Paged:
        return Paged(context_lens, device=device, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def judge() -> Callable[..., None]:
    """Asserts ||out - reference|| <= tolerance * ||reference||, over all rows, and twice that in each row."""

    def check(out: torch.Tensor, reference: torch.Tensor, tolerance: float | None = None) -> None:
        tolerance = TOLERANCES[out.dtype] if tolerance is None else tolerance
        assert out.shape == reference.shape
        assert torch.isfinite(out).all(), "the output holds NaN or infinity"
        error = out.double() - reference
        assert error.norm() <= tolerance * reference.norm(), f"error {error.norm() / reference.norm():.2e}"
        rows, expected = error.flatten(1).norm(dim=1), reference.flatten(1).norm(dim=1)
        assert (rows <= 2 * tolerance * expected).all(), f"worst row {(rows / expected.clamp_min(1e-300)).max():.2e}"

    return check
