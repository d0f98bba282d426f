"""Reading the text files of a model folder.

Called by everything that reads a part of the folder (config, tokenizer, chat template, checkpoint index) on both sides
of the process border, so it imports no torch. A missing or unreadable file is a ModelFolderError; content that is not
a JSON object is the error the caller names.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from vashista.engine.errors import ModelError, ModelFolderError

MAX_TEXT_BYTES = 256 << 20
"""No text file of a model folder is near this (the largest tokenizer.json seen is 34 MB)."""


def check_folder(folder: str | Path) -> Path:
    """The folder as a Path; ModelFolderError when it is not a folder or cannot be listed."""
    path = Path(folder)
    try:
        if not path.exists():
            raise ModelFolderError(f"The model folder {path} does not exist.")
        if not path.is_dir():
            raise ModelFolderError(f"{path} is not a folder; a model is a folder with config.json and *.safetensors.")
        next(path.iterdir(), None)
    except OSError as error:
        raise ModelFolderError(f"The model folder {path} cannot be read: {error.strerror or error}.") from error
    return path


def file_size(path: Path) -> int:
    """Bytes of a plain file; ModelFolderError for a pipe or a device, which may never end, and OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ModelFolderError(f"{path} cannot be read: it is not a plain file.")
    return status.st_size


def read_text(path: Path) -> str:
    """The file's text, without a byte order mark; ModelFolderError when it is missing, unreadable, huge or no UTF-8."""
    try:
        num_bytes = file_size(path)
        if num_bytes > MAX_TEXT_BYTES:
            raise ModelFolderError(f"{path} has {num_bytes} bytes; at most {MAX_TEXT_BYTES} are read.")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ModelFolderError(f"{path.name} is missing in the model folder {path.parent}.") from error
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ModelFolderError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}."
        ) from error


def read_json_object(path: Path, error: type[ModelError]) -> dict[str, Any]:
    """The JSON object in the file; `error` when the text is not one."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not valid JSON: {cause}.") from cause
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def read_optional_json_object(path: Path, error: type[ModelError]) -> dict[str, Any]:
    """The same, and {} when there is no such file."""
    return read_json_object(path, error) if path.exists() else {}
