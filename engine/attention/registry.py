"""Which attention modules exist and which of them run where. The runner asks for one by name.

`vashista` is the product's own; `mean_key`, `quest` and `sinks_recent` rank by the rules of others and are there to be
compared with; `dense` keeps no summaries. `auto` is `vashista` where it runs, else `dense`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vashista.engine.attention.dense_cpu import DenseCpuAttention
from vashista.engine.attention.dense_triton import DenseTritonAttention
from vashista.engine.attention.interface import Attention, AttentionShape
from vashista.engine.attention.sparse_cpu import SparseCpuAttention
from vashista.engine.attention.sparse_triton import SparseTritonAttention
from vashista.engine.errors import SettingsError
from vashista.engine.support_profile import Rule
from vashista.kernels.cpu.sparse import Rule as CpuRule
from vashista.kernels.key_summary import Rule as GpuRule

RULES = {
    "vashista": Rule.MEAN_VARIANCE,
    "mean_key": Rule.MEAN,
    "quest": Rule.BOX,
    "sinks_recent": Rule.WINDOW,
}
"""How the sparse modules rank groups of tokens; the GPU's need no rule for WINDOW, which ranks nothing."""

ATTENTION: dict[tuple[str, str], Callable[[AttentionShape], Attention]] = {
    ("dense", "cpu"): DenseCpuAttention,
    ("dense", "cuda"): DenseTritonAttention,
    **{(name, "cpu"): partial(SparseCpuAttention, name, CpuRule[rule.name]) for name, rule in RULES.items()},
    **{
        (name, "cuda"): partial(SparseTritonAttention, name, GpuRule.__members__.get(rule.name))
        for name, rule in RULES.items()
    },
}


def make_attention(name: str, shape: AttentionShape) -> Attention:
    """The module of this name for the shape's device. Raises SettingsError, saying what there is."""
    device = shape.device.type
    if name == "auto":
        try:
            return make_attention("vashista", shape)
        except SettingsError:
            return make_attention("dense", shape)
    kind = ATTENTION.get((name, device))
    if kind is None:
        names = sorted({name for name, where in ATTENTION if where == device})
        raise SettingsError(f"attention is {name!r}; on {device} there is auto, {', '.join(names)}.")
    return kind(shape)
