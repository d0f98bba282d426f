"""Rotation and cache write against the float64 reference."""

import math

import pytest
import torch

from vashista.kernels.rope_write import rope_and_write, rope_and_write_reference, rotate_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
SHAPES = [
    # head_dim, rotary_dim, heads, KV heads, page size
    (64, 64, 8, 4, 16),
    (128, 128, 4, 1, 64),
    (80, 32, 5, 5, 32),
    (24, 24, 3, 1, 16),
    (256, 64, 2, 2, 256),
    (16, 2, 1, 1, 16),
]


def draw(shape, dtype, device, num_tokens=9):
    """One step: strided q, k, v of one qkv tensor, NaN caches, slots in shuffled pages, two of them padding."""
    torch.manual_seed(4)
    head_dim, rotary_dim, num_heads, num_kv_heads, page_size = shape
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    angles = torch.randn(num_tokens, rotary_dim // 2, device=device) * 100
    caches = [
        torch.full((4, page_size, num_kv_heads, head_dim), math.nan, dtype=dtype, device=device).transpose(1, 2)
        for _ in range(2)
    ]
    slots = torch.randperm(4 * page_size, device=device)[:num_tokens]
    slots[[2, 5]] = -1
    return [*qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1), angles.cos(), angles.sin(), *caches, slots]


def test_the_reference_turns_pairs_as_complex_numbers():
    x, angle = torch.randn(3, 2, 8, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    turned = torch.complex(x[..., :3], x[..., 3:6]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    expected = torch.cat((turned.real, turned.imag, x[..., 6:]), dim=-1)
    assert torch.allclose(rotate_reference(x, angle.cos(), angle.sin()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_turn_in_place_and_slots_get_turned_keys_and_values(device, judge, shape, dtype):
    q, k, v, cos, sin, k_cache, v_cache, slots = draw(shape, dtype, device)
    k_before, v_before = k.clone(), v.clone()
    expected_q, expected_k, expected_v = rope_and_write_reference(q, k, v, cos, sin, k_cache, v_cache, slots)
    returned = rope_and_write(q, k, v, cos, sin, k_cache, v_cache, slots)
    assert returned is q
    judge(q.contiguous(), expected_q, TOLERANCE[dtype])
    assert torch.equal(k, k_before)
    assert torch.equal(v, v_before)
    is_written = ~expected_k.isnan()
    assert torch.equal(is_written, ~k_cache.isnan()), "slots that no token has must stay as they were"
    assert is_written.sum() == 7 * k.shape[1] * k.shape[2]
    error = (k_cache.double() - expected_k)[is_written].norm() / expected_k[is_written].norm()
    assert error <= TOLERANCE[dtype]
    assert torch.equal(v_cache.double().nan_to_num(7.0), expected_v.nan_to_num(7.0))


def test_dimensions_past_the_rotary_ones_pass_unchanged(device):
    q, k, v, cos, sin, k_cache, v_cache, slots = draw((64, 16, 2, 1, 16), torch.float32, device)
    before = q.clone()
    rope_and_write(q, k, v, cos, sin, k_cache, v_cache, slots)
    assert torch.equal(q[..., 16:], before[..., 16:])
    assert not torch.equal(q[..., :16], before[..., :16])
    page, offset = int(slots[0]) // 16, int(slots[0]) % 16
    assert torch.equal(k_cache[page, :, offset, 16:], k[0, :, 16:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_may_turn_into_another_tensor_and_stay_what_they_were(device, shape):
    q, *rest = draw(shape, torch.bfloat16, device)
    before, wide = q.clone(), torch.full((*q.shape[:2], q.shape[2] + 8), math.nan, dtype=q.dtype, device=device)
    out = wide[..., : q.shape[2]]
    assert rope_and_write(q, *rest, out) is out
    assert torch.equal(q, before)
    assert torch.equal(rope_and_write(q, *rest), out)
    assert wide[..., q.shape[2] :].isnan().all()


def test_a_step_of_padding_writes_nothing(device):
    q, k, v, cos, sin, k_cache, v_cache, slots = draw((64, 64, 2, 1, 16), torch.float32, device)
    rope_and_write(q, k, v, cos, sin, k_cache, v_cache, slots.fill_(-1))
    assert k_cache.isnan().all()
    assert v_cache.isnan().all()


def test_a_step_without_tokens_is_nothing(device):
    q, k, v, cos, sin, k_cache, v_cache, slots = draw((64, 64, 2, 1, 16), torch.float32, device, num_tokens=6)
    none = [t[:0] for t in (q, k, v, cos, sin)]
    assert rope_and_write(*none, k_cache, v_cache, slots[:0]).shape == (0, 2, 64)
    assert k_cache.isnan().all()
