"""MANIFEST of a bundle: what it is, and SHA-256, size and path of every file in it. This text is what is signed.

    vashista-bundle 1
    version 0.1.0
    ...
    file <sha256> <bytes> <path>

One line a field, then one a file, sorted; `deploy/install/install.sh` reads it with sed, `unpack.py` with this format
in mind. A path is plain enough for a shell: letters, digits and a few signs, no blank, no leading dot or dash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MAGIC = "vashista-bundle 1"
NAME = "MANIFEST"
CHUNK_BYTES = 1 << 20
FIELD = re.compile(r"([a-z-]+) ([A-Za-z0-9._+=@%/-]+)")
PART = r"[A-Za-z0-9_][A-Za-z0-9._+=@%~-]*"
FILE = re.compile(rf"file ([0-9a-f]{{64}}) (\d+) ({PART}(?:/{PART})*)")


class BundleError(Exception):
    """The bundle cannot be built; the text says what is wrong and what would help."""


@dataclass(frozen=True, order=True)
class File:
    """One file of the bundle."""

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Manifest:
    """Fields by name, and all files but MANIFEST and signature/."""

    fields: dict[str, str]
    files: tuple[File, ...]

    def text(self) -> str:
        """The text that is signed; BundleError for a value or path that the format cannot hold."""
        lines = [MAGIC, *(f"{name} {value}" for name, value in self.fields.items())]
        for line in lines[1:]:
            if not FIELD.fullmatch(line):
                raise BundleError(f"The manifest cannot hold the field {line!r}.")
        for file in sorted(self.files):
            line = f"file {file.sha256} {file.num_bytes} {file.path}"
            if not FILE.fullmatch(line):
                raise BundleError(f"A bundle cannot hold a file of the name {file.path!r}: rename it.")
            lines.append(line)
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """The inverse of `text`; BundleError on any other text."""
        lines = text.split("\n")
        if lines[0] != MAGIC or lines.pop() != "":
            raise BundleError(f"This is no manifest of a bundle: it begins with {lines[0][:60]!r}.")
        fields: dict[str, str] = {}
        files: list[File] = []
        for line in lines[1:]:
            if match := FILE.fullmatch(line):
                files.append(File(match[3], match[1], int(match[2])))
            elif (match := FIELD.fullmatch(line)) and not files:
                fields[match[1]] = match[2]
            else:
                raise BundleError(f"A line of the manifest cannot be read: {line[:120]!r}.")
        return cls(fields, tuple(files))


def describe(path: str, content: bytes | Path) -> File:
    """The line of one file, read once."""
    if isinstance(content, bytes):
        return File(path, hashlib.sha256(content).hexdigest(), len(content))
    digest, num_bytes = hashlib.sha256(), 0
    with content.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return File(path, digest.hexdigest(), num_bytes)


def runtime_id(files: Iterable[File]) -> str:
    """16 hex digits that name what runtime/ and wheels/ hold: bundles with the same ones share what is installed."""
    parts = sorted(f"{file.sha256} {file.path}" for file in files if file.path.startswith(("runtime/", "wheels/")))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
