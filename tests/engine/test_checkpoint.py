import json
import os
import shutil
import struct

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from vashista.engine.checkpoint import Checkpoint
from vashista.engine.checkpoint_files import INDEX_NAME, SINGLE_NAME, list_tensors
from vashista.engine.errors import CheckpointError, ModelFolderError, PickleRefusedError

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="session")
def sharded_source(tmp_path_factory):
    return tiny_models.build("llama", tmp_path_factory.mktemp("sharded"), max_shard_size="200KB", vocab_size=8192)


@pytest.fixture
def sharded(sharded_source, tmp_path):
    """A model in several files; its index."""
    shutil.copytree(sharded_source, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def single(tmp_path):
    """A folder with one file of three small tensors."""
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.full((4,), 1.5, dtype=torch.bfloat16),
        "c": torch.ones(2, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / SINGLE_NAME)
    return tmp_path


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def edit_index(folder, edit):
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def write_header(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_every_tensor_of_a_sharded_model_is_read_as_it_was_written(sharded):
    expected = tiny_models.reference(sharded).state_dict()
    assert len(shards(sharded)) > 2
    with Checkpoint.open(sharded) as checkpoint:
        assert set(checkpoint.names) == set(expected)
        for name, tensor in expected.items():
            read = checkpoint.read(name, tuple(tensor.shape), dtype=torch.float32)
            torch.testing.assert_close(read, tensor, rtol=0, atol=0)
        checkpoint.finish(is_tied=False)
    assert checkpoint.num_parameters == sum(tensor.numel() for tensor in expected.values())


def test_a_tensor_is_cast_once_and_owns_its_memory(single):
    with Checkpoint.open(single) as checkpoint:
        read = checkpoint.read("b", (4,), dtype=torch.float32)
        same = checkpoint.read("a", (2, 3), dtype=torch.float32)
    before = same.clone()
    (single / SINGLE_NAME).write_bytes(bytes((single / SINGLE_NAME).stat().st_size))
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, torch.full((4,), 1.5))
    torch.testing.assert_close(same, before)


def test_progress_goes_up_to_all_bytes(single):
    seen = []
    with Checkpoint.open(single, lambda *step: seen.append(step)) as checkpoint:
        checkpoint.read("a", (2, 3), dtype=torch.float32)
        checkpoint.read("a", (2, 3), dtype=torch.float32)
        checkpoint.read("b", (4,), dtype=torch.float32)
    assert checkpoint.num_bytes == 24 + 8 + 16
    assert seen == [(24, 48), (32, 48)]


def test_a_missing_tensor_is_named(single):
    with Checkpoint.open(single) as checkpoint:
        assert not checkpoint.has("model.norm.weight")
        with pytest.raises(CheckpointError, match=r"no tensor model\.norm\.weight"):
            checkpoint.read("model.norm.weight", (3,), dtype=torch.float32)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(single):
    with Checkpoint.open(single) as checkpoint, pytest.raises(CheckpointError, match=r"a has shape \[2, 3\].*\[3, 2\]"):
        checkpoint.read("a", (3, 2), dtype=torch.float32)


def test_a_tensor_of_an_unsupported_dtype_is_refused(single):
    with Checkpoint.open(single) as checkpoint, pytest.raises(CheckpointError, match=r"c is stored as I64; .*F32"):
        checkpoint.read("c", (2,), dtype=torch.float32)


def test_unexpected_tensors_are_named(single):
    with Checkpoint.open(single) as checkpoint:
        checkpoint.read("a", (2, 3), dtype=torch.float32)
        with pytest.raises(CheckpointError, match="does not use: b, c"):
            checkpoint.finish(is_tied=False)


def test_rotary_buffers_and_a_tied_head_are_not_unexpected(tmp_path):
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight")
    save_file({name: torch.ones(2) for name in names}, tmp_path / SINGLE_NAME)
    seen = []
    with Checkpoint.open(tmp_path, lambda *step: seen.append(step)) as checkpoint:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            checkpoint.finish(is_tied=False)
        checkpoint.finish(is_tied=True)
    assert seen[-1] == (16, 16)


def test_a_missing_shard_is_named(sharded):
    gone = shards(sharded)[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_a_truncated_shard_is_named(kept, sharded):
    shard = shards(sharded)[1]
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{shard.name} is (truncated|not a safetensors file)"):
        Checkpoint.open(sharded)


def test_bytes_after_the_last_tensor_are_refused(single):
    with (single / SINGLE_NAME).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="too long"):
        Checkpoint.open(single)


def test_swapped_shards_are_found_by_their_tensors(sharded):
    first, second = shards(sharded)[:2]
    first.rename(sharded / "aside")
    second.rename(first)
    (sharded / "aside").rename(second)
    with pytest.raises(CheckpointError, match=rf"{first.name} lacks .*; were shards swapped\?"):
        Checkpoint.open(sharded)


def test_a_tensor_that_the_index_does_not_place_is_refused(sharded):
    edit_index(sharded, lambda places: places.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"holds model\.norm\.weight"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["model-00009-of-00002.safetensors", SINGLE_NAME, "adapter_model.safetensors"])
def test_an_extra_file_beside_an_index_is_refused(name, sharded):
    save_file({"x": torch.ones(1)}, sharded / name)
    with pytest.raises(CheckpointError, match=f"{name} does not belong"):
        Checkpoint.open(sharded)


def test_an_extra_file_beside_a_single_one_is_refused(single):
    save_file({"x": torch.ones(1)}, single / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors does not belong"):
        Checkpoint.open(single)


def test_the_publishers_own_copy_of_mistral_weights_is_left_alone(single):
    (single / "consolidated.safetensors").write_bytes(b"another format")
    assert set(list_tensors(single)) == {"a", "b", "c"}


def test_parts_without_an_index_are_refused(single):
    (single / SINGLE_NAME).rename(single / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="needs the index"):
        Checkpoint.open(single)


@pytest.mark.parametrize(
    "place",
    [
        "/etc/model.safetensors",
        "../model.safetensors",
        "sub/model.safetensors",
        "..\\m.safetensors",
        "m\0.safetensors",
        "weights.bin",
        "",
        7,
        None,
    ],
)
def test_an_index_cannot_lead_anywhere_but_to_safetensors_in_the_folder(place, sharded):
    edit_index(sharded, lambda places: places.update({EMBEDDING: place}))
    with pytest.raises(CheckpointError, match=EMBEDDING):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 99_999])
def test_a_damaged_index_is_refused(text, sharded):
    (sharded / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        Checkpoint.open(sharded)


def test_a_symlink_out_of_the_folder_is_refused(single, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / SINGLE_NAME
    (single / SINGLE_NAME).rename(outside)
    (single / SINGLE_NAME).symlink_to(outside)
    with pytest.raises(CheckpointError, match="symlink out of the model folder"):
        Checkpoint.open(single)
    outside.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(single)


def test_the_layout_of_a_hub_cache_and_a_symlinked_folder_work(single, tmp_path_factory):
    cache = tmp_path_factory.mktemp("models--x")
    (cache / "blobs").mkdir()
    (cache / "snapshots" / "abc").mkdir(parents=True)
    shutil.copy(single / SINGLE_NAME, cache / "blobs" / "0123")
    (cache / "snapshots" / "abc" / SINGLE_NAME).symlink_to("../../blobs/0123")
    link = tmp_path_factory.mktemp("links") / "model"
    link.symlink_to(cache / "snapshots" / "abc")
    for folder in (cache / "snapshots" / "abc", link):
        with Checkpoint.open(folder) as checkpoint:
            assert checkpoint.read("b", (4,), dtype=torch.float32).sum() == 6


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[]",
        b"{" * 1000,
        b'{"a"\xff}',
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": "22", "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": 3, "shape": [2], "data_offsets": [0, 8]}},
    ],
)
def test_a_garbage_header_is_refused(header, tmp_path):
    write_header(tmp_path / SINGLE_NAME, header, bytes(8))
    with pytest.raises(CheckpointError, match=f"{SINGLE_NAME} has a damaged header"):
        Checkpoint.open(tmp_path)


def test_a_file_of_random_bytes_is_refused(tmp_path):
    (tmp_path / SINGLE_NAME).write_bytes(b"\xff" * 1000)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint.open(tmp_path)


def test_overlapping_tensors_are_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_header(tmp_path / SINGLE_NAME, {"a": entry, "b": entry}, bytes(8))
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read("a", (2,), dtype=torch.float32)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_a_folder_with_pickle_weights_only_is_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(PickleRefusedError, match=name):
        Checkpoint.open(tmp_path)


def test_pickle_beside_safetensors_is_ignored(single):
    (single / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "a" in list_tensors(single)


def test_a_folder_without_weights_says_what_it_lacks(tmp_path):
    with pytest.raises(ModelFolderError, match=f"neither {SINGLE_NAME} nor {INDEX_NAME}"):
        Checkpoint.open(tmp_path)


def test_a_file_that_cannot_be_opened_is_named(single):
    path = single / SINGLE_NAME
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelFolderError, match=f"{SINGLE_NAME} cannot be read"):
        Checkpoint.open(single)


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(single):
    (single / SINGLE_NAME).unlink()
    os.mkfifo(single / SINGLE_NAME)
    with pytest.raises(ModelFolderError, match="it is not a plain file"):
        Checkpoint.open(single)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_read_permission_is_named(single):
    (single / SINGLE_NAME).chmod(0)
    with pytest.raises(ModelFolderError, match="Permission denied"):
        Checkpoint.open(single)
