"""The bundle's one .tar, byte for byte the same from the same files, and its parts for small media.

What is in it is compressed already (wheels, packages, weights, the runtime), so the tar around it is plain: every tar
reads it, in one pass, and a rebuild does not depend on a compressor.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from bundle.manifest import CHUNK_BYTES, BundleError, File, describe

TIME_S = 1767225600
"""2026-01-01, of every file: a bundle depends on nothing but its content."""
EXECUTABLE = ("install.sh",)
MAX_PARTS = 999


def write_tar(out: Path, top: str, contents: Mapping[str, bytes | Path]) -> None:
    """Write the files below the folder `top`, install.sh and MANIFEST first."""
    first = {"README.txt": 0, "install.sh": 1, "MANIFEST": 2}
    aside = out.with_name(out.name + ".new")
    with tarfile.open(aside, "w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(contents, key=lambda name: (first.get(name, 3), name)):
            content = contents[path]
            info = tarfile.TarInfo(f"{top}/{path}")
            info.mtime, info.mode = TIME_S, 0o755 if path in EXECUTABLE else 0o644
            info.size = len(content) if isinstance(content, bytes) else content.stat().st_size
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
                tar.addfile(info, file)
    aside.replace(out)


def split(path: Path, part_bytes: int) -> list[Path]:
    """PATH.001, PATH.002, … of at most `part_bytes` each, and PATH.sha256 for `sha256sum --check`; the tar goes."""
    num_parts = -(-path.stat().st_size // part_bytes)
    if num_parts > MAX_PARTS:
        raise BundleError(f"{path.name} would be {num_parts} parts, and {MAX_PARTS} are possible: give a larger size.")
    lines, parts = [f"{describe(path.name, path).sha256}  {path.name}\n"], []
    with path.open("rb") as file:
        for number in range(1, num_parts + 1):
            part = path.with_name(f"{path.name}.{number:03}")
            lines.append(f"{_copy(file, part, part_bytes)}  {part.name}\n")
            parts.append(part)
    path.with_name(path.name + ".sha256").write_text("".join(lines[1:] + lines[:1]), encoding="ascii")
    path.unlink()
    return parts


def _copy(file: IO[bytes], out: Path, num_bytes: int) -> str:
    digest = hashlib.sha256()
    with out.open("wb") as part:
        while num_bytes and (chunk := file.read(min(num_bytes, CHUNK_BYTES))):
            part.write(chunk)
            digest.update(chunk)
            num_bytes -= len(chunk)
    return digest.hexdigest()


def read_member(tar: Path, name: str) -> bytes | None:
    """Content of one small file of a bundle by its path below the top folder; None when it is not there."""
    with tarfile.open(tar) as archive:
        for info in archive:
            if info.name.partition("/")[2] == name and info.isreg():
                file = archive.extractfile(info)
                return file.read() if file else None
    return None


def describe_all(contents: Mapping[str, bytes | Path]) -> tuple[File, ...]:
    """The manifest's lines of all files."""
    return tuple(sorted(describe(path, content) for path, content in contents.items()))
