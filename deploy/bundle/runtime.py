"""Python 3.11 with the libraries it needs, libc among them, as one tar: the pinned Debian packages of the images.

A machine with another Python, another libc or no Python at all runs it too: `deploy/install/launcher.c` starts it with
its own loader. Nothing of the packages' scripts runs, and only Python, its libraries and the texts of their licences
are taken. There are no links in it, so that a list of SHA-256 says all about an installed one.
"""

from __future__ import annotations

import gzip
import io
import posixpath
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from image.archive import Entry, Layer
from image.debian import Package, read_pins, unpack_package

from bundle.archive import TIME_S

TAKEN = ("usr/bin/python3.11", "usr/lib/python3.11/", "usr/lib/x86_64-linux-gnu/", "usr/share/doc/", "var/lib/dpkg/")
HEADERS = ("usr/include/python3.11/", "usr/include/x86_64-linux-gnu/python3.11/")
"""Triton compiles launchers against them: in the CUDA variant."""
LEFT_OUT = ("usr/lib/python3.11/sitecustomize.py", "usr/lib/python3.11/config-3.11")


def make_runtime(pins: Sequence[Path], folder: Path, *, with_headers: bool) -> tuple[bytes, list[Package]]:
    """The runtime as .tar.gz and the packages in it; image.archive.BuildError for one that is not the pinned one."""
    layer = Layer()
    packages = [unpack_package(layer, folder / name, sha256) for path in pins for sha256, name in read_pins(path)]
    taken = TAKEN + HEADERS if with_headers else TAKEN
    kept = without_links(
        {
            path: entry
            for path, entry in layer.entries.items()
            if path.startswith(taken) and not path.startswith(LEFT_OUT) and entry.kind != tarfile.DIRTYPE
        }
    )
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path, entry in sorted(kept.items()):
            info = tarfile.TarInfo(path)
            info.mode, info.mtime, info.size = entry.mode, TIME_S, len(entry.data)
            tar.addfile(info, io.BytesIO(entry.data))
    return gzip.compress(packed.getvalue(), 9, mtime=0), packages


def without_links(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Each link as the file that it leads to; files that only links led to, such as libz.so.1.2.13, go.

    Links that lead out of what was taken go too.
    """
    files = {path: entry for path, entry in entries.items() if entry.kind == tarfile.REGTYPE}
    found, led_to = dict(files), set()
    for path, entry in entries.items():
        if entry.kind == tarfile.SYMTYPE:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), entry.link))
            if target in files:
                found[path] = files[target]
                led_to.add(target)
    return {path: entry for path, entry in found.items() if path not in led_to or ".so" not in path}
