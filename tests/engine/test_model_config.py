import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from tiny_models import BUNDLED, edit_config

from vashista.engine.errors import (
    ModelConfigError,
    ModelFolderError,
    UnsupportedArchitectureError,
    UnsupportedRopeError,
)
from vashista.engine.model_config import GenerationDefaults, load_model_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_the_bundled_model_is_understood():
    config = load_model_config(Path(__file__).parents[2] / "deploy" / "models" / "reference-26m")
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (8, 8, 2, 64)
    assert config.rope.theta == 500000.0
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (1,)
    assert config.dtype == "bfloat16"


def test_reading_a_config_does_not_import_torch():
    code = f"""
import sys
from vashista.engine import chat_template, detokenizer, grammar, model_config, tokenizer
model_config.load_model_config({str(BUNDLED)!r})
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_what_transformers_writes_is_read_as_transformers_reads_it(kind, tmp_path):
    folder = tiny_models.build(kind, tmp_path, num_hidden_layers=3)
    config = load_model_config(folder)
    model = tiny_models.reference(folder)
    judge = model.config
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert config.architecture == type(model).__name__
    assert config.head_dim == attention.head_dim
    assert config.num_kv_heads == judge.num_key_value_heads
    assert config.qkv_bias == (attention.q_proj.bias is not None)
    assert config.o_bias == (attention.o_proj.bias is not None)
    assert config.mlp_bias == (mlp.down_proj.bias is not None)
    assert config.qk_norm == hasattr(attention, "q_norm")
    assert config.tie_word_embeddings == judge.tie_word_embeddings
    assert config.rope.type == judge.rope_parameters["rope_type"]
    assert config.rope.theta == judge.rope_parameters["rope_theta"]
    if config.architecture == "MistralForCausalLM":
        windows = [judge.sliding_window] * 3
    else:
        windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
    assert list(config.layer_windows) == windows


def test_old_and_new_ways_of_writing_rope_mean_the_same(folder):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    edit_config(folder, rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    old = load_model_config(folder)
    edit_config(folder, rope_theta=..., rope_scaling=..., torch_dtype=..., dtype="float16")
    edit_config(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert load_model_config(folder) == old
    assert old.rope.original_max_position_embeddings == 64


def test_rope_scaling_added_by_hand_beats_rope_parameters(folder):
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    edit_config(folder, rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_theta=9.0)
    rope = load_model_config(folder).rope
    assert (rope.type, rope.factor, rope.theta) == ("linear", 2.0, 9.0)


def test_null_means_absent(folder):
    edit_config(folder, rope_scaling=None, num_key_value_heads=None, head_dim=None, quantization_config=None)
    config = load_model_config(folder)
    assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (4, 16, 10000.0)


def test_generation_config_decides_the_end_of_sequence_and_the_defaults(folder):
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 8, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20})
    )
    config = load_model_config(folder)
    assert config.eos_token_ids == (7, 8)
    assert config.generation_defaults == GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20)


def test_a_publisher_who_asks_for_greedy_decoding_gets_temperature_0(folder):
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert load_model_config(folder).generation_defaults.temperature == 0.0


@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "torch_dtype",
    ],
)
def test_a_missing_field_is_named(field, folder):
    edit_config(folder, **{field: ...})
    with pytest.raises(ModelConfigError, match=rf"config\.json: {field.removeprefix('torch_')} is missing"):
        load_model_config(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", -64),
        ("hidden_size", "64"),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2.5),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("hidden_size", 66),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", float("nan")),
        ("hidden_act", "gelu"),
        ("torch_dtype", "int8"),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", 100),
        ("eos_token_id", [1, "2"]),
        ("quantization_config", {"bits": 4}),
        ("rope_theta", 0),
        ("rope_scaling", "linear"),
        ("sliding_window", 12),
        ("partial_rotary_factor", 0.5),
        ("architectures", []),
    ],
)
def test_a_wrong_field_is_named(field, value, folder):
    edit_config(folder, **{field: value})
    name = {"hidden_size": "hidden_size|head_dim"}.get(field, field)
    with pytest.raises(ModelConfigError, match=rf"config\.json: ({name})"):
        load_model_config(folder)


@pytest.mark.parametrize(
    ("scaling", "field"),
    [
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": -1}, "factor"),
        ({"type": "linear", "factor": 2, "beta_fast": 32}, "beta_fast"),
        ({"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}, "high_freq_factor"),
        ({"type": "yarn", "factor": 2, "original_max_position_embeddings": "64"}, "original_max_position_embeddings"),
        ({"type": "yarn", "factor": 2, "truncate": 1}, "truncate"),
    ],
)
def test_a_wrong_rope_field_is_named(scaling, field, folder):
    edit_config(folder, rope_scaling=scaling)
    with pytest.raises(ModelConfigError, match=rf"rope_scaling\.{field}"):
        load_model_config(folder)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "mrope", "su", ""])
def test_an_unknown_rope_type_lists_the_supported_ones(rope_type, folder):
    edit_config(folder, rope_scaling={"type": rope_type, "factor": 2.0})
    with pytest.raises(UnsupportedRopeError, match="default, linear, llama3, yarn"):
        load_model_config(folder)


def test_rope_that_differs_between_layers_is_refused(folder):
    edit_config(folder, rope_parameters={"full_attention": {"rope_type": "default"}})
    with pytest.raises(UnsupportedRopeError, match="layers"):
        load_model_config(folder)


def test_an_unknown_architecture_lists_the_supported_ones(folder):
    edit_config(folder, architectures=["GemmaForCausalLM"])
    with pytest.raises(UnsupportedArchitectureError, match=r"GemmaForCausalLM.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        load_model_config(folder)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, (None, None, None)),
        ({"sliding_window": 16, "use_sliding_window": False}, (None, None, None)),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, (None, None, 16)),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, (16, 16, 16)),
        (
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (16, None, 16),
        ),
    ],
)
def test_qwen_says_which_layers_slide(fields, windows, folder):
    edit_config(folder, architectures=["Qwen2ForCausalLM"], **fields)
    assert load_model_config(folder).layer_windows == windows


@pytest.mark.parametrize(
    "types", [["full_attention"], ["full_attention"] * 2 + ["linear_attention"], ["sliding_attention"] * 3]
)
def test_layer_types_that_contradict_the_rest_are_refused(types, folder):
    edit_config(folder, architectures=["Qwen3ForCausalLM"], head_dim=16, layer_types=types)
    with pytest.raises(ModelConfigError, match="layer_types"):
        load_model_config(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense", '{"a":' * 100_000, '{"architectures": NaN}'])
def test_a_config_that_is_no_json_object_is_refused(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelConfigError, match=r"config\.json"):
        load_model_config(folder)


def test_a_pipe_or_a_device_in_place_of_a_file_is_refused_and_not_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelFolderError, match=r"config\.json cannot be read: it is not a plain file"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ModelFolderError, match=r"config\.json cannot be read: it is not a plain file"):
        load_model_config(tmp_path)


def test_a_repetition_penalty_that_leaves_float32_is_refused(folder):
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1e-40}')
    with pytest.raises(ModelConfigError, match=r"repetition_penalty is 1e-40, but must be a number of at least 0.01"):
        load_model_config(folder)


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(ModelFolderError, match="does not exist"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match=r"config\.json is missing"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelFolderError, match="UTF-8"):
        load_model_config(tmp_path)
    with pytest.raises(ModelFolderError, match="not a folder"):
        load_model_config(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelFolderError, match="cannot be read"):
        load_model_config(tmp_path)
