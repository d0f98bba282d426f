"""Recorded programs of CPU kernels: the bits of the calls one by one, whatever the rows and threads."""

import pytest
import torch
from cpu_kernels import LIMITS
from sparse_cpu_case import SparseCase

from vashista.kernels.cpu import attend, sparse
from vashista.kernels.cpu.library import Library
from vashista.kernels.cpu.linear import linear, record_linear
from vashista.kernels.cpu.norm import record_rms_norm, rms_norm
from vashista.kernels.cpu.program import Program

DTYPES = list(LIMITS)
MAX_ROWS = 9


class Chain:
    """x += gate(norm(x) W1) W2, then a norm of some heads in place, then a last product; in both ways."""

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        torch.manual_seed(7)
        self.library = library
        self.w1, self.w2, self.w3 = (
            (torch.randn(*size) / 8).to(dtype) for size in ((2 * 200, 96), (96, 200), (51, 96))
        )  # fmt: skip
        self.bias, self.norm, self.head_norm = (torch.randn(n).to(dtype) for n in (51, 96, 24))
        self.x = torch.zeros(MAX_ROWS, 96, dtype=dtype)
        self.gated = torch.full((MAX_ROWS, 200), torch.nan, dtype=dtype)
        self.y = torch.full((MAX_ROWS, 51), torch.nan, dtype=dtype)
        self.program = Program(library, 4, MAX_ROWS, 200)
        record_linear(self.program, self.x, self.w1, out=self.gated, norm=self.norm, eps=1e-6, gated=True)
        record_linear(self.program, self.gated, self.w2, residual=self.x, out=self.x)
        heads = self.x.view(MAX_ROWS, 4, 24)[:, 1:3]
        record_rms_norm(self.program, heads, self.head_norm, 1e-5, heads)
        record_linear(self.program, self.x, self.w3, self.bias, out=self.y)

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.x[: len(x)] = x
        self.program.run(len(x))
        return self.x[: len(x)].clone(), self.y[: len(x)].clone()

    def expected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gated = linear(self.library, x, self.w1, norm=self.norm, eps=1e-6, gated=True)
        x = linear(self.library, gated, self.w2, residual=x)
        heads = x.view(len(x), 4, 24)[:, 1:3]
        heads.copy_(rms_norm(self.library, heads, self.head_norm, 1e-5))
        return x, linear(self.library, x, self.w3, self.bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_program_has_the_bits_of_its_calls_one_by_one(library: Library, dtype: torch.dtype, num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    chain = Chain(library, dtype)
    torch.set_num_threads(before)
    for num_rows in (1, MAX_ROWS, 2, 5, 1):
        x = torch.randn(num_rows, 96).to(dtype)
        for result, expected in zip(chain.run(x), chain.expected(x.clone()), strict=True):
            assert torch.equal(result, expected)


def test_many_runs_of_more_threads_than_cores_end_and_agree(library: Library) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    chain = Chain(library, torch.float32)
    torch.set_num_threads(before)
    x = torch.randn(3, 96)
    expected = chain.expected(x.clone())
    for _ in range(200):
        assert all(torch.equal(a, b) for a, b in zip(chain.run(x), expected, strict=True))


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_in_a_program_reads_each_steps_own_requests(
    library: Library, dtype: torch.dtype, window: int | None
) -> None:
    case = SparseCase([1300, 40, 700, 513], (6, 2, 64, 64), dtype)
    num_rows = len(case.qkv)
    dense_record, record = attend.make_record(case.shape), sparse.make_record(case.shape)
    dense, kept = (torch.full((num_rows, 6, 64), torch.nan, dtype=dtype) for _ in range(2))
    program = Program(library, 2, num_rows, 64)
    sparse.summarize(library, case.store, case.summaries, case.written())
    attend.record_decode(program, case.shape, dense_record, case.qkv, case.store, dense, window=window)
    sparse.record_decode(program, case.shape, record, 0, case.qkv, case.store, case.summaries, kept, window=window)
    for which in ([0, 1, 2, 3], [2], [3, 0]):
        requests = [(case.rows[i], case.contexts[i], case.pages[i]) for i in which]
        budgets = torch.full((1, len(which), 2), 160, dtype=torch.int32)
        plans = (
            attend.plan(case.shape, requests, case.cos, case.sin, dense_record),
            sparse.plan(case.shape, requests, budgets, case.cos, case.sin, record),
        )
        dense.fill_(torch.nan), kept.fill_(torch.nan)
        program.run(1)
        expected = torch.full_like(dense, torch.nan)
        attend.decode(library, plans[0], case.qkv, case.store, expected, window=window)
        assert torch.equal(dense.nan_to_num(7.0), expected.nan_to_num(7.0))
        expected, made = case.decode(library, 160, window, which)
        assert torch.equal(kept.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(plans[1].diagnostics, made.diagnostics)


def test_what_a_program_cannot_hold_is_refused(library: Library) -> None:
    x, weight = torch.zeros(4, 32), torch.zeros(8, 32)
    program = Program(library, 1, 4, 32)
    with pytest.raises(ValueError, match="0 calls"):
        program.run(1)
    for wrong, out, said in (
        (x[:3], torch.zeros(3, 8), "4 rows"),
        (torch.zeros(4, 64), torch.zeros(4, 8), "as many features"),
        (x, torch.zeros(4, 7), r"must be \[4, 8\]"),
        (x, torch.zeros(4, 16)[:, :8], "contiguous"),
    ):
        with pytest.raises(ValueError, match=said):
            record_linear(program, wrong, weight, out=out)
    with pytest.raises(ValueError, match="alike"):
        record_rms_norm(program, x, torch.zeros(32), 1e-5, torch.zeros(4, 31))
    record_linear(program, x, weight, out=torch.zeros(4, 8))
    with pytest.raises(ValueError, match="1 of 1 are recorded"):
        record_linear(program, x, weight, out=torch.zeros(4, 8))
    for num_rows in (0, 5):
        with pytest.raises(ValueError, match=f"{num_rows} rows of 4"):
            program.run(num_rows)
