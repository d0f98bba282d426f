"""What a training run does when: the model's shape, and stages of growing length with their mixtures and rates.

`batches.py` fills the batches, `train.py` walks through the stages. Rates are those of Muon with its update scaled to
AdamW's size (Moonlight, arXiv 2502.16982); both optimizers use the same.
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT, ANSWER, LIST, PASSAGE = 1.0, 5.0, 16.0, 2.0
"""Weights in the loss: book text; codes, numbers and names asked for; words of a list asked for; repeated passages.
The log gives the loss of each apart."""
LABELS = {"text": TEXT, "answer": ANSWER, "list": LIST, "passage": PASSAGE}

SHORT = {
    "recall": 0.50, "plain": 0.14, "repeat": 0.08, "common_words": 0.09, "frequent_words": 0.06, "chat": 0.13,
}  # fmt: skip
MIDDLE = {
    "recall": 0.42, "plain": 0.20, "repeat": 0.09, "common_words": 0.11, "frequent_words": 0.06, "chat": 0.12,
}  # fmt: skip
LONG = {
    "recall": 0.42, "plain": 0.27, "repeat": 0.09, "common_words": 0.10, "frequent_words": 0.06, "chat": 0.06,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A Llama: pre-norm, gated MLP, rotary positions, grouped queries, tied embeddings."""

    vocab_size: int = 8192
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 32768
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True)
class Stage:
    """Steps on batches of one length. `seconds`: the rate falls, and the stage ends, no later than by this clock."""

    num_tokens: int
    batch_size: int
    num_steps: int
    seconds: float
    first_rate: float
    last_rate: float
    mixture: dict[str, float]
    warmup_steps: int = 20


@dataclass(frozen=True)
class Preset:
    """One leg of a training: the reference model is `short`, then `long` from what that gave."""

    shape: Shape
    stages: tuple[Stage, ...]
    name: str
    seed: int = 1
    weight_decay: float = 0.1
    optimizer: str = "muon"


PRESETS = {
    "short": Preset(
        Shape(),
        (
            Stage(512, 256, 3300, 260.0, 3e-3, 2.4e-3, SHORT, 100),
            Stage(2048, 64, 3300, 290.0, 2.4e-3, 1.7e-3, MIDDLE),
        ),
        name="short",
    ),
    "long": Preset(
        Shape(),
        (
            Stage(8192, 16, 600, 90.0, 1.4e-3, 1.0e-3, LONG, 40),
            Stage(32768, 4, 740, 255.0, 1.0e-3, 1e-5, LONG),
        ),
        seed=2,
        name="long",
    ),
    "tiny": Preset(
        Shape(
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            max_position_embeddings=2048,
        ),
        (
            Stage(512, 4, 6, 30.0, 3e-3, 2e-3, SHORT, 2),
            Stage(2048, 1, 4, 30.0, 2e-3, 1e-4, LONG, 2),
        ),
        name="tiny",
    ),
}
