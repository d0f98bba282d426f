"""Mistral (`MistralForCausalLM`): Llama with a sliding window, which `ModelConfig.layer_windows` carries."""

from vashista.engine.models.decoder import Decoder


class Mistral(Decoder):
    """The window is the attention module's work; nothing else differs."""
