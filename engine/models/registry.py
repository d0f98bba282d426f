"""Which class runs which architecture. To add one: its short file, a line here, a line in `model_config.py`."""

from __future__ import annotations

from vashista.engine.errors import UnsupportedArchitectureError
from vashista.engine.models.decoder import Decoder
from vashista.engine.models.llama import Llama
from vashista.engine.models.mistral import Mistral
from vashista.engine.models.qwen2 import Qwen2
from vashista.engine.models.qwen3 import Qwen3

MODELS: dict[str, type[Decoder]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Mistral,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
}


def model_class(architecture: str) -> type[Decoder]:
    """The class of an architecture as config.json names it."""
    if architecture not in MODELS:
        raise UnsupportedArchitectureError(f"{architecture} is not one of {', '.join(sorted(MODELS))}")
    return MODELS[architecture]
