"""What `vashista calibrate` and `vashista diagnose` share: settings, numbers, progress bars and files written whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from vashista.engine import whole_file
from vashista.engine.errors import MeasurementError, ReportFileError
from vashista.engine.model_config import ModelConfig, load_model_config
from vashista.engine.sample_text import SampleTokens, read_sample_text
from vashista.engine.tokenizer import Tokenizer
from vashista.server.commands.options import given
from vashista.server.settings import Settings, load_settings

MODEL_SETTINGS = ["device", "dtype", "num_threads", "kv_cache_bytes"]
"""Settings of the server that both commands have as flags."""


def load_subject(
    model_dir: Path, text_path: Path | None, flags: Mapping[str, Any], config: Path | None
) -> tuple[Settings, ModelConfig, SampleTokens]:
    """Settings for one request at a time, the model's configuration, and the text it will read. Loads no weights."""
    values = {**given(flags), "model": str(model_dir), "max_running_requests": 1}
    settings = load_settings(values, os.environ, config=config)
    model_config = load_model_config(model_dir)
    tokens = SampleTokens(read_sample_text(text_path), Tokenizer.load(model_dir, model_config.vocab_size))
    return settings, model_config, tokens


def parse_numbers(name: str, text: str) -> list[int]:
    """Whole numbers from `2048,4096`. Raises MeasurementError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise MeasurementError(f"--{name} is {text!r}; it should be whole numbers such as 1,2,4.") from None


def check_writable(path: Path) -> None:
    """Raise ReportFileError now rather than after the measurement if the file cannot be written."""
    folder = path.parent
    if path.is_dir():
        raise ReportFileError(f"{path} cannot be written: it is a folder.")
    if path.exists() and not path.is_file():
        raise ReportFileError(f"{path} cannot be written: it is not a plain file.")
    if not folder.is_dir():
        raise ReportFileError(f"{path} cannot be written: there is no folder {folder}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ReportFileError(f"{path} cannot be written: no permission to write in {folder}.")


def write_whole(path: Path, text: str) -> None:
    """Write the file so that it is either whole or as it was before. Raises ReportFileError."""
    try:
        whole_file.write_whole(path, text.encode())
    except OSError as error:
        raise ReportFileError(f"{path} cannot be written: {error.strerror or error}.") from error


class _Bar:
    """A bar on stderr, when that is a terminal."""

    def __init__(self, quiet: bool, **attributes: Any) -> None:
        self._bar: Any = tqdm(leave=False, disable=True if quiet else None, **attributes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class LoadingBar(_Bar):
    """Loaded bytes; shown only if loading takes a while."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet, desc="Loading", unit="B", unit_scale=True, delay=0.5)

    def update(self, loaded_bytes: int, total_bytes: int) -> None:
        """So many bytes of so many are there."""
        self._bar.total = total_bytes
        self._bar.update(loaded_bytes - self._bar.n)


class MeasuringBar(_Bar):
    """Pieces of work done."""

    def __init__(self, total: int, unit: str, quiet: bool) -> None:
        super().__init__(quiet, desc="Measuring", unit=unit, total=total, delay=0.5)

    def advance(self, number: int = 1) -> None:
        """So many more are done."""
        self._bar.update(number)
