"""What a model folder holds, read from its text files and the headers of its weights; used by `vashista models`.

No weight is read and no torch is imported. The checks are the engine's own (`engine/model_config.py`,
`engine/checkpoint_files.py`, `engine/tokenizer.py`, `engine/chat_template.py`), so a folder that can be inspected has
the right files; whether every tensor has the shape that the architecture wants is known when it is loaded.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import msgspec
from tqdm import tqdm

from vashista.engine.chat_template import ChatTemplate
from vashista.engine.checkpoint_files import list_tensors
from vashista.engine.errors import ModelFolderError
from vashista.engine.model_config import ModelConfig, load_model_config
from vashista.engine.tokenizer import Tokenizer
from vashista.server.model_store.folder import hash_files

BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}


class MemoryNeed(msgspec.Struct, frozen=True):
    """Memory of the model in one dtype. Activations and the runtime (some hundred MB on a GPU) come on top."""

    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    full_context_bytes: int
    """Weights and the KV cache of one request as long as the context."""


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """One model folder. Sizes are numbers of elements, contexts and windows numbers of tokens."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_parameters: int
    dtype: str
    num_bytes: int
    """Bytes of the weights as stored."""
    num_files: int
    context: int
    rope: str
    sliding_window: int | None
    memory: list[MemoryNeed]
    num_tokens: int
    """Tokens of the tokenizer; the model's vocabulary may be padded."""
    eos_token_ids: list[int]
    has_chat_template: bool


def inspect_model(folder: Path) -> Inspection:
    """Read the folder; raises the ModelError that serving it would raise."""
    config = load_model_config(folder)
    tensors = list_tensors(folder)
    # Copies that loading leaves out: recomputed rotary frequencies and the output layer of a tied model.
    used = {name: entry for name, entry in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        used.pop("lm_head.weight", None)
    num_parameters = sum(math.prod(entry.shape) for entry in used.values())
    tokenizer = Tokenizer.load(folder, config.vocab_size)
    windows = [window for window in config.layer_windows if window is not None]
    return Inspection(
        architecture=config.architecture,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        num_parameters=num_parameters,
        dtype=config.dtype,
        num_bytes=sum(entry.num_bytes for entry in tensors.values()),
        num_files=len({entry.path for entry in tensors.values()}),
        context=config.max_position_embeddings,
        rope=_rope_text(config),
        sliding_window=max(windows, default=None),
        memory=[_memory(config, num_parameters, dtype) for dtype in BYTES_OF_DTYPE],
        num_tokens=tokenizer.vocab_size,
        eos_token_ids=list(config.eos_token_ids),
        has_chat_template=ChatTemplate.load(folder) is not None,
    )


def find_models(directory: Path) -> list[Path]:
    """Every folder with a config.json at or under the directory, sorted; follows symlinks, each folder once."""
    found: list[Path] = []
    seen: set[Path] = set()
    for place, folders, files in os.walk(directory, followlinks=True):
        resolved = Path(place).resolve()
        if resolved in seen:
            folders.clear()
            continue
        seen.add(resolved)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "config.json" in files:
            found.append(Path(place))
    return sorted(found)


def digest_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in the folder by name, in the order of their names; shows a progress bar on a terminal."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    try:
        num_bytes = sum(path.stat().st_size for path in paths)
    except OSError as error:
        raise ModelFolderError(f"{error.filename} cannot be read: {error.strerror}.") from error
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="SHA-256", disable=None, leave=False) as bar:
        return hash_files(folder, [path.name for path in paths], bar.update)


def _memory(config: ModelConfig, num_parameters: int, dtype: str) -> MemoryNeed:
    size = BYTES_OF_DTYPE[dtype]
    kv_bytes_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size
    weight_bytes = num_parameters * size
    full_context_bytes = weight_bytes + config.max_position_embeddings * kv_bytes_per_token
    return MemoryNeed(dtype, weight_bytes, kv_bytes_per_token, full_context_bytes)


def _rope_text(config: ModelConfig) -> str:
    rope = config.rope
    scaling = "" if rope.type == "default" else f", factor {rope.factor:g}"
    return f"{rope.type}, base {rope.theta:g}{scaling}"
