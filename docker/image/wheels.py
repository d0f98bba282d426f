"""Wheels unpacked into a layer, checked against the lock, with their Python compiled.

Compiled Python is of the `unchecked-hash` kind: an image is never edited, and a read-only root could not keep others.
Of a wheel's scripts none is installed: the image starts `vashista` alone. Libraries of others lose their symbol tables
(`image/elf.py`), so that they no longer have the hashes of their wheel's RECORD.
"""

from __future__ import annotations

import email.parser
import fnmatch
import hashlib
import py_compile
import re
import stat
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from image.archive import BuildError, Layer
from image.elf import strip

SITE = "usr/lib/python3/dist-packages"
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)([^\\\n]*)((?: \\\n +--hash=sha256:[0-9a-f]{64})+)", re.MULTILINE)


@dataclass(frozen=True)
class Wheel:
    """One unpacked wheel."""

    name: str
    version: str
    licence: str
    sha256: str


def read_lock(path: Path) -> dict[str, str]:
    """Package by allowed SHA-256 of a lock file of pip."""
    text = path.read_text(encoding="utf-8")
    return {
        digest: f"{match[1]}=={match[2]}"
        for match in PIN.finditer(text)
        for digest in re.findall(r":(\w{64})", match[4])
    }


def find_wheels(folder: Path, lock: dict[str, str]) -> list[tuple[Path, str]]:
    """The wheels in the folder with their SHA-256, sorted. BuildError when one is not in the lock."""
    found = []
    for path in sorted(folder.glob("*.whl")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest not in lock:
            raise BuildError(f"{path} has the SHA-256 {digest}, which is not in the lock: download the wheels again.")
        found.append((path, digest))
    if not found:
        raise BuildError(f"There are no wheels in {folder}. docker/README.md says how to fetch them.")
    return found


def distribution(path: Path) -> str:
    """Name of a wheel's distribution as lock files write it, from its file name."""
    return path.name.partition("-")[0].lower().replace("_", "-")


def unpack_wheel(
    layer: Layer, path: Path, sha256: str, leave_out: Sequence[str] = (), *, stripped: bool = True
) -> Wheel:
    """Add the wheel's files to the layer, but for those that a pattern of `leave_out` matches."""
    with zipfile.ZipFile(path) as archive:
        for info in sorted(archive.infolist(), key=lambda entry: entry.filename):
            name = info.filename
            if name.endswith("/") or any(fnmatch.fnmatchcase(name, pattern) for pattern in leave_out):
                continue
            top, _, rest = name.partition("/")
            if top.endswith(".data"):
                kind, _, rest = rest.partition("/")
                if kind in ("scripts", "data", "headers"):
                    continue
                if kind not in ("purelib", "platlib"):
                    raise BuildError(f"{path.name} holds {name}, of a kind that no wheel has.")
                name = rest
            if ".." in name.split("/") or name.startswith("/"):
                raise BuildError(f"{path.name} holds the path {name}, which leads out of it.")
            data = archive.read(info)
            mode = 0o755 if info.external_attr >> 16 & stat.S_IXUSR else 0o644
            layer.add_file(f"{SITE}/{name}", strip(data) if stripped else data, mode)
    return describe_wheel(path, sha256)


def describe_wheel(path: Path, sha256: str) -> Wheel:
    """What the wheel's METADATA says it is."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        if len(names) != 1:
            raise BuildError(f"{path.name} has no METADATA.")
        fields = email.parser.BytesHeaderParser().parsebytes(archive.read(names[0]))
    return Wheel(fields["Name"], fields["Version"], _licence(fields), sha256)


def _licence(fields: email.message.Message) -> str:
    """SPDX expression where the wheel has one, else what it says of its licence; empty when it says nothing."""
    if fields["License-Expression"]:
        return str(fields["License-Expression"])
    names = [str(line).split(" :: ")[-1] for line in fields.get_all("Classifier", []) if line.startswith("License ::")]
    first = str(fields["License"] or "").strip().splitlines()
    return "; ".join(names) or (first[0] if first else "")


def compile_python(layer: Layer, version: str) -> int:
    """Add a .pyc for every .py that compiles; returns their number. BuildError unless this Python is the image's."""
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if running != version:
        raise BuildError(f"The image has Python {version}, and compiled files are that version's: run this with it.")
    sources = sorted(path for path in layer.entries if path.endswith(".py"))
    num_compiled = 0
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.py"), Path(folder, "source.pyc")
        for path in sources:
            source.write_bytes(layer.entries[path].data)
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            try:
                py_compile.compile(str(source), str(target), f"/{path}", doraise=True, invalidation_mode=mode, quiet=2)
            except py_compile.PyCompileError:
                continue  # templates and files for other versions of Python, which nothing imports
            place, _, name = path.rpartition("/")
            tag = sys.implementation.cache_tag
            layer.add_file(f"{place}/__pycache__/{name.removesuffix('.py')}.{tag}.pyc", target.read_bytes())
            num_compiled += 1
    return num_compiled
