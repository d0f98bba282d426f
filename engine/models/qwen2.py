"""Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): Llama with biases on queries, keys and values."""

from vashista.engine.models.decoder import Decoder


class Qwen2(Decoder):
    """`ModelConfig.qkv_bias` is set for this architecture; some layers may have a window."""
