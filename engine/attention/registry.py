"""Which attention modules exist and which of them run where. The runner asks for one by name."""

from __future__ import annotations

from collections.abc import Callable

from vashista.engine.attention.dense_cpu import DenseCpuAttention
from vashista.engine.attention.dense_triton import DenseTritonAttention
from vashista.engine.attention.interface import Attention, AttentionShape
from vashista.engine.errors import SettingsError

ATTENTION: dict[tuple[str, str], Callable[[AttentionShape], Attention]] = {
    ("dense", "cpu"): DenseCpuAttention,
    ("dense", "cuda"): DenseTritonAttention,
}


def make_attention(name: str, shape: AttentionShape) -> Attention:
    """The module of this name for the shape's device. Raises SettingsError, listing what there is."""
    kind = ATTENTION.get((name, shape.device.type))
    if kind is None:
        names = sorted({name for name, device in ATTENTION if device == shape.device.type})
        raise SettingsError(f"attention is {name!r}; on {shape.device.type} there is {', '.join(names)}.")
    return kind(shape)
