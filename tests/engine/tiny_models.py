"""Tiny random models of every supported architecture, written by transformers, with the bundled tokenizer.

Tests of every package call `build`; the same transformers then judges what the engine computes with the folder. Weights
are drawn wide, norms and biases too, so that a forgotten bias or norm changes the logits, and these are not flat.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

BUNDLED = Path(__file__).resolve().parents[1] / "data" / "plain" / "reference-26m"
"""A tokenizer that puts nothing before a text, with one control token; no weights to speak of."""
VOCAB_SIZE = 8192

BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 128}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd-head": ("Llama", {"head_dim": 24}),
    "llama-groups-1": ("Llama", {"num_key_value_heads": 4}),
    "llama-groups-4": ("Llama", {"num_key_value_heads": 1}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN_ROPE}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 40}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 32}),
}


def build(
    kind: str,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "5GB",
    **overrides: Any,
) -> Path:
    """Write a model of this kind into the folder and return it. `overrides` are fields of transformers' config.

    `max_shard_size`, such as "100KB", splits the weights into several files with an index.
    """
    family, fields = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**(BASE | fields | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.3)
    folder = Path(folder)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED / name, folder / name)
    return folder


def reference(folder: str | Path) -> Any:
    """transformers' own model of the folder, float32, for comparison."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def edit_config(folder: Path, name: str = "config.json", **fields: Any) -> None:
    """Set fields of a JSON file of the folder; `...` removes one."""
    path = folder / name
    values = json.loads(path.read_text())
    for field, value in fields.items():
        if value is ...:
            values.pop(field, None)
        else:
            values[field] = value
    path.write_text(json.dumps(values))
