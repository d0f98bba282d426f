"""The cheap fingerprint of a model folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vashista.engine.errors import CheckpointError, ModelFolderError
from vashista.engine.model_digest import model_digest


def write(folder: Path, *, value: float = 0.0, config: str = "{}", rows: int = 64) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    weights = torch.zeros(rows, 64)
    weights[-1, -1] = value
    save_file({"weight": weights}, folder / "model.safetensors")
    return folder


def test_a_copy_of_a_model_has_the_same_digest_whatever_else_lies_in_its_folder(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a"), write(tmp_path / "b")
    (other / "support_profile.json").write_text("{}")
    (other / "consolidated.safetensors").write_bytes(b"another format's copy")
    assert model_digest(one) == model_digest(other)


def test_other_weights_another_config_and_another_shape_have_other_digests(tmp_path: Path) -> None:
    folders = [
        write(tmp_path / "a"),
        write(tmp_path / "b", value=1.0),  # the very last weight
        write(tmp_path / "c", config='{"rope_theta": 1}'),
        write(tmp_path / "d", rows=65),
    ]
    assert len({model_digest(folder) for folder in folders}) == 4


def test_a_large_file_is_sampled_from_its_start_to_its_end(tmp_path: Path) -> None:
    rows = 1 << 16  # 16 MiB, of which 256 KiB are read
    one = write(tmp_path / "a", rows=rows)
    other = tmp_path / "b"
    other.mkdir()
    (other / "config.json").write_text("{}")
    save_file({"weight": torch.full((rows, 64), 1e-9)}, other / "model.safetensors")
    assert model_digest(one) != model_digest(other)


def test_a_folder_that_is_no_model_has_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError):
        model_digest(tmp_path / "none")
    folder = write(tmp_path / "a")
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError):
        model_digest(folder)
