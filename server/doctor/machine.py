"""Checks of the machine and the installation: files as they were installed, kernels, GPU, clock, disk, state folder.

Computes nothing: that is `vashista selftest`. Imports no torch, but for `clusters` where there is a GPU.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import shutil
import stat
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from importlib.metadata import version as version_of
from pathlib import Path

from vashista.server.doctor.finding import Finding, not_checked, not_ok, ok

MIN_FREE_BYTES = 1 << 30
MIN_FREE_SHARE = 0.02
DRIVER = Path("/proc/driver/nvidia/version")
CONTROL_DEVICE = Path("/dev/nvidiactl")
REINSTALL = "Install this version again from the medium that it came on, and find out who changed it."


def installation(distribution_name: str = "vashista") -> Finding:
    """Whether every file of the product has the SHA-256 that it was installed with (RECORD of the wheel)."""
    name = "installation"
    try:
        package = distribution(distribution_name)
    except PackageNotFoundError:
        return not_ok(name, f"{distribution_name} is not installed.", "Install it.")
    files = [file for file in package.files or [] if file.hash is not None]
    if not any(str(file).endswith("/cli.py") for file in files):
        return not_checked(name, f"{package.version} runs from a checkout, for which no digests were written down")
    wrong = []
    for file in files:
        assert file.hash is not None
        try:
            found = hashlib.new(file.hash.mode, Path(str(file.locate())).read_bytes()).digest()
        except OSError:
            found = b""
        if base64.urlsafe_b64encode(found).rstrip(b"=").decode() != file.hash.value:
            wrong.append(str(file))
    if wrong:
        return not_ok(
            name, f"{len(wrong)} of {len(files)} files changed or missing: {', '.join(wrong[:3])}.", REINSTALL
        )
    return ok(name, f"{package.version}, {len(files)} files as they were installed")


def kernels(device: str) -> Finding:
    """Whether the compiled kernels of the device are there."""
    name = "kernels"
    if _wants_gpu(device):
        try:
            triton = version_of("triton")
        except PackageNotFoundError:
            return not_ok(name, "triton is not installed.", "Install the CUDA build.")
        if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
            return not_ok(name, f"triton {triton} finds no C compiler.", "Install gcc, or use the CUDA image.")
        return ok(name, f"triton {triton} and a C compiler")
    package = importlib.util.find_spec("vashista.server")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).resolve().parents[1] / "kernels" / "cpu"
    if not any(folder.glob("native*.so")):
        return not_ok(
            name,
            "The compiled CPU kernels are not there, so that torch computes, several times slower.",
            "Install a wheel that was built with a C compiler.",
        )
    return ok(name, "compiled CPU kernels are there; `vashista selftest` tries them")


def clusters(device: str) -> Finding:
    """Whether sparse decode of few requests runs in clusters of thread blocks, where a GPU has them."""
    name = "clusters"
    if not _wants_gpu(device):
        return not_checked(name, "not for a CPU")
    from vashista.engine.clusters import find_clusters  # torch, which takes seconds

    try:
        found = find_clusters()
    except OSError as error:
        return not_checked(name, f"the GPUs cannot be asked what they are: {error}")
    if not found.fit:
        return not_checked(name, f"not for this device: {'; '.join(found.others) or 'there is none'}")
    devices = ", ".join(found.fit)
    if found.why_not is not None:
        return not_ok(
            name,
            f"{devices}: sparse decode of few requests is slower than it could be, without clusters of thread blocks; "
            f"everything works. {found.why_not.rstrip('.')}.",
            "Install vashista[cuda] again, with the versions that deploy/lock pins: NVRTC comes with torch's CUDA "
            "build, beside it cuda-bindings.",
        )
    return ok(name, f"{devices}: sparse decode of few requests runs in clusters of thread blocks")


def gpu(device: str, *, driver: Path = DRIVER, control: Path = CONTROL_DEVICE) -> Finding:
    """Driver and device files of NVIDIA, where the settings ask for a GPU or there is one."""
    name = "GPU"
    if device == "cpu":
        return not_checked(name, "the setting device is cpu")
    if not driver.exists() and not control.exists():
        if device == "auto":
            return not_checked(name, "there is none, and the setting device is auto: the CPU computes")
        return not_ok(name, f"The setting device is {device}, but no NVIDIA driver is loaded.", "Load the driver.")
    if not control.exists():
        return not_ok(
            name, f"The driver is loaded, but {control} is not there.", "Make the device visible to unit or container."
        )
    if not os.access(control, os.R_OK | os.W_OK):
        return not_ok(name, f"{control} may not be opened by this user.", "Give the server's user access to it.")
    line = driver.read_text().splitlines()[0] if driver.exists() else "driver without /proc entry"
    return ok(name, line)


def disk(state_dir: Path) -> Finding:
    """Free space where the ledger grows."""
    name = "disk"
    place = state_dir
    while not place.exists() and place != place.parent:
        place = place.parent
    usage = shutil.disk_usage(place)
    text = f"{usage.free / 2**30:.1f} GiB of {usage.total / 2**30:.1f} free at {state_dir}"
    if usage.free < max(MIN_FREE_BYTES, MIN_FREE_SHARE * usage.total):
        return not_ok(name, f"{text}.", "Free space, or prune old receipts with `vashista ledger prune`.")
    return ok(name, text)


def state_folder(state_dir: Path) -> Finding:
    """Whether only its owner can enter it: it holds the ledger's key."""
    name = "state folder"
    try:
        status = state_dir.stat()
    except OSError as error:
        return not_checked(name, f"{state_dir}: {error.strerror}; the server makes it")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o022:
        return not_ok(name, f"{state_dir} has mode {mode:04o}: others may write it.", f"chmod go-w {state_dir}")
    return ok(name, f"{state_dir}, mode {mode:04o}, user {status.st_uid}")


def updates(prefix: Path | None = None) -> Finding:
    """Whether the version that runs this is the one that `current` leads to; nothing is asked of anybody outside.

    The bundle installs each version to a folder of its own beside that link (deploy/install).
    """
    name = "updates"
    prefix = Path(sys.prefix).resolve() if prefix is None else prefix
    versions = next((folder for folder in prefix.parents if folder.name == "versions"), None)
    if versions is None or not (versions.parent / "current").exists():
        return not_checked(name, f"{version_of('vashista')} was not installed from a bundle; nothing outside is asked")
    mine = prefix.relative_to(versions).parts[0]
    current = (versions.parent / "current").resolve().name
    others = sorted(entry.name for entry in versions.iterdir() if entry.is_dir() and entry.name != mine)
    beside = f"also here: {', '.join(others) or 'none'}"
    if mine != current:
        return not_ok(
            name,
            f"This is {mine}, but current leads to {current}; {beside}.",
            "Restart the server, so that the version in use is the one installed.",
        )
    return ok(name, f"{mine} is in use; {beside}; newer ones come on a medium, nothing outside is asked")


def settings_sources(environ: Mapping[str, str], config: Path | None) -> str:
    """Where settings came from, for the attestation."""
    names = sorted(name for name in environ if name.startswith("VASHISTA_"))
    return f"file {config or environ.get('VASHISTA_CONFIG') or 'none'}, variables {', '.join(names) or 'none'}"


def _wants_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and CONTROL_DEVICE.exists())
