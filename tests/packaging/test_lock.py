"""The lock files: hashes everywhere, no addresses, versions that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "deploy/lock"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PIN = re.compile(r"([A-Za-z0-9._-]+)==([^ ;\\]+)( ; [^\\]+?)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


def pins(name: str) -> dict[str, list[tuple[Version, set[str]]]]:
    """Versions and hashes by package of a lock file; fails when a line is anything else."""
    lines = (LOCK / f"{name}.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith("#"))
    found: dict[str, list[tuple[Version, set[str]]]] = {}
    end = 0
    for match in PIN.finditer(text):
        assert match.start() == end, f"{name}.txt: not a pin with hashes: {text[end : match.start()]!r}"
        end = match.end()
        hashes = set(re.findall(r"sha256:[0-9a-f]{64}", match[4]))
        found.setdefault(canonicalize_name(match[1]), []).append((Version(match[2]), hashes))
    assert end == len(text), f"{name}.txt: not a pin with hashes: {text[end:][:200]!r}"
    return found


@pytest.mark.parametrize("name", ["cpu", "cuda", "dev"])
def test_every_requirement_has_hashes_and_no_file_names_an_address(name: str) -> None:
    assert len(pins(name)) > 20
    text = (LOCK / f"{name}.txt").read_text(encoding="utf-8")
    assert not re.search(r"://|--(extra-)?index|--find-links|@ ", text)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_lock_holds_every_dependency_in_an_allowed_version(name: str) -> None:
    locked = pins(name)
    needed = list(PROJECT["dependencies"]) + (PROJECT["optional-dependencies"]["cuda"] if name == "cuda" else [])
    for text in needed:
        requirement = Requirement(text)
        for version, _ in locked[canonicalize_name(requirement.name)]:
            assert requirement.specifier.contains(version), f"{text}: {version}"
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    for requirement in map(Requirement, build):
        assert all(requirement.specifier.contains(version) for version, _ in locked[requirement.name])


def test_the_cpu_lock_has_one_torch_file_and_nothing_of_cuda() -> None:
    locked = pins("cpu")
    [(version, hashes)] = locked["torch"]
    assert version == Version("2.13.0")
    assert len(hashes) == 1
    assert not [name for name in locked if name.startswith(("nvidia", "cuda", "triton"))]


def test_the_cuda_lock_has_another_torch_the_triton_that_goes_with_it_and_the_same_rest() -> None:
    cpu, cuda = pins("cpu"), pins("cuda")
    [(version, hashes)] = cuda["torch"]
    assert version == Version("2.13.0")
    assert not hashes & cpu["torch"][0][1]
    assert [version for version, _ in cuda["triton"]] == [Version("3.7.1")]
    assert [name for name in cuda if name.startswith("nvidia-")]
    # What kernels/cuda is compiled by, and by which it is asked; the bindings take NVRTC of their own CUDA first.
    [(bindings, _)], [(nvrtc, _)] = cuda["cuda-bindings"], cuda["nvidia-cuda-nvrtc"]
    assert bindings.major == nvrtc.major
    shared = set(cpu) - {"torch"}
    assert {name: cuda[name] for name in shared} == {name: cpu[name] for name in shared}


def test_the_dev_lock_has_every_tool_and_goes_with_both() -> None:
    dev = pins("dev")
    lines = [line.strip() for line in (LOCK / "dev.in").read_text(encoding="utf-8").splitlines()]
    tools = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}
    assert tools <= set(dev)
    assert not set(dev) & set(pins("cpu"))
    # The kernels' tests need triton without a GPU too: the same one.
    assert set(dev) & set(pins("cuda")) == {"triton"}
    assert dev["triton"] == pins("cuda")["triton"]
