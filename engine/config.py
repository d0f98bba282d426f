"""What an engine is made of: frozen, passed in, sent to the engine process as JSON. The server's settings make it."""

from __future__ import annotations

import msgspec

from vashista.engine.predict.coefficients import StepCoefficients


class SavedStepTimes(msgspec.Struct, frozen=True, kw_only=True):
    """What an earlier engine learnt of its steps; of use with the same model on the same device alone."""

    model_digest: str
    device_name: str
    dtype: str
    coefficients: StepCoefficients


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine is told at its start."""

    model_dir: str
    device: str = "auto"
    """auto takes the first CUDA device, else the CPU; or cpu, cuda, cuda:N."""
    dtype: str = "auto"
    """auto is the checkpoint's dtype on a GPU and float32 on the CPU; or float32, bfloat16, float16."""
    max_context: int | None = None
    """Tokens one request may have; None takes the model's own limit."""
    page_size: int = 64
    """Tokens a page; a power of two from 16 to 256."""
    kv_cache_bytes: int | None = None
    """None takes kv_memory_fraction of what is free after the weights, at most what max_running_requests can use."""
    kv_memory_fraction: float | None = None
    """None takes 0.85 on a GPU and 0.3 on the CPU, whose memory is shared with everything else on the machine."""
    max_running_requests: int = 64
    max_batch_tokens: int | None = None
    """Token budget of one step; None takes 8192 on a GPU and 512 on the CPU."""
    max_token_gap_s: float | None = None
    """The longest that a running stream is to wait for its next token; None promises nothing."""
    prefix_caching: bool = True
    num_threads: int | None = None
    """CPU threads of torch; None takes the cores this process may use."""
    attention: str = "auto"
    """The attention module (engine/attention/registry.py)."""
    audit_rate: float | None = None
    """Share of the sparse head-steps whose dropped mass is measured; None takes 1/1024 on the CPU, 1/2048 on a GPU."""
    dense_below: int | None = None
    """Sparse requests attend in full to contexts of fewer tokens; None takes what is no slower on the device."""
    support_profile: str | None = None
    """File that `vashista calibrate` wrote; None takes support_profile.json in model_dir, if it is there."""
    step_times: SavedStepTimes | None = None
    """What an earlier engine learnt; None starts from the support profile's times, or from a guess."""
    quiet: bool = True
    """False prints a progress bar on stderr while the weights load."""
