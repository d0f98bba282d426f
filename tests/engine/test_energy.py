from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vashista.engine.energy import WINDOW_S, PowerMeter, cpu_counter, gpu_counter


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class FakeCounter:
    source = "rapl"

    def __init__(self) -> None:
        self.energy_j = 1000.0
        self.num_reads = 0
        self.is_gone = False

    def read_j(self) -> float:
        self.num_reads += 1
        if self.is_gone:
            raise OSError("gone")
        return self.energy_j


@pytest.fixture
def measured() -> tuple[PowerMeter, FakeCounter, Clock]:
    counter, clock = FakeCounter(), Clock()
    return PowerMeter(counter, clock), counter, clock


def test_power_is_the_mean_over_a_window_in_which_the_engine_computed(measured):
    meter, counter, clock = measured
    meter.observe(0.0)
    assert (meter.power_w, meter.source) == (None, None)
    clock.now_s, counter.energy_j = 1.0, 1300.0
    meter.observe(0.95)
    assert (meter.power_w, meter.source) == (300.0, "rapl")
    clock.now_s, counter.energy_j = 2.0, 1700.0
    meter.observe(1.95)
    assert 300 < meter.power_w < 400


def test_idle_windows_do_not_count(measured):
    meter, counter, clock = measured
    meter.observe(0.0)
    clock.now_s, counter.energy_j = 10.0, 1600.0
    meter.observe(2.0)
    assert meter.power_w is None


def test_the_counter_is_read_once_a_window(measured):
    meter, counter, clock = measured
    for step in range(100):
        clock.now_s = step * WINDOW_S / 50
        meter.observe(clock.now_s)
    assert counter.num_reads == 2


def test_a_counter_that_vanishes_ends_the_measurement(measured):
    meter, counter, clock = measured
    meter.observe(0.0)
    clock.now_s, counter.energy_j = 1.0, 1300.0
    meter.observe(1.0)
    counter.is_gone, clock.now_s = True, 2.0
    meter.observe(2.0)
    meter.observe(3.0)
    assert (meter.power_w, meter.source, counter.num_reads) == (None, None, 3)


def test_without_a_counter_nothing_is_measured():
    meter = PowerMeter(None)
    meter.observe(1.0)
    assert (meter.power_w, meter.source) == (None, None)


def zone(folder: Path, name: str, kind: str, energy_uj: int) -> Path:
    path = folder / name
    path.mkdir()
    for file, text in {"name": kind, "energy_uj": energy_uj, "max_energy_range_uj": 1_000_000_000}.items():
        (path / file).write_text(f"{text}\n")
    return path


def test_rapl_sums_packages_alone_and_survives_an_overflow(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 10_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 77)
    counter = cpu_counter(tmp_path)
    assert counter is not None
    assert counter.read_j() == 0.0
    (first / "energy_uj").write_text("2000000\n")
    (second / "energy_uj").write_text("14000000\n")
    assert counter.read_j() == pytest.approx(7.0)
    assert counter.source == "rapl"


def test_a_machine_without_readable_rapl_has_no_counter(tmp_path):
    assert cpu_counter(tmp_path) is None
    assert cpu_counter(tmp_path / "none") is None
    broken = zone(tmp_path, "intel-rapl:0", "package-0", 5)
    (broken / "energy_uj").unlink()
    assert cpu_counter(tmp_path) is None


def fake_nvml(*, can_count: bool = True) -> SimpleNamespace:
    class NVMLError(Exception):
        pass

    def energy(handle: str) -> int:
        if not can_count:
            raise NVMLError("Not Supported")
        assert handle == "handle of GPU-1"
        return 12_345

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"handle of {uuid}",
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )


def test_nvml_counts_millijoules_of_the_gpu_with_the_uuid(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    counter = gpu_counter("GPU-1")
    assert counter is not None
    assert (counter.read_j(), counter.source) == (12.345, "nvml")


def test_a_gpu_that_cannot_count_or_a_missing_module_is_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(can_count=False))
    assert gpu_counter("GPU-1") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_counter("GPU-1") is None
