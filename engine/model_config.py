"""What a model is made of: config.json and generation_config.json of its folder, as one checked value.

The server reads it to admit requests and to list models; the engine builds the model from it. No torch here. Whatever
the two files say wrong ends here with a named error; nothing later looks into them again. Fields and defaults follow
transformers 5.23, which also decides where a file of an older version is meant.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from vashista.engine.config_fields import ConfigFields
from vashista.engine.errors import ModelConfigError, UnsupportedArchitectureError
from vashista.engine.model_folder import check_folder, read_json_object, read_optional_json_object
from vashista.engine.rope_config import RopeConfig, parse_rope

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPES = ("float32", "bfloat16", "float16")
MAX_LAYERS = 4096
"""Far beyond any model, and small enough to list what each layer does."""
MIN_REPETITION_PENALTY = 0.01
"""Below, a logit divided by it may leave the range of float32, and no token has a finite logit any more."""


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What the publisher suggests for fields that a request leaves out; None where it suggests nothing."""

    temperature: float | None = None
    """0 when the publisher asks for greedy decoding (`do_sample` false)."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One model's shape. Sizes are numbers of elements, contexts and windows numbers of tokens."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMS norm over head_dim on each query and key head before the rotation (Qwen3)."""
    layer_windows: tuple[int | None, ...]
    """Per layer: a token sees itself and the window - 1 tokens before it; None sees all."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    """The checkpoint's: float32, bfloat16 or float16."""
    generation_defaults: GenerationDefaults

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated."""
        return int(self.head_dim * self.rope.partial_rotary_factor)


def load_model_config(folder: str | Path) -> ModelConfig:
    """Parse the folder's config.json and, where it is, generation_config.json.

    Raises ModelFolderError, ModelConfigError, UnsupportedArchitectureError or UnsupportedRopeError.
    """
    path = check_folder(folder)
    config = ConfigFields(read_json_object(path / "config.json", ModelConfigError), "config.json: ")
    generation = ConfigFields(
        read_optional_json_object(path / "generation_config.json", ModelConfigError), "generation_config.json: "
    )
    architecture = _architecture(config)
    _refuse_unsupported(config)
    num_heads, num_kv_heads, head_dim = _heads(config, architecture)
    num_layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    vocab_size = config.integer("vocab_size")
    max_position_embeddings = config.integer("max_position_embeddings")
    qkv_bias, o_bias, mlp_bias = _biases(config, architecture)
    bos = (generation if generation.has("bos_token_id") else config).token_ids("bos_token_id", vocab_size)
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=config.number("rms_norm_eps", low_allowed=True),
        hidden_act="silu",
        rope=parse_rope(config, max_position_embeddings),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        layer_windows=_layer_windows(config, architecture, num_layers),
        eos_token_ids=(generation if generation.has("eos_token_id") else config).token_ids("eos_token_id", vocab_size),
        bos_token_id=bos[0] if bos else None,
        dtype=_dtype(config),
        generation_defaults=_generation_defaults(generation),
    )


def _architecture(config: ConfigFields) -> str:
    names = config.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise config.wrong("architectures", "a list with the name of one architecture")
    if names[0] not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"config.json: the architecture is {names[0]}; supported are {', '.join(ARCHITECTURES)}."
        )
    return names[0]


def _refuse_unsupported(config: ConfigFields) -> None:
    """Settings that change the arithmetic in a way that nothing here computes."""
    if config.has("quantization_config"):
        raise config.error("quantization_config", "is there, but quantized weights are not supported")
    if config.text("hidden_act", "silu") not in ("silu", "swish"):
        raise config.wrong("hidden_act", "silu")


def _heads(config: ConfigFields, architecture: str) -> tuple[int, int, int]:
    """(query heads, KV heads, head size)."""
    num_heads = config.integer("num_attention_heads")
    # null means one KV head a query head; leaving the field out means that in Llama only, so elsewhere it is an error
    may_default = architecture == "LlamaForCausalLM" or "num_key_value_heads" in config.values
    num_kv_heads = config.integer("num_key_value_heads", num_heads if may_default else None)
    if num_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads, which is {num_heads}")
    hidden_size = config.integer("hidden_size")
    if not config.has("head_dim") and (architecture == "Qwen3ForCausalLM" or hidden_size % num_heads):
        raise config.error(
            "head_dim", f"is missing, and hidden_size {hidden_size} over {num_heads} heads does not stand for it"
        )
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise config.error("head_dim", f"is {head_dim}, but rotary positions need an even number")
    return num_heads, num_kv_heads, head_dim


def _biases(config: ConfigFields, architecture: str) -> tuple[bool, bool, bool]:
    """Whether q/k/v, o and the MLP have biases."""
    attention, mlp = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    if mlp and architecture != "LlamaForCausalLM":
        raise config.error("mlp_bias", f"is true, but {architecture} has no biases in its MLP")
    if architecture == "Qwen2ForCausalLM":
        return True, False, False
    if attention and architecture == "MistralForCausalLM":
        raise config.error("attention_bias", f"is true, but {architecture} has no biases in its attention")
    return attention, attention, mlp


def _layer_windows(config: ConfigFields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer."""
    if architecture == "MistralForCausalLM":
        if "sliding_window" not in config.values:
            raise config.error("sliding_window", "is missing; write null for a model without one")
        window = config.integer("sliding_window") if config.has("sliding_window") else None
        return (window,) * num_layers
    is_used = config.flag("use_sliding_window", architecture == "LlamaForCausalLM" and config.has("sliding_window"))
    if architecture == "LlamaForCausalLM":
        if is_used:
            raise config.error("sliding_window", f"is set, but {architecture} has no sliding windows")
        return (None,) * num_layers
    window = config.integer("sliding_window") if is_used and config.has("sliding_window") else None
    types = config.values.get("layer_types")
    if types is None:
        first = config.integer("max_window_layers", low=0) if window is not None else num_layers
        return tuple(window if layer >= first else None for layer in range(num_layers))
    names = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or any(name not in names for name in types):
        raise config.wrong("layer_types", f"a list of {num_layers} times {' or '.join(names)}")
    if "sliding_attention" in types and window is None:
        raise config.error("layer_types", "names sliding_attention, but use_sliding_window and sliding_window do not")
    return tuple(window if name == "sliding_attention" else None for name in types)


def _dtype(config: ConfigFields) -> str:
    name = "dtype" if config.has("dtype") or not config.has("torch_dtype") else "torch_dtype"
    dtype = config.text(name).removeprefix("torch.")
    if dtype not in DTYPES:
        raise config.wrong(name, f"one of {', '.join(DTYPES)}")
    return dtype


def _generation_defaults(generation: ConfigFields) -> GenerationDefaults:
    temperature = generation.optional_number("temperature", low_allowed=True)
    if not generation.flag("do_sample", True):
        temperature = 0.0
    for name in ("top_p", "min_p"):
        if generation.has(name) and generation.number(name, low_allowed=True) > 1.0:
            raise generation.wrong(name, "a number from 0 to 1")
    return GenerationDefaults(
        temperature=temperature,
        top_p=generation.optional_number("top_p"),
        top_k=generation.integer("top_k", low=0) if generation.has("top_k") else None,
        min_p=generation.optional_number("min_p", low_allowed=True),
        repetition_penalty=generation.optional_number(
            "repetition_penalty", low=MIN_REPETITION_PENALTY, low_allowed=True
        ),
    )
