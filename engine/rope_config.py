"""The rotary position settings of a model: parsed from config.json, both the old and the new way of writing them.

`engine/model_config.py` calls `parse_rope`; `engine/rope.py` turns the result into angles. New folders (transformers 5)
write `rope_parameters {rope_type, rope_theta, ...}`, older ones `rope_theta` and `rope_scaling {type, ...}`. Where both
are there, `rope_scaling` wins, as in transformers: publishers tell users to add it by hand for long contexts.
"""

from __future__ import annotations

from typing import Any

import msgspec

from vashista.engine.config_fields import ConfigFields
from vashista.engine.errors import UnsupportedRopeError

DEFAULT_THETA = 10_000.0
"""What every supported architecture means when no base is written."""

_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",  # a remark of early yarn models; it never changed a number
    },
}
"""The supported rope types and the fields each may have."""


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How positions become angles. Fields that the type does not use keep their defaults."""

    type: str = "default"
    """default, linear, llama3 or yarn."""
    theta: float = DEFAULT_THETA
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    """Tokens of context before scaling; 0 where the type does not use it."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Factor on cos and sin; None lets yarn's formula choose."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """yarn: round the borders of the ramp to whole dimensions."""
    partial_rotary_factor: float = 1.0
    """Share of the head that is rotated; 1 in every supported architecture."""


def parse_rope(config: ConfigFields, max_position_embeddings: int) -> RopeConfig:
    """RopeConfig of a config.json; UnsupportedRopeError for an unknown type, ModelConfigError for a bad field."""
    fields = _rope_fields(config)
    rope_type = _rope_type(fields)
    for key in fields.values:
        if key not in _COMMON_KEYS | ROPE_KEYS[rope_type] and fields.has(key):
            raise fields.error(key, f"is not a field of rope type {rope_type}; changing what it does is not possible")
    for place in (fields, config):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise place.wrong("partial_rotary_factor", "1: this architecture rotates the whole head")
    theta = fields.number("rope_theta", config.number("rope_theta", DEFAULT_THETA))
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type == "linear":
        return RopeConfig(type="linear", theta=theta, factor=fields.number("factor"))
    place = config if config.has("original_max_position_embeddings") else fields
    original = place.integer("original_max_position_embeddings", max_position_embeddings)
    if rope_type == "llama3":
        return _llama3(fields, theta, original)
    return _yarn(fields, theta, original, max_position_embeddings)


def _rope_fields(config: ConfigFields) -> ConfigFields:
    for name in ("rope_scaling", "rope_parameters"):
        value: Any = config.values.get(name)
        if value is None or value == {}:
            continue
        if not isinstance(value, dict):
            raise config.wrong(name, "an object")
        if any(isinstance(part, dict) for part in value.values()):
            raise UnsupportedRopeError(
                f"{config.where}{name} differs between layers, which is not supported; one set of values for all is."
            )
        return ConfigFields(value, f"{config.where}{name}.")
    return ConfigFields({}, f"{config.where}rope_parameters.")


def _rope_type(fields: ConfigFields) -> str:
    rope_type = fields.text("rope_type", fields.text("type", "default"))
    if rope_type not in ROPE_KEYS:
        supported = ", ".join(ROPE_KEYS)
        raise UnsupportedRopeError(f"{fields.where}rope_type is {rope_type!r}; supported are {supported}.")
    return rope_type


def _llama3(fields: ConfigFields, theta: float, original: int) -> RopeConfig:
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        raise fields.wrong("high_freq_factor", f"above low_freq_factor, which is {low:g}")
    return RopeConfig(
        type="llama3",
        theta=theta,
        factor=fields.number("factor"),
        original_max_position_embeddings=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(fields: ConfigFields, theta: float, original: int, max_position_embeddings: int) -> RopeConfig:
    if theta <= 1.0:
        raise fields.wrong("rope_theta", "above 1 for rope type yarn")
    return RopeConfig(
        type="yarn",
        theta=theta,
        factor=fields.number("factor", max_position_embeddings / original),
        original_max_position_embeddings=original,
        attention_factor=fields.optional_number("attention_factor", low_allowed=True),
        # 0 means the default here, as in transformers
        beta_fast=fields.number("beta_fast", 32.0, low_allowed=True) or 32.0,
        beta_slow=fields.number("beta_slow", 1.0, low_allowed=True) or 1.0,
        mscale=fields.optional_number("mscale", low_allowed=True),
        mscale_all_dim=fields.optional_number("mscale_all_dim", low_allowed=True),
        truncate=fields.flag("truncate", True),
    )
