"""Writes a Llama folder in the Hugging Face layout as a GGUF file, for llama.cpp to run the same weights.

Run by `run.py` with the interpreter that has llama_cpp: `python gguf_export.py MODEL_DIR OUT.gguf f32|bf16|f16`. Needs
numpy and the gguf package, no torch. The file has no tokenizer: the benchmark feeds token ids. Matrices take the wanted
type, norms stay f32, as llama.cpp's own converter does. llama.cpp rotates neighbouring pairs (2i, 2i + 1) where Hugging
Face rotates halves (i, i + d/2), so the rows of the q and k projections are reordered.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file as float32: {name: [rows, columns] or [size]}."""
    data = path.read_bytes()
    (header_size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_size])
    body = memoryview(data)[8 + header_size :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = to_float32(body[begin:end], entry["dtype"]).reshape(entry["shape"])
    return tensors


def to_float32(data: memoryview, dtype: str) -> np.ndarray:
    """Exact: float32 holds every bf16 and f16."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def interleave_rope(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of each head of a [num_heads * head_dim, hidden] matrix from halves to neighbouring pairs."""
    rows, columns = weight.shape
    half = rows // num_heads // 2
    return weight.reshape(num_heads, 2, half, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor name; KeyError for one that a Llama does not have."""
    stem, _, kind = name.rpartition(".")
    if stem in OTHER_NAMES:
        return f"{OTHER_NAMES[stem]}.{kind}"
    prefix, layer, rest = stem.split(".", 3)[1:]
    assert prefix == "layers"
    return f"blk.{layer}.{LAYER_NAMES[rest]}.{kind}"


def export(model_dir: Path, out: Path, dtype: str) -> None:
    """Write the file."""
    config = json.loads((model_dir / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"], "only plain Llama models are exported"
    assert not config.get("rope_scaling"), "scaled rope is not exported"
    quantization, file_type = TYPES[dtype]
    writer = gguf.GGUFWriter(str(out), "llama")
    add_metadata(writer, config, file_type)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for path in sorted(model_dir.glob("*.safetensors")):
        for name, tensor in read_safetensors(path).items():
            num_heads = heads.get(name.split(".")[-2])
            if num_heads is not None:
                tensor = interleave_rope(tensor, num_heads)
            kind = quantization if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(np.ascontiguousarray(tensor), kind)
            writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], file_type: gguf.LlamaFileType) -> None:
    """The keys that llama.cpp needs to build the graph."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_name("benchmark")
    writer.add_file_type(file_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
