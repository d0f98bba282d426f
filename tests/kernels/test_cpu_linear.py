"""Linear products of few rows: the float64 reference, every fusion, odd sizes, and results that no batch changes."""

import pytest
import torch
from cpu_kernels import assert_close

from vashista.kernels.cpu.library import Library
from vashista.kernels.cpu.linear import linear, linear_reference

KINDS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
"""Of all operands but the weight, and of the weight."""
SIZES = [(1, 1), (5, 3), (4, 16), (34, 40), (130, 77), (66, 512), (512, 200)]


@pytest.mark.parametrize(("dtype", "of_weight"), KINDS)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 13, 64, 70])
def test_products_of_any_size_equal_the_reference(
    library: Library, threads: int, dtype: torch.dtype, of_weight: torch.dtype, num_rows: int
) -> None:
    torch.manual_seed(num_rows)
    for out_features, in_features in SIZES:
        x, weight = torch.randn(num_rows, in_features).to(dtype), torch.randn(out_features, in_features).to(of_weight)
        bias, residual = torch.randn(out_features).to(dtype), torch.randn(num_rows, out_features).to(dtype)
        assert_close(linear(library, x, weight), linear_reference(x, weight))
        assert_close(linear(library, x, weight, bias, residual), linear_reference(x, weight, bias, residual))


@pytest.mark.parametrize(("dtype", "of_weight"), KINDS)
@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_norm_before_and_a_gate_behind_the_product_equal_the_reference(
    library: Library, threads: int, dtype: torch.dtype, of_weight: torch.dtype, num_rows: int, has_bias: bool
) -> None:
    torch.manual_seed(num_rows)
    for out_features, in_features in [(6, 5), (2, 16), (136, 77), (70, 256)]:
        x, norm = (3 * torch.randn(num_rows, in_features)).to(dtype), torch.rand(in_features).to(dtype)
        weight = (torch.randn(out_features, in_features) / in_features**0.5).to(of_weight)
        bias = torch.randn(out_features).to(dtype) if has_bias else None
        fused = {"norm": norm, "eps": 1e-6, "gated": True}
        assert_close(linear(library, x, weight, bias, **fused), linear_reference(x, weight, bias, **fused))
        only_norm = {"norm": norm, "eps": 1e-6}
        assert_close(linear(library, x, weight, bias, **only_norm), linear_reference(x, weight, bias, **only_norm))


@pytest.mark.parametrize(("dtype", "of_weight"), KINDS)
def test_a_row_has_the_same_bits_in_every_batch(
    library: Library, threads: int, dtype: torch.dtype, of_weight: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(70, 200).to(dtype), torch.randn(150, 200).to(of_weight)
    norm = torch.rand(200).to(dtype)
    for fused in ({}, {"norm": norm, "eps": 1e-5}, {"gated": True}):
        alone = torch.cat([linear(library, row, weight, **fused) for row in x.split(1)])
        for num_rows in (2, 5, 6, 7, 12, 33, 70):
            assert torch.equal(linear(library, x[:num_rows], weight, **fused), alone[:num_rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out_features", "in_features"), [(70, 1408), (300, 500), (34, 40000), (8, 1)])
def test_rows_beyond_a_tile_times_a_bfloat16_weight_are_those_of_few(
    library: Library, threads: int, dtype: torch.dtype, out_features: int, in_features: int
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(271, in_features).to(dtype), torch.randn(out_features, in_features).bfloat16()
    norm, bias, residual = torch.rand(in_features), torch.randn(out_features), torch.randn(271, out_features)
    x[150, 0] = torch.nan
    for gated in (False, True):
        options = {"norm": norm.to(dtype), "eps": 1e-6, "gated": gated}
        given = (bias.to(dtype), None if gated else residual.to(dtype))
        few = torch.cat(
            [
                linear(library, part, weight, given[0], None if gated else part_residual, **options)
                for part, part_residual in zip(x.split(5), residual.to(dtype).split(5), strict=True)
            ]
        )
        many = linear(library, x, weight, *given, **options)
        torch.testing.assert_close(many, few, rtol=0, atol=0, equal_nan=True)
        assert many.isfinite().all(1).sum() == 270


@pytest.mark.parametrize(("num_rows", "of_weight"), [(7, torch.float32), (100, torch.bfloat16)])
def test_the_number_of_threads_changes_no_bit(library: Library, num_rows: int, of_weight: torch.dtype) -> None:
    x, weight = torch.randn(num_rows, 300), torch.randn(500, 300).to(of_weight)
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(linear(library, x, weight, norm=torch.ones(300), eps=1e-6))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("dtype", "of_weight"), KINDS)
def test_rows_may_lie_apart_and_what_lies_between_them_is_not_read(
    library: Library, dtype: torch.dtype, of_weight: torch.dtype
) -> None:
    torch.manual_seed(0)
    wide = torch.full((9, 100), torch.nan, dtype=dtype)
    wide[:, :70] = torch.randn(9, 70).to(dtype)
    residual = torch.full((9, 80), torch.nan, dtype=dtype)
    residual[:, :30] = torch.randn(9, 30).to(dtype)
    weight = torch.randn(30, 70).to(of_weight)
    expected = linear_reference(wide[:, :70], weight, residual=residual[:, :30])
    assert_close(linear(library, wide[:, :70], weight, residual=residual[:, :30]), expected)
    turned = wide[:, :70].T.contiguous().T
    assert_close(linear(library, turned, weight, residual=residual[:, :30]), expected)


@pytest.mark.parametrize(("dtype", "of_weight"), KINDS)
def test_nan_and_infinity_reach_the_result(library: Library, dtype: torch.dtype, of_weight: torch.dtype) -> None:
    x, weight = torch.ones(3, 20, dtype=dtype), torch.ones(8, 20, dtype=of_weight)
    x[1, 3], x[2, 19] = torch.nan, torch.inf
    y = linear(library, x, weight)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert (y[2] == torch.inf).all()


def test_silu_of_extreme_gates_is_finite(library: Library) -> None:
    gates = torch.tensor([[-1e30], [-100.0], [-20.0], [0.0], [1e-40], [20.0], [1e30]])
    y = linear(library, gates, torch.ones(2, 1), gated=False)
    assert torch.equal(y[:, 0], gates[:, 0])
    y = linear(library, gates[:6], torch.tensor([[1.0], [0.0]]), torch.tensor([0.0, 1.0]), gated=True)
    torch.testing.assert_close(y, torch.nn.functional.silu(gates[:6]), rtol=1e-6, atol=1e-34)


def test_operands_that_do_not_fit_are_refused(library: Library) -> None:
    x, weight = torch.ones(2, 8), torch.ones(5, 8)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        linear(library, x.half(), weight.half())
    with pytest.raises(ValueError, match="of x's dtype or bfloat16"):
        linear(library, x.bfloat16(), weight)
    with pytest.raises(ValueError, match=r"\[2, 7\]"):
        linear(library, x[:, :7], weight)
    with pytest.raises(ValueError, match=r"must be \[5\]"):
        linear(library, x, weight, torch.ones(4))
    with pytest.raises(ValueError, match=r"must be \[2, 5\]"):
        linear(library, x, weight, residual=torch.ones(1, 5))
    with pytest.raises(ValueError, match="even number"):
        linear(library, x, weight, gated=True)
