"""What the tests of the compiled CPU kernels share: the library with one instruction set and a number of threads."""

from collections.abc import Iterator

import pytest
import torch

from vashista.kernels.cpu import library as loader

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
"""Relative error; bfloat16 results are compared with the reference rounded to bfloat16."""
SETS = ("plain", "AVX2", "AVX-512")


@pytest.fixture(params=SETS)
def library(request: pytest.FixtureRequest) -> Iterator[loader.Library]:
    """The compiled library, made to use one of the instruction sets."""
    found = loader.load()
    if found is None:
        pytest.skip(loader.status())
    if request.param not in found.set_names:
        pytest.skip(f"this processor has no {request.param}")
    best = found.instruction_set
    found.instruction_set = found.set_names.index(request.param)
    yield found
    found.instruction_set = best


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_close(result: torch.Tensor, reference: torch.Tensor) -> None:
    """Relative error of the whole, and no element that is off on its own."""
    assert result.isfinite().all()
    rounded = reference.to(result.dtype).double()
    error, size = result.double() - rounded, rounded.norm()
    assert error.norm() <= LIMITS[result.dtype] * size
    step = 2.0**-7 if result.dtype is torch.bfloat16 else 1e-4
    assert (error.abs() <= step * (rounded.abs() + rounded.square().mean().sqrt())).all()
