"""`vashista bundle build` from a small checkout: its folders are those of who calls, wherever pip and builder run."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from vashista.server.bundle_keys import make_keys

ROOT = Path(__file__).parents[2]
PARTS = ("deploy", "docker", "docs", "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml")
WHEEL = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
pytestmark = [
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="bundles are built with the Python they have"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the launcher needs gcc"),
]


def small_bundle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_bundle", ROOT / "bench/airgap/small_bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose lock is one small wheel and whose lists of Debian packages are empty; work/ has them."""
    folder = tmp_path / "checkout"
    for part in PARTS:
        place = ROOT / part
        ignore = shutil.ignore_patterns("models", "__pycache__")
        shutil.copytree(place, folder / part, ignore=ignore) if place.is_dir() else shutil.copy(place, folder / part)
    for name in ("cpu", "cuda"):
        (folder / f"docker/packages-{name}.txt").write_text("# none\n")
    (folder / "docker/packages.sh").write_text('#!/bin/sh\nset -eu\ncd "$1"\n[ -f here ]\n')
    (folder / "work/wheels").mkdir(parents=True)
    (folder / "work/packages").mkdir()
    (folder / "work/packages/here").touch()
    info = {"small-1.0.dist-info/WHEEL": WHEEL, "small-1.0.dist-info/RECORD": ""}
    wheel = small_bundle().wheel(folder / "work/wheels", "small", "1.0", {"small/__init__.py": "x = 1\n", **info})
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "deploy/lock/cpu.txt").write_text(f"small==1.0 \\\n    --hash=sha256:{digest}\n")
    small_bundle().wheel(folder / "work", "vashista", "0.3.0", {"vashista/__init__.py": ""})
    make_keys(folder / "work/keys")
    return folder


FOLDERS = ("--wheels", "wheels", "--packages", "packages")


def build(
    folder: Path, *words: str, signer: tuple[str, ...] = ("--key", "keys"), **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run it in the folder, unless told otherwise without an index to go to for wheels that it does not find."""
    command = [sys.executable, "-P", "-c", "from vashista.server.cli import main; main()", "bundle", "build", *words]
    return subprocess.run(
        [*command, "--product", "vashista-0.3.0-py3-none-any.whl", *signer],
        cwd=folder,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "/none", **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_relative_folders_are_those_of_who_calls(checkout: Path) -> None:
    done = build(checkout / "work", "--wheels", "wheels", "--packages", "packages", "--out", "out/here")
    assert done.returncode == 0, done.stderr
    assert "fetching" not in done.stdout
    [bundle] = (checkout / "work/out/here").iterdir()
    with tarfile.open(bundle) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"install.sh", "MANIFEST", "signature/ecdsa.sig", "runtime/launcher", "image/deploy/lock/cpu.txt"} <= names
    assert {name for name in names if name.endswith(".whl")} == {
        "wheels/small-1.0-py3-none-any.whl",
        "product/vashista-0.3.0-py3-none-any.whl",
    }


def test_wheels_that_are_not_there_and_cannot_be_fetched_are_an_error_with_pips_words(checkout: Path) -> None:
    (checkout / "work/wheels/small-1.0-py3-none-any.whl").unlink()
    done = build(checkout / "work", "--wheels", "wheels", "--packages", "packages", "--out", "out")
    assert done.returncode == 1
    assert "cannot be fetched. pip says: " in done.stderr
    assert not list((checkout / "work/out").iterdir())


def test_a_key_that_cannot_sign_is_an_error_before_anything_is_fetched_or_built(checkout: Path) -> None:
    (checkout / "work/wheels/small-1.0-py3-none-any.whl").unlink()
    (checkout / "work/keys/mldsa.key").write_text("no key")
    for folder, said in (("none", "none/ecdsa.key cannot be read"), ("keys", "mldsa.key holds no private key")):
        done = build(checkout / "work", *FOLDERS, "--out", "out", signer=("--key", folder))
        assert done.returncode == 1
        assert said in done.stderr
        assert not done.stdout
        assert not (checkout / "work/out").exists()


def test_keys_and_signatures_that_cannot_be_written_are_an_error_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    make_keys(tmp_path / "keys")
    for words in (["key", "file/x"], ["key", "file"], ["sign", "--key", "keys", "file", "file/x"]):
        command = [sys.executable, "-P", "-c", "from vashista.server.cli import main; main()", "bundle", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode in (1, 2)
        assert not done.stdout
        assert words[-1] in done.stderr
        assert "Traceback" not in done.stderr


def test_missing_wheels_are_fetched_from_where_the_callers_pip_fetches(checkout: Path) -> None:
    """The command line keeps every library offline, by PIP_NO_INDEX and without proxies: not the builder."""
    index = checkout / "index/small"
    index.mkdir(parents=True)
    wheel = checkout / "work/wheels/small-1.0-py3-none-any.whl"
    wheel.rename(index / wheel.name)
    (index / "index.html").write_text(f"<a href='{wheel.name}'>{wheel.name}</a>")
    fetching = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": f"file://{index.parent}"}
    done = build(checkout / "work", "--wheels", "wheels", "--packages", "packages", "--out", "out", **fetching)
    assert done.returncode == 0, done.stderr
    assert "fetching the wheels" in done.stdout
    assert wheel.is_file()


def test_a_whole_folder_of_wheels_is_enough_wherever_pip_looks_else(checkout: Path) -> None:
    other = {"small/__init__.py": "", "small-1.0+other.dist-info/WHEEL": WHEEL, "small-1.0+other.dist-info/RECORD": ""}
    small_bundle().wheel(checkout, "small", "1.0+other", other)
    words = ("--wheels", "wheels", "--packages", "packages", "--out", "out")
    done = build(checkout / "work", *words, PIP_FIND_LINKS=str(checkout))
    assert done.returncode == 0, done.stderr
    assert "fetching" not in done.stdout


def test_a_second_build_with_the_signatures_of_the_first_gives_the_same_bytes(checkout: Path) -> None:
    work = checkout / "work"
    assert build(work, *FOLDERS, "--out", "first").returncode == 0
    [first] = (work / "first").iterdir()
    moved = checkout.rename(checkout.with_name("elsewhere")) / "work"
    done = build(moved, *FOLDERS, "--out", "second", signer=("--signatures", f"first/{first.name}"))
    assert done.returncode == 0, done.stderr
    assert (moved / "second" / first.name).read_bytes() == (moved / "first" / first.name).read_bytes()


def test_parts_for_small_media_are_checked_and_joined_by_what_the_guide_says(checkout: Path) -> None:
    """The two commands of docs/operator.md."""
    work = checkout / "work"
    assert build(work, *FOLDERS, "--out", "whole").returncode == 0
    [whole] = (work / "whole").iterdir()
    signer = ("--signatures", f"whole/{whole.name}")
    done = build(work, *FOLDERS, "--out", "parts", "--parts", "300K", signer=signer)
    assert done.returncode == 0, done.stderr
    parts = sorted(path.name for path in (work / "parts").iterdir())
    assert parts == [f"{whole.name}.{number:03}" for number in range(1, len(parts))] + [f"{whole.name}.sha256"]
    assert len(parts) > 3
    assert all(path.stat().st_size <= 300_000 for path in (work / "parts").iterdir())
    commands = f"cat {whole.name}.[0-9]* >{whole.name} && sha256sum --check {whole.name}.sha256"
    assert commands.partition(" &&")[0] in (ROOT / "docs/operator.md").read_text().replace(
        "vashista-0.1.0-cpu.tar", whole.name
    )
    assert subprocess.run(["sh", "-c", commands], cwd=work / "parts", capture_output=True, check=False).returncode == 0
    assert (work / "parts" / whole.name).read_bytes() == whole.read_bytes()
    with (work / "parts" / parts[1]).open("r+b") as part:
        part.write(b"x")
    assert subprocess.run(["sh", "-c", commands], cwd=work / "parts", capture_output=True, check=False).returncode == 1


def test_a_delta_is_the_product_alone_and_only_against_a_base_with_the_same_runtime(checkout: Path) -> None:
    work = checkout / "work"
    assert build(work, *FOLDERS, "--out", "out").returncode == 0
    [base] = (work / "out").iterdir()
    done = build(work, *FOLDERS, "--out", "delta", "--base", str(base))
    assert done.returncode == 0, done.stderr
    [delta] = (work / "delta").iterdir()
    with tarfile.open(delta) as tar:
        tops = {name.split("/")[1] for name in tar.getnames() if "/" in name}
    assert "product" in tops
    assert not tops & {"wheels", "runtime", "image"}
    info = {"small-1.0.dist-info/WHEEL": WHEEL, "small-1.0.dist-info/RECORD": ""}
    other = small_bundle().wheel(work / "wheels", "small", "1.0", {"small/__init__.py": "x = 2\n", **info})
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    (checkout / "deploy/lock/cpu.txt").write_text(f"small==1.0 \\\n    --hash=sha256:{digest}\n")
    done = build(work, *FOLDERS, "--out", "other", "--base", str(base))
    assert done.returncode == 1
    assert "build a whole bundle" in done.stderr
