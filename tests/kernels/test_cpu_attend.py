"""Decode attention on the CPU store: the float64 reference, page and cut borders, windows, poison, hard keys."""

import pytest
import torch
from cpu_kernels import LIMITS

from vashista.kernels.cpu.attend import DecodeShape, decode, plan
from vashista.kernels.cpu.library import Library

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(4, 1, 64, 64), (6, 2, 24, 24), (7, 1, 80, 40), (2, 2, 8, 8), (5, 5, 128, 128), (3, 1, 256, 256)]
"""heads, KV heads, head size, rotated dimensions"""
CUT = 512


class Case:
    """Requests with random caches on scattered pages; everything that is not theirs is NaN."""

    def __init__(
        self, contexts: list[int], shape: tuple[int, int, int, int], dtype: torch.dtype, page: int = 16
    ) -> None:
        torch.manual_seed(sum(contexts))
        self.heads, self.kv_heads, self.dim, self.rotary = shape
        self.page, self.contexts = page, contexts
        counts = [-(-context // page) for context in contexts]
        order = torch.randperm(sum(counts) + 3).tolist()
        self.pages = [[order.pop() for _ in range(count)] for count in counts]
        self.store = torch.full((2, self.kv_heads, (sum(counts) + 3) * page, self.dim), torch.nan, dtype=dtype)
        for context, slots in zip(contexts, self.slots(), strict=True):
            self.store[:, :, slots[:-1]] = torch.randn(2, self.kv_heads, context - 1, self.dim).to(dtype)
        self.qkv = torch.randn(len(contexts) + 2, self.heads + 2 * self.kv_heads, self.dim).to(dtype)
        angles = torch.randn(len(contexts) + 2, self.rotary // 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.rows = torch.randperm(len(contexts) + 2)[: len(contexts)].tolist()

    def slots(self) -> list[torch.Tensor]:
        own = [torch.tensor(pages).unsqueeze(1) * self.page + torch.arange(self.page) for pages in self.pages]
        return [slots.flatten()[:context] for slots, context in zip(own, self.contexts, strict=True)]

    def run(self, library: Library, window: int | None = None, which: list[int] | None = None) -> torch.Tensor:
        chosen = range(len(self.rows)) if which is None else which
        requests = [(self.rows[i], self.contexts[i], self.pages[i]) for i in chosen]
        out = torch.full((len(self.qkv), self.heads, self.dim), torch.nan, dtype=self.store.dtype)
        made = plan(self.shape(), requests, self.cos, self.sin)
        decode(library, made, self.qkv, self.store, out, window=window)
        return out

    def shape(self) -> DecodeShape:
        return DecodeShape(self.heads, self.kv_heads, self.dim, self.page, self.dim**-0.5, self.store.dtype)

    def reference(self, i: int, window: int | None = None) -> torch.Tensor:
        """[heads, dim], float64, with the new key as it was rounded into the store."""
        row, half = self.rows[i], self.rotary // 2
        x = self.qkv[row].double()
        a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        cos, sin = self.cos[row].double(), self.sin[row].double()
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), 1)
        slots = self.slots()[i]
        written = self.store[:, :, slots[-1]].double()
        key = rotated[self.heads : self.heads + self.kv_heads]
        error = (written[0] - key.to(self.store.dtype).double()).norm()
        assert error <= LIMITS[self.store.dtype] * key.norm() + 1e-44  # denormals have no more digits
        assert torch.equal(written[1], x[self.heads + self.kv_heads :])
        seen = slots[max(0, len(slots) - (window or len(slots))) :]
        keys, values = self.store[:, :, seen].double().repeat_interleave(self.heads // self.kv_heads, 1)
        scores = torch.einsum("hd,hkd->hk", rotated[: self.heads], keys) * self.dim**-0.5
        return torch.einsum("hk,hkd->hd", scores.softmax(-1), values)

    def assert_equals_reference(self, out: torch.Tensor, window: int | None = None) -> None:
        for i, row in enumerate(self.rows):
            expected = self.reference(i, window).to(out.dtype).double()
            assert (out[row].double() - expected).norm() <= LIMITS[out.dtype] * expected.norm(), self.contexts[i]
        untouched = [row for row in range(len(self.qkv)) if row not in self.rows]
        assert out[untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_contexts_around_page_and_cut_borders_equal_the_reference(
    library: Library, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    case = Case([1, 2, 15, 16, 17, 63, 64, 65, 130, CUT - 1, CUT, CUT + 1, 2 * CUT + 77], shape, dtype)
    case.assert_equals_reference(case.run(library))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 5, 16, 64, 600, 5000])
def test_a_window_hides_older_keys(library: Library, dtype: torch.dtype, window: int) -> None:
    case = Case([1, 5, 6, 65, CUT, CUT + 4, CUT + 5, CUT + 600, 1300], (4, 2, 24, 24), dtype, page=64)
    case.assert_equals_reference(case.run(library, window), window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_request_has_the_same_bits_in_every_batch_on_every_page_and_thread(
    library: Library, dtype: torch.dtype
) -> None:
    case = Case([1300, 40, 700, 513], (6, 2, 64, 64), dtype)
    together = case.run(library)
    before = torch.get_num_threads()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for i, row in enumerate(case.rows):
            assert torch.equal(case.run(library, which=[i])[row], together[row])
    torch.set_num_threads(before)
    moved, source = case.store.clone(), case.slots()
    case.pages = [pages[::-1] for pages in case.pages]
    for old, new in zip(source, case.slots(), strict=True):
        moved[:, :, new] = case.store[:, :, old]
    case.store = moved
    again = case.run(library)
    for row in case.rows:
        assert torch.equal(again[row], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.0, 1e-41, 1e3, 1e15])
def test_equal_denormal_and_huge_keys(library: Library, dtype: torch.dtype, factor: float) -> None:
    case = Case([700, 33], (4, 2, 16, 16), dtype)
    case.store[0] = (case.store[0].double() * factor).to(dtype)
    case.qkv[:, case.heads : case.heads + case.kv_heads] *= factor
    case.assert_equals_reference(case.run(library))


def test_a_nan_among_the_keys_reaches_the_result_of_its_head_alone(library: Library) -> None:
    case = Case([100, 1100], (4, 2, 16, 16), torch.float32)
    case.store[0, 1, case.slots()[1][3], 5] = torch.nan
    out = case.run(library)
    assert out[case.rows[0]].isfinite().all()
    assert out[case.rows[1], :2].isfinite().all()
    assert out[case.rows[1], 2:].isnan().all()


def test_operands_that_do_not_fit_are_refused(library: Library) -> None:
    case = Case([5], (2, 1, 16, 16), torch.float32)
    for requests, said in (
        ([(0, 17, [3])], "17 tokens does not fit 1 pages of 16"),
        ([(0, 0, [3])], "0 tokens"),
        ([(3, 5, [0])], "Row 3 is not one of the step's 3"),
    ):
        with pytest.raises(ValueError, match=said):
            plan(case.shape(), requests, case.cos, case.sin)
    case.cos = case.cos.double()
    with pytest.raises(ValueError, match=r"cos and sin are torch\.float64"):
        case.run(library)
    case = Case([5], (2, 1, 16, 16), torch.float32)
    case.qkv = case.qkv[:, 1:]
    with pytest.raises(ValueError, match="do not fit together"):
        case.run(library)
    with pytest.raises(ValueError, match="12"):
        Case([5], (2, 1, 12, 12), torch.float32).shape()
