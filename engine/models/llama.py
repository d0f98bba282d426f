"""Llama 2, 3 and 3.x (`LlamaForCausalLM`): the decoder as it stands."""

from vashista.engine.models.decoder import Decoder


class Llama(Decoder):
    """Rotary scaling, tied embeddings and biases come from the configuration."""
