"""Loads a model onto a device and computes batches on it: scheduler's numbers in, hidden states and logits out.

The engine makes one runner at its start and calls `execute` each step. The runner decides device, dtype and the
number of KV pages; it knows nothing of sampling, text or queues.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vashista.engine.attention.interface import AttentionShape
from vashista.engine.attention.registry import make_attention
from vashista.engine.checkpoint import Checkpoint
from vashista.engine.config import EngineConfig
from vashista.engine.errors import DeviceError, SettingsError
from vashista.engine.main_memory import shortage_named
from vashista.engine.memory import check_weights_fit, count_pages
from vashista.engine.model_config import ModelConfig
from vashista.engine.models.registry import model_class
from vashista.engine.scheduler import Batch, BatchItem
from vashista.engine.step import Selection, Span, StepInput, to_device
from vashista.engine.support import SpanSupport
from vashista.kernels import cpu as cpu_kernels

Progress = Callable[[int, int], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOGIT_ROWS = 256
"""Rows of logits made at a time when a whole prompt's are asked for: bounds memory at large vocabularies."""


@dataclass(slots=True)
class StepOutput:
    """Hidden states of a step, by batch item."""

    hidden: torch.Tensor
    """[num_logit_rows, hidden_size]"""
    rows: dict[str, range]
    """For each request id: its rows in `hidden`, the positions item.end - len(range) to item.end - 1."""
    take_support: Callable[[], dict[str, SpanSupport]]
    """For each request that ran with a selection: what it left out. Waits for the device; to be asked once, before the
    next step."""


class Runner:
    """A model on a device, with its KV store."""

    @shortage_named()
    def __init__(self, config: EngineConfig, model_config: ModelConfig, progress: Progress | None = None) -> None:
        self.config = config
        self.model_config = model_config
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, model_config.dtype, self.device)
        self.max_context = resolve_max_context(config.max_context, model_config.max_position_embeddings)
        if self.device.type == "cpu":
            torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
        with Checkpoint.open(config.model_dir, progress) as checkpoint:
            rotary_bytes = 2 * 4 * self.max_context * (model_config.rotary_dim // 2)
            check_weights_fit(checkpoint.num_parameters * self.dtype.itemsize + rotary_bytes, self.device)
            self.num_parameters = checkpoint.num_parameters
            self.model = model_class(model_config.architecture)(
                model_config, checkpoint, dtype=self.dtype, device=self.device, max_context=self.max_context
            )
            checkpoint.finish(is_tied=model_config.tie_word_embeddings)
        self.attention_shape = self._attention_shape()
        self.attention = make_attention(config.attention, self.attention_shape)
        self.num_pages = count_pages(config, self.attention.page_bytes(), self.max_context, self.device)
        self.attention.allocate(self.num_pages)
        self.model.record(self.attention)

    @property
    def kv_bytes(self) -> int:
        """Bytes reserved for KV pages."""
        return self.num_pages * self.attention.page_bytes()

    @property
    def device_name(self) -> str:
        """What the device calls itself."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {torch.get_num_threads()} threads, {cpu_kernels.status()}"

    def execute(
        self,
        batch: Batch,
        needs_all_rows: Callable[[BatchItem], bool],
        select: Callable[[BatchItem], Selection | None] = lambda item: None,
    ) -> StepOutput:
        """Compute a batch.

        `needs_all_rows` says of an item whether logits of all its positions are wanted, `select` what it may attend to.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        spans: list[Span] = []
        rows: dict[str, range] = {}
        sparse: list[str] = []
        for item in batch.items:
            request, query_start = item.request, len(token_ids)
            token_ids += request.token_ids[item.start : item.end]
            positions += range(item.start, item.end)
            selection = select(item)
            spans.append(Span(query_start, item.num_tokens, item.end, request.pages, selection))
            if selection is not None:
                sparse.append(request.id)
            if needs_all_rows(item):
                wanted = range(query_start, len(token_ids))
            elif item.is_caught_up:
                wanted = range(len(token_ids) - 1, len(token_ids))
            else:
                continue
            rows[request.id] = range(len(logit_rows), len(logit_rows) + len(wanted))
            logit_rows += wanted
        step = StepInput(self._tensor(token_ids), self._tensor(positions), spans, self._tensor(logit_rows))
        hidden = self.model.forward(step, self.attention)
        take = self.attention.take_support
        return StepOutput(hidden, rows, lambda: dict(zip(sparse, take(), strict=True)) if sparse else {})

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [rows, hidden_size] -> [rows, vocab_size], float32."""
        return self.model.logits(hidden)

    def chunks(self, rows: range) -> list[range]:
        """Rows in parts small enough to hold the logits of."""
        return [rows[start : start + _LOGIT_ROWS] for start in range(0, len(rows), _LOGIT_ROWS)]

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return to_device(values, self.device, torch.int64)

    def _attention_shape(self) -> AttentionShape:
        m = self.model_config
        return AttentionShape(
            num_layers=m.num_layers,
            num_heads=m.num_heads,
            num_kv_heads=m.num_kv_heads,
            head_dim=m.head_dim,
            scale=m.head_dim**-0.5,
            page_size=self.config.page_size,
            layer_windows=m.layer_windows,
            dtype=self.dtype,
            device=self.device,
            max_context=self.max_context,
        )


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means here. Raises DeviceError."""
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda:0" if num_gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device is {name!r}; possible are auto, cpu, cuda and cuda:N.") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise DeviceError(f"device is {name!r}; possible are auto, cpu, cuda and cuda:N.")
    index = device.index or 0
    if index >= num_gpus:
        raise DeviceError(f"device is {name!r}, but torch {torch.__version__} sees {num_gpus} CUDA devices.")
    return torch.device("cuda", index)


def resolve_dtype(name: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: what was asked for, else the checkpoint's on a GPU and float32 on the CPU."""
    if name == "auto":
        name = checkpoint_dtype if device.type == "cuda" else "float32"
    if name not in DTYPES:
        raise SettingsError(f"dtype is {name!r}; possible are auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def resolve_max_context(asked: int | None, model_limit: int) -> int:
    """Tokens one request may have. Raises SettingsError for more than the model was made for."""
    if asked is not None and asked > model_limit:
        raise SettingsError(f"max_context is {asked}, but the model was made for {model_limit} tokens.")
    return asked or model_limit
