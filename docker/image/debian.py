"""Debian packages unpacked into a layer, without dpkg, without running a script of theirs, checked by their SHA-256.

`docker/packages-*.txt` pin each file: `SHA-256  name_version_architecture.deb`. What Debian calls documentation is left
out but for the copyright files; the control file goes to /var/lib/dpkg/status.d, where scanners of images look.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import lzma
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from image.archive import BuildError, Layer

MERGED = ("bin", "sbin", "lib", "lib64")
"""Links into /usr, as Debian 12 has them."""
LEFT_OUT = (
    "usr/share/doc/",
    "usr/share/man/",
    "usr/share/info/",
    "usr/share/lintian/",
    "usr/share/locale/",
    "usr/share/gdb/",
    "usr/share/bug/",
)
MAGIC = b"!<arch>\n"


@dataclass(frozen=True)
class Package:
    """One unpacked package."""

    name: str
    version: str
    architecture: str
    sha256: str


def read_pins(path: Path) -> list[tuple[str, str]]:
    """(SHA-256, file name) of each line; BuildError on a line of another form."""
    pins = []
    for line in path.read_text(encoding="ascii").splitlines():
        if not line or line.startswith("#"):
            continue
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name.endswith(".deb"):
            raise BuildError(f"{path}: {line!r} should be a SHA-256, two blanks and the name of a .deb file.")
        pins.append((digest, name))
    return pins


def unpack_package(layer: Layer, path: Path, sha256: str, leave_out: Sequence[str] = ()) -> Package:
    """Add the package's files to the layer, but for those that a pattern of `leave_out` matches.

    BuildError when the file is missing, changed or no package.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror}. docker/README.md says how to fetch it.") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise BuildError(f"{path} has the SHA-256 {found}, but {sha256} is pinned: fetch the pinned version again.")
    members = dict(_members(data))
    control = _control(_tar(members, "control.tar"))
    for info, content in _files(_tar(members, "data.tar")):
        _add(layer, info, content, leave_out)
    package = Package(control["Package"], control["Version"], control["Architecture"], sha256)
    text = "".join(f"{name}: {value}\n" for name, value in control.items())
    layer.add_file(f"var/lib/dpkg/status.d/{package.name}", text.encode())
    return package


def add_merged_links(layer: Layer) -> None:
    """/bin, /sbin, /lib and /lib64 as links into /usr."""
    for name in MERGED:
        layer.add_link(name, f"usr/{name}")


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of the members of an ar archive."""
    if not data.startswith(MAGIC):
        raise BuildError("A .deb file does not begin as one.")
    at = len(MAGIC)
    while at + 60 <= len(data):
        name = data[at : at + 16].decode("ascii").strip().rstrip("/")
        size = int(data[at + 48 : at + 58])
        yield name, data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2


def _tar(members: dict[str, bytes], stem: str) -> tarfile.TarFile:
    if f"{stem}.xz" not in members:
        raise BuildError(f"A .deb file has no {stem}.xz, but {', '.join(members)}.")
    return tarfile.open(fileobj=io.BytesIO(lzma.decompress(members[f"{stem}.xz"])))


def _control(tar: tarfile.TarFile) -> dict[str, str]:
    """Fields of the control file; lines that go on a field stay in it."""
    file = tar.extractfile("./control")
    assert file is not None
    fields: dict[str, str] = {}
    name = ""
    for line in file.read().decode().splitlines():
        if line.startswith((" ", "\t")):
            fields[name] += "\n" + line
        elif line:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


def _files(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for info in tar:
        if info.islnk():
            original = tar.extractfile(info)
            yield info, original.read() if original else b""
        elif info.isreg():
            file = tar.extractfile(info)
            yield info, file.read() if file else b""
        elif info.issym() or info.isdir():
            yield info, b""
        else:
            raise BuildError(f"A package holds the device or pipe {info.name}.")


def _add(layer: Layer, info: tarfile.TarInfo, content: bytes, leave_out: Sequence[str]) -> None:
    path = info.name.removeprefix("./").strip("/")
    top, _, rest = path.partition("/")
    if top in MERGED:
        if not rest:
            return
        path = f"usr/{path}"
    if not path or (path.startswith(LEFT_OUT) and not path.endswith("/copyright")):
        return
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in leave_out):
        return
    if info.isdir():
        if info.mode & 0o1000:  # /tmp and its like
            layer.add_folder(path, info.mode)
    elif info.issym():
        layer.add_link(path, info.linkname)
    else:
        layer.add_file(path, content, info.mode & 0o755)  # no set-uid programs
