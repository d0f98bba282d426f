"""What the doors refuse, and what they say."""

import subprocess
import sys

import pytest
import torch

from vashista.kernels import triton_guard
from vashista.kernels.paged_decode import paged_decode, paged_decode_triton
from vashista.kernels.paged_prefill import paged_prefill, paged_prefill_triton
from vashista.kernels.requirements import KernelInputError, KernelUnavailableError
from vashista.kernels.rope_write import rope_and_write, rope_and_write_triton


def decode_inputs():
    return {
        "q": torch.zeros(2, 4, 64),
        "k_cache": torch.zeros(3, 2, 16, 64),
        "v_cache": torch.zeros(3, 2, 16, 64),
        "page_table": torch.zeros(2, 2, dtype=torch.int32),
        "context_lens": torch.ones(2, dtype=torch.int32),
        "scale": 0.125,
    }


def prefill_inputs():
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    return decode_inputs() | {"query_starts": starts, "max_query_len": 1}


def rope_inputs():
    return {
        "q": torch.zeros(5, 4, 64),
        "k": torch.zeros(5, 2, 64),
        "v": torch.zeros(5, 2, 64),
        "cos": torch.zeros(5, 32),
        "sin": torch.zeros(5, 32),
        "k_cache": torch.zeros(3, 2, 16, 64),
        "v_cache": torch.zeros(3, 2, 16, 64),
        "slots": torch.zeros(5, dtype=torch.int64),
    }


BAD_DECODE = [
    ({"q": torch.zeros(2, 4)}, r"q has 2 dimensions"),
    ({"q": torch.zeros(2, 4, 60)}, r"head_dim 60; possible are multiples of 8 from 16 to 256"),
    ({"q": torch.zeros(2, 4, 264)}, r"head_dim 264"),
    ({"q": torch.zeros(2, 4, 64, dtype=torch.float64)}, r"q is torch\.float64; possible are float32"),
    ({"q": torch.zeros(2, 64, 4).transpose(1, 2)}, r"stride 4 in its last dimension"),
    ({"q": torch.zeros(2, 5, 64)}, r"5 heads cannot share 2 KV heads"),
    ({"q": torch.zeros(2, 0, 64)}, r"q has no heads"),
    ({"q": torch.zeros(2, 400, 64)}, r"query group has 200 heads; at most 128"),
    ({"k_cache": torch.zeros(3, 2, 16, 32)}, r"k_cache has shape \[3, 2, 16, 32\]; this call needs \[3, 2, 16, 64\]"),
    ({"v_cache": torch.zeros(2, 2, 16, 64)}, r"v_cache has shape"),
    ({"v_cache": torch.zeros(3, 2, 16, 64).half()}, r"v_cache is torch\.float16, the queries are torch\.float32"),
    ({"k_cache": torch.zeros(3, 2, 24, 64), "v_cache": torch.zeros(3, 2, 24, 64)}, r"page size is 24; possible"),
    ({"k_cache": torch.zeros(3, 2, 8, 64), "v_cache": torch.zeros(3, 2, 8, 64)}, r"page size is 8; possible"),
    ({"page_table": torch.zeros(2, 2)}, r"page_table is torch\.float32; it must be torch\.int32"),
    (
        {"page_table": torch.zeros(3, 2, dtype=torch.int32)},
        r"page_table has shape \[3, 2\]; this call needs \[2, any\]",
    ),
    ({"page_table": torch.zeros(2, 2, dtype=torch.int32).T}, r"page_table has stride 2"),
    ({"context_lens": torch.ones(2, dtype=torch.int64)}, r"context_lens is torch\.int64"),
    ({"scale": 0.0}, r"scale is 0\.0; it must be positive"),
    ({"scale": float("nan")}, r"scale is nan; it must be positive"),
    ({"window": 0}, r"window is 0; it must be positive"),
    ({"softcap": -1.0}, r"softcap is -1\.0; it must be positive"),
    ({"out": torch.zeros(2, 4, 32)}, r"out has shape"),
    ({"out": torch.zeros(2, 4, 64).half()}, r"out is torch\.float16"),
]


@pytest.mark.parametrize(("change", "message"), BAD_DECODE, ids=[message for _, message in BAD_DECODE])
@pytest.mark.parametrize(
    ("launch", "inputs"), [(paged_decode_triton, decode_inputs), (paged_prefill_triton, prefill_inputs)]
)
def test_attention_names_what_it_cannot_take(launch, inputs, change, message):
    with pytest.raises(KernelInputError, match=message):
        launch(**inputs() | change)


@pytest.mark.parametrize(
    ("launch", "inputs", "change", "message"),
    [
        (paged_decode_triton, decode_inputs, {"lse": torch.zeros(2, 3)}, r"lse has shape \[2, 3\]"),
        (paged_decode_triton, decode_inputs, {"lse": torch.zeros(2, 4).half()}, r"lse is torch\.float16"),
        (paged_prefill_triton, prefill_inputs, {"max_query_len": 0}, r"max_query_len is 0"),
        (paged_prefill_triton, prefill_inputs, {"query_starts": torch.zeros(2).int()}, r"query_starts has shape \[2\]"),
        (paged_prefill_triton, prefill_inputs, {"query_starts": torch.zeros(3)}, r"query_starts is torch\.float32"),
        (rope_and_write_triton, rope_inputs, {"k": torch.zeros(4, 2, 64)}, r"k has shape"),
        (rope_and_write_triton, rope_inputs, {"v": torch.zeros(5, 2, 64).half()}, r"v is torch\.float16, q is"),
        (
            rope_and_write_triton,
            rope_inputs,
            {"cos": torch.zeros(5, 40), "sin": torch.zeros(5, 40)},
            r"possible are 1 to 32",
        ),
        (rope_and_write_triton, rope_inputs, {"sin": torch.zeros(5, 16)}, r"sin has shape \[5, 16\]"),
        (rope_and_write_triton, rope_inputs, {"cos": torch.zeros(5, 32).half()}, r"cos is torch\.float16"),
        (rope_and_write_triton, rope_inputs, {"sin": torch.zeros(5, 64)[:, :32]}, r"different row strides"),
        (rope_and_write_triton, rope_inputs, {"slots": torch.zeros(5, dtype=torch.int32)}, r"slots is torch\.int32"),
    ],
)
def test_each_kernel_names_what_it_alone_cannot_take(launch, inputs, change, message):
    with pytest.raises(KernelInputError, match=message):
        launch(**inputs() | change)


@pytest.mark.parametrize(
    ("door", "inputs"),
    [(paged_decode, decode_inputs), (paged_prefill, prefill_inputs), (rope_and_write, rope_inputs)],
)
def test_without_triton_or_a_gpu_the_doors_say_so(monkeypatch, door, inputs):
    monkeypatch.setattr(triton_guard, "INTERPRETED", False)
    monkeypatch.setattr(triton_guard, "triton", object())
    with pytest.raises(KernelUnavailableError, match=f"{door.__name__} was called with tensors on cpu"):
        door(**inputs())
    monkeypatch.setattr(triton_guard, "triton", None)
    with pytest.raises(KernelUnavailableError, match="triton package, which is not installed"):
        door(**inputs())


def test_an_old_gpu_is_refused_by_its_capability(monkeypatch):
    monkeypatch.setattr(triton_guard, "INTERPRETED", False)
    monkeypatch.setattr(triton_guard, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(KernelUnavailableError, match=r"compute capability 7\.5; it needs 8\.0 or newer"):
        triton_guard.require_triton("paged_decode", torch.empty(1, device="meta").as_subclass(OnCuda))


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]


def test_every_module_imports_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from vashista.kernels import paged_decode, paged_prefill, rope_write, triton_guard\n"
        "assert triton_guard.triton is None and not triton_guard.INTERPRETED\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("number", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_two(number, power):
    assert triton_guard.next_power_of_two(number) == power
