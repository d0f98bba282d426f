"""Memory that may be taken: the least that machine, control groups and limits of the process leave, by name."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vashista.engine.errors import CheckpointError, NotEnoughMemoryError
from vashista.engine.main_memory import Room, is_shortage, main_memory, shortage_named

MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"
MIB = 1 << 20
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V2_MOUNT = "41 31 0:38 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
OTHER_MOUNT = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A root folder with the files that a kernel would show."""

    def make(*, own: str = "", mounts: str = "", groups: dict[str, dict[str, object]] | None = None) -> Path:
        figures = {"MemTotal": 8000, "MemAvailable": 4000, "CommitLimit": 6000, "Committed_AS": 5000}
        meminfo = "".join(f"{name}:  {mib * 1024} kB\n" for name, mib in figures.items())
        files = {"proc/meminfo": meminfo, "proc/self/cgroup": own, "proc/self/mountinfo": mounts}
        files["proc/self/status"] = "Name:\tpython\nVmSize:\t  102400 kB\nVmData:\t  51200 kB\n"
        for folder, group in (groups or {}).items():
            files |= {f"sys/fs/cgroup/{folder}/{name}": f"{value}\n" for name, value in group.items()}
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def v2(limit: object, used_mib: int, *, cached_mib: int = 0, high: object = "max") -> dict[str, object]:
    stat = f"anon 5\ninactive_file {cached_mib * MIB}\nactive_file 0"
    return {"memory.max": limit, "memory.high": high, "memory.current": used_mib * MIB, "memory.stat": stat}


def v1(limit: int, used_mib: int, *, cached_mib: int = 0) -> dict[str, object]:
    stat = f"inactive_file 7\ntotal_inactive_file 0\ntotal_active_file {cached_mib * MIB}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used_mib * MIB, "memory.stat": stat}


def test_without_limits_it_is_what_the_machine_has(machine: Machine) -> None:
    assert main_memory(machine()) == Room(4000 * MIB, "MemAvailable")


def test_a_machine_that_does_not_overcommit_gives_no_more_than_it_may_promise(machine: Machine) -> None:
    root = machine()
    (root / "proc/sys/vm").mkdir(parents=True)
    (root / "proc/sys/vm/overcommit_memory").write_text("2\n")
    assert main_memory(root) == Room(1000 * MIB, "CommitLimit (vm.overcommit_memory is 2)")


def test_the_group_of_the_process_counts_and_its_page_cache_is_no_use(machine: Machine) -> None:
    groups = {"": v2("max", 3000), "vashista.slice/server": v2(1000 * MIB, 800, cached_mib=300)}
    root = machine(own="0::/vashista.slice/server\n", mounts=V2_MOUNT.format(top="/"), groups=groups)
    assert main_memory(root) == Room(500 * MIB, "control group /sys/fs/cgroup/vashista.slice/server")


def test_a_group_above_counts_too_and_memory_high_like_memory_max(machine: Machine) -> None:
    groups = {"outer": v2("max", 600, high=1000 * MIB), "outer/inner": v2(2000 * MIB, 100)}
    root = machine(own="0::/outer/inner\n", mounts=V2_MOUNT.format(top="/"), groups=groups)
    assert main_memory(root) == Room(400 * MIB, "control group /sys/fs/cgroup/outer")


def test_a_group_of_the_first_version_counts(machine: Machine) -> None:
    groups = {"memory": v1(1 << 62, 3000), "memory/docker/abc": v1(512 * MIB, 400, cached_mib=100)}
    own = "5:devices:/docker/abc\n4:cpu,memory:/docker/abc\n0::/\n"
    root = machine(own=own, mounts=f"{OTHER_MOUNT}\n{V1_MOUNT.format(top='/')}", groups=groups)
    assert main_memory(root) == Room(212 * MIB, "control group /sys/fs/cgroup/memory/docker/abc")


@pytest.mark.parametrize(("own", "top"), [("/docker/abc", "/docker/abc"), ("/", "/"), ("/../elsewhere", "/")])
def test_in_a_container_the_mount_is_the_group(machine: Machine, own: str, top: str) -> None:
    root = machine(own=f"4:memory:{own}\n", mounts=V1_MOUNT.format(top=top), groups={"memory": v1(256 * MIB, 56)})
    assert main_memory(root) == Room(200 * MIB, "control group /sys/fs/cgroup/memory")


def test_more_in_use_than_a_limit_allows_leaves_nothing(machine: Machine) -> None:
    root = machine(own="0::/\n", mounts=V2_MOUNT.format(top="/"), groups={"": v2(100 * MIB, 120)})
    assert main_memory(root).num_bytes == 0


def test_limits_of_the_process_count(machine: Machine) -> None:
    root = machine()
    lines = "Max data size             {data:<21}unlimited            bytes\n"
    lines += "Max address space         {space:<21}unlimited            bytes\n"
    limits = root / "proc/self/limits"
    limits.write_text(lines.format(data="unlimited", space=300 * MIB))
    assert main_memory(root) == Room(200 * MIB, "RLIMIT_AS (`ulimit -v`)")
    limits.write_text(lines.format(data=150 * MIB, space=300 * MIB))
    assert main_memory(root) == Room(100 * MIB, "RLIMIT_DATA (`ulimit -d`)")
    limits.write_text(lines.format(data="unlimited", space="unlimited"))
    assert main_memory(root).limit == "MemAvailable"


def test_a_shortage_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as allocation:
        torch.empty(1 << 60)
    assert is_shortage(allocation.value)
    assert is_shortage(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_shortage(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    # As from a file system without the right to execute.
    assert not is_shortage(ImportError("x.so: failed to map segment from shared object: Operation not permitted"))
    assert not is_shortage(OSError(errno.EPIPE, "Broken pipe"))
    assert not is_shortage(CheckpointError("The file is out of memory."))


def test_a_shortage_is_named_and_other_errors_pass() -> None:
    words = r"ran out of memory: MemoryError \(.* GiB of main memory are free by"
    with pytest.raises(NotEnoughMemoryError, match=words), shortage_named():
        raise MemoryError
    with pytest.raises(OSError, match="Broken pipe"), shortage_named():
        raise OSError(errno.EPIPE, "Broken pipe")


START = """
import json, resource, sys
import torch
from vashista.engine.config import EngineConfig
from vashista.engine.engine import Engine
from vashista.engine.errors import VashistaError
size = next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(sys.argv[2] + ":")) * 1024
resource.setrlimit(getattr(resource, sys.argv[3]), (size + int(sys.argv[4]),) * 2)
try:
    ready = Engine(EngineConfig(model_dir=sys.argv[1], device="cpu", num_threads=1)).ready
    print(json.dumps({"kv_bytes": ready.kv_bytes}))
except VashistaError as error:
    print(json.dumps({"code": error.code, "message": error.message}))
"""


@pytest.mark.parametrize(
    ("limit", "figure", "spare_mib"),
    [("RLIMIT_AS", "VmSize", 170), ("RLIMIT_AS", "VmSize", 1000), ("RLIMIT_DATA", "VmData", 64)],
)
def test_an_engine_fits_itself_into_a_limit_or_says_what_it_lacks(limit: str, figure: str, spare_mib: int) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START, str(MODEL), figure, limit, str(spare_mib * MIB)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    if spare_mib == 1000:
        assert 64 * MIB < answer["kv_bytes"] < 1000 * MIB
    else:
        assert answer["code"] == "not_enough_memory"
        assert limit in answer["message"]
