"""A checkpoint as a model folder: what transformers and the engine load as it stands.

    python bench/train_reference/export.py --checkpoint FOLDER/checkpoint.pt --tokenizer tokenizer.json --output MODEL

Weights in bf16 under transformers' names for a Llama, config, tokenizer, chat template, and greedy decoding as the
default. `card.py` writes the README beside them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from arguments import existing_file, output_folder
from model import MATRICES, Model
from safetensors.torch import load_file, save_file
from stages import Shape
from tokenizer import ASSISTANT, BEGIN, CONTROL_TOKENS, END, PAD, SYSTEM, USER

WEIGHTS = "model.safetensors"
ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
CHAT_TEMPLATE = """\
{%- set marks = {'system': '<|system|>', 'user': '<|user|>', 'assistant': '<|assistant|>'} -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in marks -%}
{{- raise_exception('The roles are system, user and assistant, not ' ~ message['role'] ~ '.') -}}
{%- endif -%}
{%- if message['role'] == 'system' and not loop.first -%}
{{- raise_exception('The system message must be the first.') -}}
{%- endif -%}
{{- marks[message['role']] ~ message['content'] ~ eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def weight_names(num_layers: int) -> dict[str, str]:
    """Our name of each weight -> transformers' name."""
    places = {key: f"self_attn.{key}_proj" if key in "qkvo" else f"mlp.{key}_proj" for key in MATRICES}
    places |= {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
    for layer in range(num_layers):
        names |= {f"layers.{layer}.{key}": f"model.layers.{layer}.{place}.weight" for key, place in places.items()}
    return names


def config_of(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": CONTROL_TOKENS.index(BEGIN),
        "eos_token_id": CONTROL_TOKENS.index(END),
        "pad_token_id": CONTROL_TOKENS.index(PAD),
        "torch_dtype": "bfloat16",
    }


def export_model(weights: dict[str, torch.Tensor], shape: Shape, tokenizer: Path, output: Path) -> None:
    """Write the whole folder."""
    output.mkdir(parents=True, exist_ok=True)
    names = weight_names(shape.num_layers)
    tensors = {names[key]: value.detach().to("cpu", torch.bfloat16).contiguous() for key, value in weights.items()}
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    (output / WEIGHTS).chmod(0o644)  # the library writes for the owner alone
    shutil.copyfile(tokenizer, output / "tokenizer.json")
    (output / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write(output / "config.json", config_of(shape))
    _write(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": shape.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )
    control = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    ids = {key: CONTROL_TOKENS.index(token) for key, token in control.items()}
    _write(output / "generation_config.json", {"do_sample": False, **ids})


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Model:
    """The model of an exported folder, for evaluation."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        max_position_embeddings=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        rms_norm_eps=config["rms_norm_eps"],
    )
    model = Model(shape, dtype)
    tensors = load_file(folder / WEIGHTS)
    model.load_state_dict({key: tensors[name].float() for key, name in weight_names(shape.num_layers).items()})
    return model.to(device).eval().requires_grad_(False)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=existing_file, required=True)
    parser.add_argument("--tokenizer", type=existing_file, required=True)
    parser.add_argument("--output", type=output_folder, required=True)
    options = parser.parse_args()
    state = torch.load(options.checkpoint, map_location="cpu", weights_only=False)
    export_model(state["model"], state["shape"], options.tokenizer, options.output)


if __name__ == "__main__":
    main()
