"""The weights of a model folder: memory-mapped safetensors, read tensor by tensor, straight to the device.

The model builders call `read` once for each parameter with the shape that the architecture wants; the engine then calls
`finish`, which finds tensors that nobody asked for: a checkpoint of another architecture must not load half.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vashista.engine.checkpoint_files import TensorEntry, list_tensors
from vashista.engine.errors import CheckpointError, ModelFolderError

Progress = Callable[[int, int], None]
"""Called with (loaded bytes, total bytes) of the checkpoint."""

READABLE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Checkpoint:
    """An open checkpoint; close it, or use it in a `with` statement, to release the mappings."""

    def __init__(self, tensors: dict[str, TensorEntry], progress: Progress | None = None) -> None:
        self._tensors = tensors
        self._progress = progress
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()
        self._read: set[str] = set()
        self._loaded_bytes = 0
        self.num_bytes = sum(entry.num_bytes for entry in tensors.values())
        """Bytes of all tensors, as stored."""

    @classmethod
    def open(cls, folder: str | Path, progress: Progress | None = None) -> Checkpoint:
        """Check the folder's files and headers; no weight is read yet.

        Raises ModelFolderError, PickleRefusedError or CheckpointError.
        """
        return cls(list_tensors(folder), progress)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names."""
        return tuple(self._tensors)

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors together."""
        return sum(torch.Size(entry.shape).numel() for entry in self._tensors.values())

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._tensors

    def dtype_of(self, name: str) -> torch.dtype | None:
        """What the tensor is stored as; None where there is no such tensor, or `read` would refuse it."""
        entry = self._tensors.get(name)
        return None if entry is None else READABLE_DTYPES.get(entry.dtype)

    def read(
        self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """The tensor, contiguous on the device in `dtype`: moved as stored, cast there once.

        On the CPU too it is a copy, never a view of the mapping: a file replaced under a running server must not
        change or crash it. CheckpointError when it is missing, of another shape, or not stored as F32, BF16 or F16.
        """
        entry = self._tensors.get(name)
        if entry is None:
            raise CheckpointError(f"The checkpoint has no tensor {name}, which the architecture needs.")
        if entry.shape != tuple(shape):
            raise CheckpointError(
                f"{entry.path.name}: {name} has shape {list(entry.shape)}, but config.json makes it {list(shape)}."
            )
        if entry.dtype not in READABLE_DTYPES:
            raise CheckpointError(
                f"{entry.path.name}: {name} is stored as {entry.dtype}; supported are {', '.join(READABLE_DTYPES)}."
            )
        mapped = self._mapped(entry, name)
        if torch.device(device).type == "cpu":
            tensor = mapped.to(dtype, copy=True, memory_format=torch.contiguous_format)
        else:
            tensor = mapped.to(device).to(dtype)
        self._count(name, entry)
        return tensor

    def finish(self, *, is_tied: bool) -> None:
        """Check that every tensor was read; CheckpointError names the unexpected ones.

        Stored rotary frequencies are recomputed, and `lm_head.weight` of a model with tied embeddings is the embedding:
        neither is missed.
        """
        unread = [name for name in self._tensors if name not in self._read]
        spare = [name for name in unread if name.endswith("rotary_emb.inv_freq")]
        spare += [name for name in unread if is_tied and name == "lm_head.weight"]
        unexpected = sorted(set(unread) - set(spare))
        if unexpected:
            more = f" and {len(unexpected) - 5} more" if len(unexpected) > 5 else ""
            raise CheckpointError(
                f"The checkpoint has tensors that the architecture does not use: {', '.join(unexpected[:5])}{more}."
            )
        for name in spare:
            self._count(name, self._tensors[name])

    def close(self) -> None:
        """Release the mappings. Tensors that were read stay valid."""
        self._files.clear()
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mapped(self, entry: TensorEntry, name: str) -> torch.Tensor:
        """The tensor as a view of the mapped file."""
        try:
            if entry.path not in self._files:
                self._files[entry.path] = self._stack.enter_context(safe_open(entry.path, framework="pt", device="cpu"))
            tensor: torch.Tensor = self._files[entry.path].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{entry.path.name} is damaged: {error}.") from error
        except OSError as error:
            raise ModelFolderError(f"{entry.path} cannot be read: {error.strerror or error}.") from error
        return tensor

    def _count(self, name: str, entry: TensorEntry) -> None:
        if name in self._read:
            return
        self._read.add(name)
        self._loaded_bytes += entry.num_bytes
        if self._progress is not None:
            self._progress(self._loaded_bytes, self.num_bytes)
