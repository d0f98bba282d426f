"""Which files a bundle holds, and under which path: the medium's table of contents.

install.sh  README.txt           what the operator starts with
setup/      setup.sh, unpack.py  what install.sh runs once everything was verified
runtime/ wheels/                 Python with its libraries, and the wheels of the lock; not in a delta
product/                         the product's wheel
models/NAME/                     models, as folders
systemd/ prometheus/ settings/ docs/ tools/
image/                           what an image is built from, and the image where one was given
kernel-cache/                    kernels that Triton has compiled, where they were given
sbom.cdx.json
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bundle.manifest import BundleError

Contents = dict[str, bytes | Path]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Weights that run code when they are loaded."""
UNITS = (".service", ".socket", ".path", ".timer", ".target")


def files_of(checkout: Path) -> Contents:
    """Everything that is a file of the checkout: scripts, units, Prometheus files, documents, tools."""
    contents: Contents = {
        "install.sh": checkout / "deploy/install/install.sh",
        "README.txt": checkout / "deploy/install/README.txt",
        "docs/README.md": checkout / "README.md",
        "docs/CHANGELOG.md": checkout / "CHANGELOG.md",
        "docs/LICENSE": checkout / "LICENSE",
    }
    for name in ("setup.sh", "unpack.py"):
        contents[f"setup/{name}"] = checkout / "deploy/install" / name
    for name in ("verify_ledger.py", "verify_attestation.py"):
        contents[f"tools/{name}"] = checkout / "deploy" / name
    for path in _walk(checkout / "deploy/systemd"):
        if path.suffix in UNITS or path.parent.name.endswith(".d"):
            contents[f"systemd/{path.relative_to(checkout / 'deploy/systemd')}"] = path
    contents |= _below("prometheus", checkout / "deploy/prometheus")
    contents |= {name: path for name, path in _below("docs", checkout / "docs").items() if name.endswith(".md")}
    return contents


def image_sources(checkout: Path, packages: Sequence[Path]) -> Contents:
    """What docker/build.py reads, so that images can be built in the room."""
    contents = {
        name: path
        for name, path in _below("image/docker", checkout / "docker").items()
        if "__pycache__" not in name and "/podman/" not in name
    }
    contents |= _below("image/docker/podman", checkout / "docker/podman")
    contents |= _below("image/deploy/lock", checkout / "deploy/lock")
    return contents | {f"image/packages/{path.name}": path for path in packages}


def model(folder: Path) -> Contents:
    """A model folder by the name of its folder; BundleError when it is none or holds pickles."""
    folder = folder.resolve()
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise BundleError(f"{folder} is no model folder: it needs config.json and *.safetensors.")
    contents = _below(f"models/{folder.name}", folder)
    pickles = sorted(name for name in contents if name.endswith(PICKLES))
    if pickles:
        raise BundleError(f"{pickles[0]} of {folder} may hold code: only safetensors travel. Remove it.")
    return contents


def kernel_cache(folder: Path) -> Contents:
    """The folder that TRITON_CACHE_DIR named on a machine with the same GPU."""
    contents = _below("kernel-cache", folder)
    if not contents:
        raise BundleError(f"{folder} holds no compiled kernels: serve a model with TRITON_CACHE_DIR={folder} first.")
    return contents


def _below(name: str, folder: Path) -> Contents:
    return {f"{name}/{path.relative_to(folder)}": path for path in _walk(folder)}


def _walk(folder: Path) -> Iterator[Path]:
    """Every file; BundleError for a link that leads to none or anything else that a tar should not hold."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path
        elif not path.is_dir():
            raise BundleError(f"{path} is neither a file nor a folder.")
