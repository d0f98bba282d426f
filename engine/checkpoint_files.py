"""Which safetensors files a model folder has, and what their headers say: names, shapes, dtypes, byte ranges.

`engine/checkpoint.py` asks here before it maps anything. Every file is checked against its own header and against the
index, so a missing, truncated, swapped or extra shard is found before the first weight is read.

Files are opened by plain names within the folder; an index cannot lead anywhere else. A symlinked file is followed only
when it stays inside the folder or points into the `blobs` of the hub cache that holds the folder; the folder itself may
be a symlink.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from vashista.engine.errors import CheckpointError, ModelFolderError, PickleRefusedError
from vashista.engine.model_folder import check_folder, file_size, read_json_object

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FOREIGN_PREFIX = "consolidated"
"""Publishers of Mistral models add their own format's copy of the weights under this name; it is left alone."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""
DTYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8}
DTYPE_BITS |= {"U16": 16, "U32": 32, "U64": 64, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "C64": 64}


class TensorEntry(msgspec.Struct, frozen=True):
    """One tensor of one file."""

    path: Path
    dtype: str
    """safetensors' name: F32, BF16, ..."""
    shape: tuple[int, ...]
    num_bytes: int


def list_tensors(folder: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of the folder by name; raises ModelFolderError, PickleRefusedError or CheckpointError."""
    path = check_folder(folder)
    found = _safetensors_in(path)
    index = path / INDEX_NAME
    if index.exists() or index.is_symlink():
        return _list_indexed(path, index, found)
    if SINGLE_NAME not in found:
        raise CheckpointError(
            f"{path} has {_some(found)}, but neither {SINGLE_NAME} nor {INDEX_NAME}; a model in parts needs the index."
        )
    _refuse_extra(found, {SINGLE_NAME}, f"there is no {INDEX_NAME}, so {SINGLE_NAME} must stand alone")
    return read_header(_inside(path, SINGLE_NAME))


def _safetensors_in(folder: Path) -> set[str]:
    names = {entry.name for entry in folder.iterdir()}
    found = {name for name in names if name.endswith(".safetensors") and not name.startswith(FOREIGN_PREFIX)}
    if not found and INDEX_NAME not in names:
        pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
        if pickles:
            raise PickleRefusedError(
                f"{folder} has its weights as pickle only ({_some(pickles)}); loading them would run code."
            )
        raise ModelFolderError(f"{folder} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME} is there.")
    return found


def _list_indexed(folder: Path, index: Path, found: set[str]) -> dict[str, TensorEntry]:
    weight_map = read_json_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_NAME} has no weight_map from tensor names to files.")
    for name, file in weight_map.items():
        _check_file_name(name, file)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if file not in found and not (folder / file).is_symlink()]
    if missing:
        raise CheckpointError(f"{INDEX_NAME} names {len(files)} files, but {_some(missing)} is not in {folder}.")
    _refuse_extra(found, set(files), f"{INDEX_NAME} does not name it")
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        held = read_header(_inside(folder, file))
        promised = {name for name, place in weight_map.items() if place == file}
        if promised - held.keys():
            raise CheckpointError(
                f"{file} lacks {_some(promised - held.keys())}, which {INDEX_NAME} places in it; were shards swapped?"
            )
        if held.keys() - promised:
            raise CheckpointError(
                f"{file} holds {_some(held.keys() - promised)}, which {INDEX_NAME} does not place in it."
            )
        tensors |= held
    return tensors


def _check_file_name(name: str, file: Any) -> None:
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        raise CheckpointError(f"{INDEX_NAME} places {name} in {file!r}, which is not the name of a safetensors file.")
    if "/" in file or "\\" in file or "\0" in file:
        raise CheckpointError(
            f"{INDEX_NAME} places {name} in {file!r}; only plain file names within the folder are possible."
        )


def _refuse_extra(found: set[str], expected: set[str], reason: str) -> None:
    extra = found - expected
    if extra:
        raise CheckpointError(f"{_some(extra)} does not belong to the checkpoint: {reason}. Move it away.")


def _inside(folder: Path, name: str) -> Path:
    """The file's path, once it is sure that no symlink leads out of the model."""
    try:
        home, target = folder.resolve(), (folder / name).resolve(strict=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} is a symlink to a file that does not exist.") from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be resolved: {error}.") from error
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in homes):
        raise CheckpointError(f"{name} is a symlink out of the model folder, to {target}; copy the file instead.")
    return target


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file; its size is checked against what its header promises."""
    try:
        file_bytes = file_size(path)
        with path.open("rb") as file:
            head = file.read(8)
            header_bytes = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= header_bytes <= MAX_HEADER_BYTES:
                raise CheckpointError(f"{path.name} is not a safetensors file: its header's length is {header_bytes}.")
            text = file.read(header_bytes)
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(text) < header_bytes:
        raise CheckpointError(f"{path.name} is truncated: it ends within its header, after {file_bytes} bytes.")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} has a damaged header: {error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name} has a damaged header: it is not a JSON object.")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, value) for name, value in header.items()}
    promised = 8 + header_bytes + max((value["data_offsets"][1] for value in header.values()), default=0)
    if file_bytes != promised:
        state = "truncated" if file_bytes < promised else "too long"
        raise CheckpointError(f"{path.name} is {state}: it has {file_bytes} bytes, its header promises {promised}.")
    return tensors


def _entry(path: Path, name: str, value: Any) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        is_right = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in [*shape, begin, end])
    except (KeyError, TypeError, ValueError):
        is_right = False
    if not is_right:
        raise CheckpointError(f"{path.name} has a damaged header: the entry of {name} is not one of a tensor.")
    if dtype in DTYPE_BITS and end - begin != math.prod(shape) * DTYPE_BITS[dtype] // 8:
        raise CheckpointError(
            f"{path.name} has a damaged header: {name} is {dtype} {shape}, which is not {end - begin} bytes."
        )
    return TensorEntry(path, dtype, tuple(shape), end - begin)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
