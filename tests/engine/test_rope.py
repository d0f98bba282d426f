import msgspec
import pytest
import tiny_models
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vashista.engine.model_config import load_model_config
from vashista.engine.rope import rotary_frequencies, rotary_table

YARN = tiny_models.YARN_ROPE
SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": tiny_models.LINEAR_ROPE,
    "llama3": tiny_models.LLAMA3_ROPE,
    "yarn": YARN,
    "yarn without rounding": YARN | {"truncate": False},
    "yarn with mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
    "yarn with one mscale": YARN | {"mscale": 0.7},
    "yarn with its factor given": YARN | {"attention_factor": 1.25},
    "yarn with other borders": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "rope_theta": 1e6},
    "yarn with borders that meet": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
}


def pair(tmp_path, scaling, head_dim=64):
    """(our config, transformers' module) for a model with this scaling; weights do not matter."""
    fields = tiny_models.BASE | {
        "rope_parameters": scaling,
        "head_dim": head_dim,
        "architectures": ["LlamaForCausalLM"],
    }
    judge = transformers.LlamaConfig(**fields, dtype="float32")
    judge.save_pretrained(tmp_path)
    return load_model_config(tmp_path), LlamaRotaryEmbedding(judge)


@pytest.mark.parametrize("head_dim", [24, 64, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(name, head_dim, tmp_path):
    config, judge = pair(tmp_path, SCALINGS[name], head_dim)
    inv_freq, factor = rotary_frequencies(config)
    assert factor == pytest.approx(judge.attention_scaling, rel=1e-12)
    torch.testing.assert_close(inv_freq, judge.inv_freq, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["default", "llama3", "yarn with mscale"])
def test_the_table_equals_cos_and_sin_of_transformers_far_into_the_context(name, tmp_path):
    config, judge = pair(tmp_path, SCALINGS[name])
    cos, sin = rotary_table(config, 131072, "cpu")
    positions = torch.tensor([[0, 1, 63, 4095, 131071]])
    judge_cos, judge_sin = judge(torch.zeros(1), positions)
    assert cos.shape == (131072, 32)
    torch.testing.assert_close(cos[positions[0]], judge_cos[0, :, :32], rtol=0, atol=0)
    torch.testing.assert_close(sin[positions[0]], judge_sin[0, :, :32], rtol=0, atol=0)


def test_yarn_without_a_factor_takes_the_ratio_of_the_contexts(tmp_path):
    config, _ = pair(tmp_path, YARN)
    tiny_models.edit_config(tmp_path, rope_parameters={key: YARN[key] for key in YARN if key != "factor"})
    other = load_model_config(tmp_path)
    assert other.rope == msgspec.structs.replace(config.rope, factor=8.0)
