"""Layers and the archive that `docker load` and `podman load` take, byte for byte the same from the same files.

`docker/build.py` fills a `Layer` from packages and wheels; `write_archive` puts layers and the image's configuration
into one plain tar (the docker-archive format: manifest.json, the configuration and a tar for each layer).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
FOLDER_MODE = 0o755


class BuildError(Exception):
    """The image cannot be built; the text says what is wrong and what would help."""


@dataclass(frozen=True)
class Entry:
    """One file, link or folder of a layer."""

    kind: bytes
    """tarfile.REGTYPE, SYMTYPE or DIRTYPE."""
    mode: int = 0o644
    data: bytes = b""
    link: str = ""
    owner: int = 0


class Layer:
    """Files by their path without a leading slash; folders come by themselves."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def add_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """BuildError when another file has the path already."""
        self._add(path, Entry(tarfile.REGTYPE, mode, data))

    def add_link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._add(path, Entry(tarfile.SYMTYPE, 0o777, link=target))

    def add_folder(self, path: str, mode: int = FOLDER_MODE, owner: int = 0) -> None:
        """A folder that needs a mode or owner, or that would be empty."""
        self.entries[path.strip("/")] = Entry(tarfile.DIRTYPE, mode, owner=owner)

    def _add(self, path: str, entry: Entry) -> None:
        known = self.entries.get(path)
        if known is not None and known != entry:
            raise BuildError(f"Two packages have the file /{path}.")
        self.entries[path] = entry

    def write(self, path: Path, time_s: int) -> str:
        """Write the tar and return its SHA-256, which is the layer's diff id."""
        for name in list(self.entries):
            for parent in Path(name).parents:
                if str(parent) != ".":
                    self.entries.setdefault(str(parent), Entry(tarfile.DIRTYPE, FOLDER_MODE))
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for name, entry in sorted(self.entries.items()):
                info = tarfile.TarInfo(name)
                info.type, info.mode, info.linkname = entry.kind, entry.mode, entry.link
                info.uid = info.gid = entry.owner
                info.mtime, info.size = time_s, len(entry.data)
                tar.addfile(info, io.BytesIO(entry.data))
        return digest_file(path)


def digest_file(path: Path) -> str:
    """SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def canonical(value: object) -> bytes:
    """JSON that is the same for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def write_archive(path: Path, tag: str, config: dict[str, Any], layers: Iterable[tuple[str, Path]]) -> str:
    """Write the image's tar; `layers` are (diff id, file). Returns the image id, the SHA-256 of its configuration."""
    layers = list(layers)
    config = {**config, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}" for diff_id, _ in layers]}}
    body = canonical(config)
    image_id = hashlib.sha256(body).hexdigest()
    names = [f"{diff_id}.tar" for diff_id, _ in layers]
    manifest = canonical([{"Config": f"{image_id}.json", "RepoTags": [tag], "Layers": names}])
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in (("manifest.json", manifest), (f"{image_id}.json", body)):
            _add_member(tar, name, len(data), io.BytesIO(data))
        for name, (_, layer) in zip(names, layers, strict=True):
            with layer.open("rb") as file:
                _add_member(tar, name, layer.stat().st_size, file)
    return image_id


def _add_member(tar: tarfile.TarFile, name: str, num_bytes: int, data: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = num_bytes, 0o644, 0
    tar.addfile(info, data)
