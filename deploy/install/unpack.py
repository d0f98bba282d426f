"""Takes files of a bundle over, each hashed as it is read: what was checked is what is installed. Run by setup.sh.

    unpack.py wheels   --into RUNTIME --final PATH   wheels/ into its dist-packages, compiled, and RUNTIME/FILES
    unpack.py version  --into VERSION --final PATH   product/ into its site-packages, the rest to share/, VERSION/FILES
    unpack.py copy     --into FOLDER --below PATH
    unpack.py mldsa                     exit status 0 when the ML-DSA-87 signature is right

Runs on the bundle's own Python, with its standard library; `mldsa` uses the bundle's cryptography.
"""

from __future__ import annotations

import argparse
import compileall
import fnmatch
import hashlib
import io
import os
import py_compile
import re
import stat
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

FILE = re.compile(r"file ([0-9a-f]{64}) (\d+) (\S+)")
LEFT_OUT = ("torch/bin/protoc*", "torch/bin/test_*", "torch/include/*", "torch/share/*", "torch/lib/*.a")
"""Of wheels: headers and programs for those who build against torch or test it, which nothing here does."""
DIST = Path("usr/lib/python3/dist-packages")
SITE = Path("lib/python3.11/site-packages")
LIST = "FILES"
SHARED = {
    "systemd": "systemd",
    "docs": "docs",
    "prometheus": "prometheus",
    "tools": "tools",
    "settings": "",
    "sbom.cdx.json": "",
}
"""What goes to share/ of a version, and where."""


class Medium:
    """The bundle's folder, read by its manifest."""

    def __init__(self, folder: Path, manifest: Path) -> None:
        self.folder = folder
        self.sums: dict[str, tuple[str, int]] = {}
        for line in manifest.read_text(encoding="ascii").splitlines():
            if match := FILE.fullmatch(line):
                self.sums[match[3]] = match[1], int(match[2])

    def below(self, path: str) -> Iterator[str]:
        """The file of this path, or those below the folder of this path."""
        return (name for name in sorted(self.sums) if name == path or name.startswith(f"{path}/"))

    def read(self, path: str) -> bytes:
        """A file's bytes; exits when they are not those of the manifest."""
        data = (self.folder / path).read_bytes()
        sha256, num_bytes = self.sums[path]
        if len(data) != num_bytes or hashlib.sha256(data).hexdigest() != sha256:
            sys.exit(f"setup: {path} changed on the medium while it was read.")
        return data


def unpack_wheel(data: bytes, into: Path) -> None:
    """A wheel's files; its scripts are not installed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            name = info.filename
            if name.endswith("/") or any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_OUT):
                continue
            top, _, rest = name.partition("/")
            if top.endswith(".data"):
                kind, _, name = rest.partition("/")
                if kind not in ("purelib", "platlib"):
                    continue
            if name.startswith("/") or ".." in name.split("/"):
                sys.exit(f"setup: a wheel holds the path {name}, which leads out of it.")
            path = into / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(info))
            path.chmod(0o755 if info.external_attr >> 16 & stat.S_IXUSR else 0o644)


def compile_all(folder: Path, final: str) -> None:
    """A .pyc for every .py that compiles: the server may not write any. `final` is where the folder will lie.

    They are not compared with their sources when they are loaded: FILES is, by `vashista-setup check`.
    """
    compileall.compile_dir(
        folder,
        maxlevels=40,
        quiet=2,
        workers=len(os.sched_getaffinity(0)),
        stripdir=str(folder),
        prependdir=final,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def write_list(folder: Path) -> None:
    """FILES for `sha256sum --check`, of all that lies in the folder."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != LIST:
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder)}\n")
    (folder / LIST).write_text("".join(lines), encoding="utf-8")


def install_wheels(medium: Medium, top: str, into: Path, site: Path, final: str) -> None:
    """All wheels below `top` on the medium into the folder's `site`."""
    for path in medium.below(top):
        unpack_wheel(medium.read(path), into / site)
    compile_all(into, final)
    write_list(into)


def copy(medium: Medium, below: str, into: Path) -> None:
    """Files of the medium, whole or not at all."""
    for path in medium.below(below):
        target = into / (Path(path).name if path == below else Path(path).relative_to(below))
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        part.write_bytes(medium.read(path))
        part.chmod(0o644)
        part.replace(target)


def is_signed(medium: Medium, manifest: Path) -> bool:
    """Whether signature/mldsa.sig is of this manifest, by the cryptography of the runtime."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA87PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    folder = medium.folder / "signature"
    key = load_pem_public_key((folder / "mldsa.pem").read_bytes())
    try:
        assert isinstance(key, MLDSA87PublicKey)
        key.verify((folder / "mldsa.sig").read_bytes(), manifest.read_bytes())
    except (AssertionError, InvalidSignature):
        return False
    return True


def main() -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["wheels", "version", "copy", "mldsa"])
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--medium", type=Path, required=True)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--final", default="/")
    parser.add_argument("--below")
    options = parser.parse_args()
    medium = Medium(options.medium, options.manifest)
    if options.verb == "wheels":
        install_wheels(medium, "wheels", options.into, DIST, options.final)
    elif options.verb == "version":
        for top, place in SHARED.items():
            copy(medium, top, options.into / "share" / place)
        install_wheels(medium, "product", options.into, SITE, options.final)
    elif options.verb == "copy":
        copy(medium, options.below, options.into)
    else:
        return 0 if is_signed(medium, options.manifest) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
