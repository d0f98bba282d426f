"""How the compiled library is found, which threads it gets, and what is said where it is not there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vashista.kernels import cpu
from vashista.kernels.cpu import library as loader
from vashista.kernels.cpu.linear import linear


@pytest.fixture
def compiled() -> loader.Library:
    found = loader.load()
    if found is None:
        pytest.skip(loader.status())
    return found


def test_the_status_names_the_instruction_set(compiled: loader.Library) -> None:
    assert compiled.set_names[: compiled.instruction_set + 1] == compiled.set_names
    assert cpu.status().startswith(f"{compiled.set_names[-1]} kernels")


def test_there_is_one_pool_of_threads(compiled: loader.Library) -> None:
    """A large product on two threads starts none that torch's own work had not started."""
    code = (
        "import os, torch\n"
        "from vashista.kernels.cpu import library\n"
        "from vashista.kernels.cpu.linear import linear\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(2000, 2000); x.exp()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "linear(library.load(), x[:8], x)\n"
        "print(before, len(os.listdir('/proc/self/task')), library.load().has_threads)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after, has_threads = done.stdout.split()
    assert before == after
    assert has_threads == "True"


def test_without_an_openmp_library_one_thread_computes(
    compiled: loader.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "openmp_of_torch", lambda: None)
    path = loader._find()
    assert path is not None
    # The same file again shares its thread entry points: they stay, but are not asked for more than one thread.
    alone = loader.Library(path)
    assert not alone.has_threads
    assert alone.num_threads == 1
    x, weight = torch.randn(3, 64), torch.randn(100, 64)
    assert torch.equal(linear(alone, x, weight), linear(compiled, x, weight))


def test_without_a_compiled_file_the_status_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_find", lambda: None)
    assert loader._load.__wrapped__() == (None, "no compiled kernels")


@pytest.mark.parametrize(
    ("content", "words"), [("", "too short|invalid ELF"), ("int vashista_version(void){return 0;}", "install")]
)
def test_a_file_that_is_broken_or_of_another_version_is_refused_and_named(
    content: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: loader.Library
) -> None:
    path = tmp_path / "native.so"
    if content:
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
        subprocess.run(command, input=content, text=True, check=True)
    else:
        path.write_bytes(b"")
    monkeypatch.setattr(loader, "_find", lambda: path)
    found, status = loader._load.__wrapped__()
    assert found is None
    assert status.startswith("no compiled kernels (")
    assert any(word in status for word in words.split("|")), status
