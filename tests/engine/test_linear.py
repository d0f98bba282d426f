"""Products, norms and gates of the engine against float64, with the compiled kernels and without them."""

import pytest
import torch

from vashista.engine.linear import Linear, WeightRoom, WideRoom, keeps_narrow
from vashista.engine.norm import rms_norm, silu_mul
from vashista.kernels.cpu import library as cpu_library
from vashista.kernels.cpu.linear import MAX_ROWS, linear_reference
from vashista.kernels.cpu.norm import rms_norm_reference, silu_mul_reference

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative error; torch rounds a half-precision result after each of norm, product, gate and sum."""
ROWS = [1, 7, MAX_ROWS, MAX_ROWS + 1, 130]


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels compute."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_library, "load", lambda: None)
    elif cpu_library.load() is None:
        pytest.skip(cpu_library.status())
    return str(request.param)


def assert_close(result: torch.Tensor, reference: torch.Tensor) -> None:
    assert (result.double() - reference).norm() <= LIMITS[result.dtype] * reference.norm()


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", ROWS)
def test_every_product_equals_the_reference(kernels: str, dtype: torch.dtype, has_bias: bool, num_rows: int) -> None:
    torch.manual_seed(0)
    weight, norm = (torch.randn(70, 48) / 7).to(dtype), torch.rand(48).to(dtype)
    bias = torch.randn(70).to(dtype) if has_bias else None
    x, residual = torch.randn(num_rows, 48).to(dtype), torch.randn(num_rows, 70).to(dtype)
    product = Linear(weight.clone(), bias)
    normed = {"norm": norm, "eps": 1e-6}
    with torch.inference_mode():
        assert_close(product(x), linear_reference(x, weight, bias))
        assert_close(product.add_to(residual, x), linear_reference(x, weight, bias, residual))
        assert_close(product.of_normed(x, norm, 1e-6), linear_reference(x, weight, bias, **normed))
        assert_close(product.gate_of_normed(x, norm, 1e-6), linear_reference(x, weight, bias, gated=True, **normed))


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_norm_and_gate_equal_the_reference(kernels: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 48).to(dtype), torch.rand(48).to(dtype)
    assert_close(rms_norm(x[:, 1:], weight, 1e-6), rms_norm_reference(x[:, 1:], weight, 1e-6))
    assert_close(silu_mul(x[:, 0].clone()), silu_mul_reference(x[:, 0]))


@pytest.mark.parametrize("num_rows", ROWS)
def test_a_weight_kept_as_bfloat16_is_the_same_numbers(num_rows: int) -> None:
    if not keeps_narrow(torch.float32, torch.bfloat16, torch.device("cpu")):
        pytest.skip(cpu_library.status())
    torch.manual_seed(0)
    norm, bias, room = torch.rand(48), torch.randn(70), WideRoom()
    x, residual = torch.randn(num_rows, 48), torch.randn(num_rows, 70)
    for weight in (torch.randn(70, 48).bfloat16() / 8, torch.randn(70, 48).bfloat16() / 8):  # one room for both
        product = Linear(weight.clone(), bias, room)
        with torch.inference_mode():
            assert_close(product(x), linear_reference(x, weight, bias))
            assert_close(product.add_to(residual, x), linear_reference(x, weight, bias, residual))
            gated = linear_reference(x, weight, bias, gated=True, norm=norm, eps=1e-6)
            assert_close(product.gate_of_normed(x, norm, 1e-6), gated)


def test_only_float32_products_of_stored_bfloat16_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert not keeps_narrow(torch.float32, torch.float16, cpu)
    assert not keeps_narrow(torch.bfloat16, torch.bfloat16, cpu)
    assert not keeps_narrow(torch.float32, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(cpu_library, "load", lambda: None)
    assert not keeps_narrow(torch.float32, torch.bfloat16, cpu)


def test_weights_in_one_room_do_not_touch_and_what_does_not_fit_lies_elsewhere() -> None:
    room = WeightRoom(2 * 96 * 40 + 64, torch.float32)
    parts = [torch.randn(rows, 40) for rows in (60, 36, 96, 7)]
    first, second, outside = room.stack(parts[:2]), room.stack(parts[2:3]), room.stack([p.bfloat16() for p in parts])
    assert second.data_ptr() > first.data_ptr()
    assert second.data_ptr() % 64 == 0
    assert torch.equal(first, torch.cat(parts[:2]))
    assert torch.equal(second, parts[2])
    assert torch.equal(outside, torch.cat(parts).bfloat16())
