"""A cheap fingerprint of a model folder: tells models, sizes and fine-tunes apart without reading all weights.

SHA-256 over config.json, and over each safetensors file's name, size, header and `NUM_SAMPLES` pieces of
`SAMPLE_BYTES` spread over its data. It names what a support profile was measured on; it is no proof that every weight
is right (`vashista models inspect --digest` hashes everything). No torch here.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from vashista.engine.checkpoint_files import FOREIGN_PREFIX, list_tensors
from vashista.engine.errors import ModelFolderError
from vashista.engine.model_folder import check_folder, read_text

NUM_SAMPLES = 64
SAMPLE_BYTES = 4096


def model_digest(folder: str | Path) -> str:
    """Hexadecimal digest of the model in this folder; raises the ModelError of a folder that is no model."""
    path = check_folder(folder)
    digest = hashlib.sha256()
    _add(digest, read_text(path / "config.json").encode())
    list_tensors(path)  # the files belong together and their headers are sound
    names = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(".safetensors"))
    try:
        for name in names:
            if not name.startswith(FOREIGN_PREFIX):
                _add_file(digest, path / name)
    except OSError as error:
        raise ModelFolderError(f"{error.filename} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def _add(digest: hashlib._Hash, data: bytes) -> None:
    """The data with its length before it, so that no two lists of parts give the same bytes."""
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    num_bytes = path.stat().st_size
    _add(digest, path.name.encode())
    _add(digest, num_bytes.to_bytes(8, "little"))
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        _add(digest, file.read(header_bytes))
        start = file.tell()
        for sample in range(NUM_SAMPLES):
            file.seek(start + (num_bytes - start) * sample // NUM_SAMPLES)
            _add(digest, file.read(SAMPLE_BYTES))
