"""What doctor is told about clusters of thread blocks, of GPUs as NVML describes them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vashista.engine.clusters import find_clusters
from vashista.kernels.cuda import launcher

H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": (9, 0), "cores": 132 * 128, "mig": 0}


class NVMLError(Exception):
    pass


def fake_nvml(*devices: dict[str, Any], error: str | None = None) -> SimpleNamespace:
    """Of devices as H100; mig: None where the device cannot be split."""

    def mig_mode(device: dict[str, Any]) -> list[int]:
        if device["mig"] is None:
            raise NVMLError("Not Supported")
        return [device["mig"], 0]

    def init() -> None:
        if error is not None:
            raise NVMLError(error)

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(devices),
        nvmlDeviceGetHandleByIndex=devices.__getitem__,
        nvmlDeviceGetName=lambda device: device["name"],
        nvmlDeviceGetCudaComputeCapability=lambda device: device["capability"],
        nvmlDeviceGetNumGpuCores=lambda device: device["cores"],
        nvmlDeviceGetMigMode=mig_mode,
    )


@pytest.mark.parametrize("why_not", [None, "cuda-bindings cannot be imported"])
def test_devices_that_fit_are_named_with_what_is_missing(monkeypatch: pytest.MonkeyPatch, why_not: str | None) -> None:
    monkeypatch.setattr(launcher, "why_not", lambda: why_not)
    old = {"name": "NVIDIA L4", "capability": (8, 9), "cores": 7424, "mig": None}
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(old, H100))
    found = find_clusters()
    assert found.fit == ("NVIDIA H100 80GB HBM3",)
    assert found.others == ("NVIDIA L4 has compute capability 8.9",)
    assert found.why_not == why_not


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"capability": (10, 0)}, "has compute capability 10.0"),
        ({"mig": 1}, "is split by MIG"),
        ({"cores": 78 * 128}, "has 78 multiprocessors"),
    ],
)
def test_others_are_named_with_the_reason_and_nothing_is_missing(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(launcher, "why_not", lambda: pytest.fail("nobody needs to know"))
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(H100 | change))
    assert find_clusters() == ((), (f"NVIDIA H100 80GB HBM3 {words}",), None)


def test_gpus_that_cannot_be_asked_are_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(OSError, match="nvidia-ml-py is not installed"):
        find_clusters()
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(error="Driver Not Loaded"))
    with pytest.raises(OSError, match="NVML says: Driver Not Loaded"):
        find_clusters()


def test_what_cannot_be_compiled_without_bindings_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the launcher's own words."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(H100))
    monkeypatch.setattr(launcher, "why_not", launcher.why_not.__wrapped__)
    assert str(find_clusters().why_not).startswith("cuda-bindings cannot be imported: ")
