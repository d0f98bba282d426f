"""The package: what pyproject.toml lists, and what a wheel holds and does outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from vashista.kernels.cuda import launcher

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "kernels/cuda"
"""Its sources are compiled where they run."""
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def folders_with_code() -> set[str]:
    tops = [ROOT / name for name in ("server", "engine", "kernels")]
    folders = {path.parent.relative_to(ROOT) for top in tops for path in top.rglob("*.py")}
    return {"vashista." + ".".join(folder.parts) for folder in folders}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("server", "engine", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        # setuptools follows links to folders; nothing is written behind them.
        (source / name).symlink_to(ROOT / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    # The kernels' -O3 takes half a minute, and the environment of these tests was built with it.
    compiler = out / "cc"
    compiler.write_text('#!/bin/sh\nexec gcc "$@" -O0\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)],
        env={**os.environ, "CC": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [path] = out.glob("*.whl")
    return path


def test_every_folder_with_code_is_listed_as_a_package_and_the_other_way_round() -> None:
    assert set(SETUPTOOLS["packages"]) == folders_with_code()


def test_every_package_has_an_init_file() -> None:
    for name in SETUPTOOLS["packages"]:
        assert (ROOT / Path(*name.split(".")[1:]) / "__init__.py").exists(), name


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"vashista/" + str(path.relative_to(ROOT)) for top in ("server", "engine", "kernels")
                for path in (ROOT / top).rglob("*") if path.is_file() and "__pycache__" not in path.parts
                and (path.suffix not in {".c", ".h", ".so"} or path.parent == CUDA)}  # fmt: skip
    assert {name for name in held if not name.endswith(".so")} == expected
    assert {"vashista/server/py.typed", "vashista/engine/py.typed", "vashista/kernels/py.typed"} <= held


def test_the_wheel_holds_the_compiled_kernels_and_simulation_where_there_is_a_compiler(wheel: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    folders = sorted(str(Path(library).parent) for library in libraries)
    assert folders == ["vashista/engine/predict", "vashista/kernels/cpu"]


def test_the_wheel_holds_the_sources_that_are_compiled_on_the_device_as_they_are(wheel: Path) -> None:
    files = zipfile.ZipFile(wheel)
    for name in launcher.SOURCES:
        assert files.read(f"vashista/kernels/cuda/{name}") == (CUDA / name).read_bytes()
    assert {path.name for path in CUDA.iterdir() if path.suffix in {".cu", ".h"}} == set(launcher.SOURCES)


def test_every_file_of_c_is_a_listed_source_or_dependency() -> None:
    listed = [name for module in SETUPTOOLS["ext-modules"] for name in (*module["sources"], *module.get("depends", []))]
    sources = [path for folder in ("kernels", "engine", "server") for path in (ROOT / folder).rglob("*.[ch]")
               if path.parent != CUDA]  # fmt: skip
    assert sorted(listed) == sorted(str(path.relative_to(ROOT)) for path in sources)


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    modules = sorted(
        path.relative_to(target).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for path in target.rglob("*.py")
    )
    # The editable install's finder is in the way of PYTHONPATH only if it comes first on sys.meta_path, so remove it.
    code = (
        "import importlib, sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        "sys.path[:] = [p for p in sys.path if '__editable__' not in p]\n"
        "sys.modules.pop('vashista', None)\n"
        f"for name in {modules!r}:\n"
        "    if 'triton' in name or name.endswith('__main__'): continue\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(target)!r}), (name, module.__file__)\n"
        "from vashista.kernels.cpu import library\n"
        f"assert (library.load() is not None) == {any(target.rglob('*.so'))}, library.status()\n"
        "from vashista.kernels.cuda import launcher\n"
        "assert 'KERNEL cluster_attend(' in launcher.read_source()\n"
        "from vashista.server.cli import run\n"
        "assert run(['--help']) == 0\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Serve a model" in done.stdout


def test_the_wheel_declares_the_command_the_licence_and_the_dependencies(wheel: Path) -> None:
    files = zipfile.ZipFile(wheel)
    info = next(name for name in files.namelist() if name.endswith("METADATA")).removesuffix("METADATA")
    assert "vashista = vashista.server.cli:main" in files.read(info + "entry_points.txt").decode()
    metadata = files.read(info + "METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch>=2.11" in metadata
    assert info + "licenses/LICENSE" in files.namelist()
