"""What the launcher does where the driver refuses a kernel: the driver's bindings are made up, no device is needed."""

import contextlib
from types import ModuleType, SimpleNamespace

import pytest
import torch
from emulated_cluster import emulate, needs_compiler
from sparse_case import SparseCase

from vashista.kernels.cuda import launcher
from vashista.kernels.requirements import KernelUnavailableError

NAMES = (("THREADS", 256), ("CLUSTER", 16))
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Has room for seven clusters."""
    made = SimpleNamespace(
        CUlaunchAttribute=lambda: SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace())),
        CUlaunchAttributeID=SimpleNamespace(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION=4),
        CUlaunchConfig=SimpleNamespace,
        configs=[],
        room=(0, 7),
    )

    def ask(function: object, config: SimpleNamespace) -> tuple[int, int]:
        made.configs.append(config)
        return made.room

    made.cuOccupancyMaxActiveClusters = ask
    module = ModuleType("cuda.bindings.driver")
    module.__dict__.update(vars(made))
    module.cuOccupancyMaxActiveClusters = ask
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.driver", module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launcher, "_load", lambda names, device: launcher.Kernel("function", 1000))
    launcher.can_launch.cache_clear()
    yield made
    launcher.can_launch.cache_clear()


def test_a_kernel_that_loads_and_has_room_is_launched(driver, capsys):
    assert launcher.can_launch(NAMES, DEVICE)
    (config,) = driver.configs
    assert (config.gridDimX, config.blockDimX, config.sharedMemBytes, config.numAttrs) == (16, 256, 1000, 1)
    assert config.attrs[0].value.clusterDim.x == 16
    assert capsys.readouterr().err == ""


def test_without_room_for_a_cluster_it_is_said_once_and_not_launched(driver, capsys):
    driver.room = (0, 0)
    assert not launcher.can_launch(NAMES, DEVICE)
    assert not launcher.can_launch(NAMES, DEVICE)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "go through Triton's kernels, which takes longer: cuda:0 has no room for 16 blocks side by side" in error


@pytest.mark.usefixtures("driver")
def test_a_driver_that_refuses_the_kernel_ends_nothing(monkeypatch, capsys):
    def refuse(names: object, device: object) -> None:
        raise KernelUnavailableError("cuModuleLoadData failed with CUDA_ERROR_UNSUPPORTED_PTX_VERSION")

    monkeypatch.setattr(launcher, "_load", refuse)
    assert not launcher.can_launch(NAMES, DEVICE)
    assert "cuModuleLoadData failed with CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in capsys.readouterr().err


@needs_compiler
def test_what_cannot_be_launched_is_left_to_the_other_kernel(paged, judge, monkeypatch):
    launches = emulate(monkeypatch)
    monkeypatch.setattr(launcher, "can_launch", lambda names, device: False)
    case = paged([400], num_kv_heads=1, page_size=64, dtype=torch.bfloat16)
    SparseCase(case, 64).check(judge)
    assert not launches
