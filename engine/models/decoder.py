"""The decoder-only transformer that every supported architecture is a variation of.

Pre-norm blocks of attention and a gated MLP over a residual stream, as in Llama. What differs between architectures
is read from `ModelConfig` (biases, windows, head sizes, rope) or overridden in one short file a piece
(`models/llama.py`, `models/qwen3.py`, ...). The runner calls `forward` with a `StepInput`; attention and its cache
belong to the `Attention` module that is passed in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vashista.engine.attention.interface import Attention, Replayable
from vashista.engine.checkpoint import Checkpoint
from vashista.engine.linear import Linear, WeightRoom, WideRoom, keeps_narrow, keeps_row_major
from vashista.engine.model_config import ModelConfig
from vashista.engine.models.decode_graph import PROMPT_ROWS, DecodeGraphs
from vashista.engine.models.decode_program import DecodeBuffers, DecodeProgram
from vashista.engine.norm import rms_norm
from vashista.engine.rope import rotary_table
from vashista.engine.step import StepInput
from vashista.kernels.cpu.program import Program


class WeightReader:
    """Reads tensors of one checkpoint to one device and dtype, checking each shape."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._wide_room = WideRoom()
        self._room = WeightRoom(checkpoint.num_parameters, dtype) if keeps_row_major(dtype, device) else None

    def read(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor of this name, which must have this shape."""
        return self._checkpoint.read(name, shape, dtype=self._dtype, device=self._device)

    def linear(self, parts: dict[str, int], in_features: int, *, bias: bool) -> Linear:
        """Weights of several names, stacked by output features, as one product."""
        is_narrow = all(self.keeps_narrow(name) for name in parts)
        dtype = torch.bfloat16 if is_narrow else self._dtype
        weights = [
            self._checkpoint.read(f"{name}.weight", (size, in_features), dtype=dtype, device=self._device)
            for name, size in parts.items()
        ]
        biases = [self.read(f"{name}.bias", size) for name, size in parts.items()] if bias else []
        weight = _stack(weights) if self._room is None else self._room.stack(weights)
        return Linear(weight, _stack(biases) if biases else None, self._wide_room if is_narrow else None)

    def keeps_narrow(self, name: str) -> bool:
        """Whether the weight of this name is kept as it is stored, in fewer bits than the model computes with."""
        stored = self._checkpoint.dtype_of(f"{name}.weight")
        return stored is not None and keeps_narrow(self._dtype, stored, self._device)


class DecoderLayer:
    """One block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, weights: WeightReader, index: int) -> None:
        self.config = config
        self.index = index
        c, prefix = config, f"model.layers.{index}"
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.input_norm = weights.read(f"{prefix}.input_layernorm.weight", c.hidden_size)
        qkv = {
            f"{prefix}.self_attn.q_proj": q_size,
            f"{prefix}.self_attn.k_proj": kv_size,
            f"{prefix}.self_attn.v_proj": kv_size,
        }
        self.qkv = weights.linear(qkv, c.hidden_size, bias=c.qkv_bias)
        self.output = weights.linear({f"{prefix}.self_attn.o_proj": c.hidden_size}, q_size, bias=c.o_bias)
        self.mlp_norm = weights.read(f"{prefix}.post_attention_layernorm.weight", c.hidden_size)
        gate_up = {f"{prefix}.mlp.gate_proj": c.intermediate_size, f"{prefix}.mlp.up_proj": c.intermediate_size}
        self.gate_up = weights.linear(gate_up, c.hidden_size, bias=c.mlp_bias)
        self.down = weights.linear({f"{prefix}.mlp.down_proj": c.hidden_size}, c.intermediate_size, bias=c.mlp_bias)

    @property
    def products(self) -> tuple[Linear, ...]:
        """All of the block's products with weights."""
        return self.qkv, self.output, self.gate_up, self.down

    def forward(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        """x: [num_tokens, hidden_size] -> the same."""
        c = self.config
        qkv = self.qkv.of_normed(x, self.input_norm, c.rms_norm_eps).view(x.shape[0], -1, c.head_dim)
        x = self.output.add_to(x, attention.forward(self.index, self.prepare_heads(qkv)))
        return self.down.add_to(x, self.gate_up.gate_of_normed(x, self.mlp_norm, c.rms_norm_eps))

    def record(self, program: Program, buffers: DecodeBuffers, attention: Replayable) -> bool:
        """Add what `forward` does to a program, in place of buffers.x. False where the attention has no kernels."""
        b, eps = buffers, self.config.rms_norm_eps
        self.qkv.record(program, b.x, b.qkv, norm=self.input_norm, eps=eps)
        heads = b.qkv.view(b.qkv.shape[0], -1, self.config.head_dim)
        self.record_heads(program, heads)
        if not attention.record(program, self.index, heads, b.attended.view(b.x.shape[0], -1, self.config.head_dim)):
            return False
        self.output.record(program, b.attended, b.x, residual=b.x)
        self.gate_up.record(program, b.x, b.gated, norm=self.mlp_norm, eps=eps, gated=True)
        self.down.record(program, b.gated, b.x, residual=b.x)
        return True

    def prepare_heads(self, qkv: torch.Tensor) -> torch.Tensor:
        """What happens to queries and keys before rotation: [num_tokens, heads, head_dim] -> the same. Here nothing."""
        return qkv

    def record_heads(self, program: Program, qkv: torch.Tensor) -> None:
        """Add what `prepare_heads` does to a program, in place."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Root-mean-square norm over the last dimension, in float32 inside."""
        return rms_norm(x, weight, self.config.rms_norm_eps)


class Decoder:
    """Embedding, blocks, final norm and the projection to logits."""

    layer_class: type[DecoderLayer] = DecoderLayer

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_context: int,
    ) -> None:
        self.config = config
        weights = WeightReader(checkpoint, dtype, device)
        self.embedding = weights.read("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [self.layer_class(config, weights, index) for index in range(config.num_layers)]
        self.final_norm = weights.read("model.norm.weight", config.hidden_size)
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        if config.tie_word_embeddings and not weights.keeps_narrow(head):
            self.lm_head = Linear(self.embedding)
        else:
            self.lm_head = weights.linear({head: config.vocab_size}, config.hidden_size, bias=False)
        self.cos, self.sin = rotary_table(config, max_context, device)
        self._program: DecodeProgram | None = None
        self._graphs: DecodeGraphs | None = None

    def record(self, attention: Attention) -> None:
        """Let steps with this module, which is ready to be used, run as one call where that is possible."""
        self._program = DecodeProgram.record(self, attention)
        self._graphs = DecodeGraphs.make(self, attention)

    @property
    def is_captured(self) -> bool:
        """Whether steps that come often are replayed as CUDA graphs."""
        return self._graphs is not None

    @property
    def prompt_rows(self) -> tuple[int, ...]:
        """As in `SchedulerRules`."""
        return PROMPT_ROWS if self.is_captured else ()

    @torch.inference_mode()
    def forward(self, step: StepInput, attention: Attention) -> torch.Tensor:
        """The final, normed hidden states of the step's `logit_rows`: [num_logit_rows, hidden_size]."""
        if self._graphs is not None and (x := self._graphs.run(step, attention)) is not None:
            return x if step.logit_rows.shape[0] == x.shape[0] else x.index_select(0, step.logit_rows)
        attention.begin(step, *self.rotary(step.positions))
        if self._program is not None and self._program.can_run(step, attention):
            x = self._program.run(step.token_ids)
            return x if step.logit_rows.shape[0] == x.shape[0] else x.index_select(0, step.logit_rows)
        return self.through_layers(step.token_ids, attention, step.logit_rows)

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) at positions: [num_tokens, rotary_dim / 2] each."""
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)

    def through_layers(
        self, token_ids: torch.Tensor, attention: Attention, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Final, normed hidden states of these rows, or all: [num_rows, hidden_size], with an attention that is ready.

        rows: [num_rows], int64, ascending.
        """
        x = F.embedding(token_ids, self.embedding)
        for layer in self.layers:
            x = layer.forward(x, attention)
        if rows is not None and rows.shape[0] < x.shape[0]:  # else they are all rows, in order
            x = x.index_select(0, rows)
        return rms_norm(x, self.final_norm, self.config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [rows, hidden_size] from `forward` -> [rows, vocab_size], float32."""
        return self.lm_head(hidden).float()


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
