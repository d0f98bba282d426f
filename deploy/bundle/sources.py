"""What goes into a bundle, brought together on the connected machine: wheels of the lock, Debian packages, the product.

Each is taken from a folder if it is there, else fetched into it with the machine's own pip and apt; every file is
checked against the hashes of the lock and of docker/packages-*.txt, wherever it came from.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from image.wheels import find_wheels, read_lock

from bundle.archive import TIME_S
from bundle.manifest import BundleError

PRODUCT = ("server", "engine", "kernels", "pyproject.toml", "README.md", "LICENSE")
PYTHON = (3, 11)
"""Of the runtime, which the wheels must be for."""


def wheels(folder: Path, lock: Path) -> list[tuple[Path, str]]:
    """The wheels of the lock and their SHA-256; those that the folder lacks are downloaded. BundleError."""
    if sys.version_info[:2] != PYTHON:
        found = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise BundleError(f"This is Python {found}; the bundle has Python 3.11, so build it with that one.")
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_complete(folder, lock):
        print(f"fetching the wheels of {lock.name} into {folder}", flush=True)
        command = ["download", "--only-binary", ":all:", "--no-deps", "--dest", str(folder)]
        _pip([*command, "--require-hashes", "--requirement", str(lock)], f"The wheels of {lock} cannot be fetched.")
    return find_wheels(folder, read_lock(lock))


def _is_complete(folder: Path, lock: Path) -> bool:
    """Whether pip could install all of the lock from the folder alone."""
    command = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--no-index", "--find-links", str(folder)]
    alone = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(folder)}  # not where this machine looks, too
    done = _run_pip([*command, "--require-hashes", "--requirement", str(lock)], alone)
    return done.returncode == 0


def packages(folder: Path, script: Path) -> None:
    """Run docker/packages.sh, which fetches what the folder lacks and checks all; BundleError with its words."""
    done = subprocess.run(["sh", str(script), str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BundleError(f"The Debian packages are not all in {folder} and cannot be fetched: {done.stderr.strip()}")


def product(checkout: Path, out: Path) -> Path:
    """The product's wheel, built from a copy of the sources; the same bytes from the same sources and compiler."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "source")
        source.mkdir()
        for part in PRODUCT:
            place = checkout / part
            ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
            shutil.copytree(place, source / part, ignore=ignore) if place.is_dir() else shutil.copy(place, source)
        environ = {"SOURCE_DATE_EPOCH": str(TIME_S), "CFLAGS": f"-g0 -ffile-prefix-map={source}=."}
        command = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(source)]
        _pip(command, "The product's wheel cannot be built.", environ)
    [wheel] = out.glob("vashista-*.whl")
    if wheel.name.endswith("-none-any.whl"):
        raise BundleError("The wheel was built without the compiled kernels: install gcc and the headers of Python.")
    return wheel


def launcher(checkout: Path, out: Path) -> Path:
    """The program that starts Python, static; the same bytes from the same compiler. BundleError."""
    program = out / "launcher"
    flags = [
        "-static",
        "-Os",
        "-s",
        "-g0",
        "-Wall",
        "-Werror",
        "-Wl,--build-id=none",
        f"-ffile-prefix-map={checkout}=.",
    ]
    command = ["gcc", *flags, "-o", str(program), str(checkout / "deploy/install/launcher.c")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise BundleError("There is no gcc: install gcc and libc6-dev.") from error
    if done.returncode != 0:
        raise BundleError(f"The launcher cannot be compiled: {done.stderr.strip()[-1000:]}")
    return program


def _pip(arguments: list[str], failure: str, environ: dict[str, str] | None = None) -> None:
    done = _run_pip(arguments, environ)
    if done.returncode != 0:
        raise BundleError(f"{failure} pip says: {done.stderr.strip()[-2000:]}")


def _run_pip(arguments: list[str], environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(
        command, env={**os.environ, **(environ or {})}, capture_output=True, text=True, check=False, cwd="/"
    )
