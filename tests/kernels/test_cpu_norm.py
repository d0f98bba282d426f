"""Norm and gate in one pass: the float64 reference, odd sizes, strides, extremes."""

import pytest
import torch
from cpu_kernels import assert_close

from vashista.kernels.cpu.library import Library
from vashista.kernels.cpu.norm import rms_norm, rms_norm_reference, silu_mul, silu_mul_reference

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 7, 16, 24, 129, 512])
@pytest.mark.parametrize("num_rows", [1, 3, 70])
def test_rows_of_any_length_equal_the_reference(
    library: Library, threads: int, dtype: torch.dtype, cols: int, num_rows: int
) -> None:
    torch.manual_seed(cols)
    x, weight = (5 * torch.randn(num_rows, cols)).to(dtype), torch.randn(cols).to(dtype)
    assert_close(rms_norm(library, x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    gated = (5 * torch.randn(num_rows, 2 * cols)).to(dtype)
    assert_close(silu_mul(library, gated), silu_mul_reference(gated))


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_within_a_wider_tensor_are_normed_and_the_rest_is_not_read(library: Library, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = torch.full((40, 9, 24), torch.nan, dtype=dtype)
    qkv[:, 2:7] = torch.randn(40, 5, 24).to(dtype)
    weight = torch.rand(24).to(dtype)
    heads = qkv[:, 2:7]
    assert_close(rms_norm(library, heads, weight, 1e-5), rms_norm_reference(heads, weight, 1e-5))
    rows = qkv[:, 2:6].reshape(40, -1)
    wide = torch.full((40, 120), torch.nan, dtype=dtype)
    wide[:, : rows.shape[1]] = rows
    assert_close(silu_mul(library, wide[:, : rows.shape[1]]), silu_mul_reference(rows))


def test_tiny_zero_and_nan_rows(library: Library) -> None:
    x = torch.full((4, 20), 1e-30)
    x[1], x[2, 3], x[3] = 0.0, torch.nan, 1e15
    y = rms_norm(library, x, torch.ones(20), 1e-6)
    torch.testing.assert_close(y[0], torch.full((20,), 1e-27), rtol=1e-5, atol=0.0)
    assert (y[1] == 0).all()
    assert y[2].isnan().all()
    torch.testing.assert_close(y[3], torch.ones(20))


def test_the_gate_is_exact_where_the_exponential_overflows(library: Library) -> None:
    gates = torch.tensor([-1e30, -200.0, -88.0, -1.0, 0.0, 88.0, 200.0, 1e30])
    y = silu_mul(library, torch.cat((gates, torch.ones(8))).unsqueeze(0))
    torch.testing.assert_close(y[0], torch.nn.functional.silu(gates), rtol=1e-6, atol=1e-34)


def test_operands_that_do_not_fit_are_refused(library: Library) -> None:
    with pytest.raises(ValueError, match="float32"):
        rms_norm(library, torch.ones(2, 4).half(), torch.ones(4).half(), 1e-6)
    with pytest.raises(ValueError, match=r"weight torch.float32 \[5\]"):
        rms_norm(library, torch.ones(2, 4), torch.ones(5), 1e-6)
    with pytest.raises(ValueError, match="2 \\* cols"):
        silu_mul(library, torch.ones(2, 5))
