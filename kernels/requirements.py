"""What every kernel asks of its inputs, checked in one place before a launch.

Called by the `<op>_triton` functions. Nothing here reads a tensor's values, so nothing waits for the device: what only
values can tell (page numbers, slots, lengths) is the caller's invariant and is stated in each kernel's header.
The errors are the caller's to translate: this package knows nothing of the engine's error list.
"""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 16, 256
MAX_GROUP = 128
MIN_CAPABILITY = (8, 0)


class KernelUnavailableError(RuntimeError):
    """The kernel cannot run here: Triton is not installed, or the tensors are not on a GPU that it supports."""


class KernelInputError(ValueError):
    """A tensor or a number given to a kernel has a shape, type, place or value that the kernel does not take."""


def require(is_met: bool, message: str) -> None:
    """Raise KernelInputError with `message` unless `is_met`."""
    if not is_met:
        raise KernelInputError(message)


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    """Check the number of dimensions, each size that is not None, and the device."""
    found = tuple(tensor.shape)
    expected = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    fits = len(found) == len(shape) and all(
        want is None or want == size for want, size in zip(shape, found, strict=True)
    )
    require(fits, f"{name} has shape {list(found)}; this call needs {expected}")
    require(tensor.device == device, f"{name} is on {tensor.device}; the other tensors are on {device}")


def check_heads(name: str, tensor: torch.Tensor) -> None:
    """Check a [rows, heads, head_dim] tensor: rank, dtype, head_dim, and that the last dimension is contiguous."""
    require(tensor.dim() == 3, f"{name} has {tensor.dim()} dimensions; it needs [rows, heads, head_dim]")
    require(tensor.dtype in DTYPES, f"{name} is {tensor.dtype}; possible are float32, bfloat16 and float16")
    head_dim = tensor.shape[2]
    require(
        MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0,
        f"{name} has head_dim {head_dim}; possible are multiples of 8 from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}",
    )
    require(tensor.stride(2) == 1, f"{name} has stride {tensor.stride(2)} in its last dimension; it must be 1")
    require(tensor.shape[1] > 0, f"{name} has no heads")


def check_integers(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Check the dtype of an index tensor and that its last dimension is contiguous."""
    require(tensor.dtype == dtype, f"{name} is {tensor.dtype}; it must be {dtype}")
    is_contiguous = tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    require(is_contiguous, f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be 1")


def check_whole(
    name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], device: torch.device, dtype: torch.dtype
) -> None:
    """Check shape, device and dtype of a tensor that must lie in one piece."""
    check_tensor(name, tensor, shape, device)
    check_integers(name, tensor, dtype)
    require(tensor.is_contiguous(), f"{name} must be contiguous")


def check_cache(k_cache: torch.Tensor, v_cache: torch.Tensor, q: torch.Tensor) -> None:
    """Check two [num_pages, num_kv_heads, page_size, head_dim] caches against [rows, num_heads, head_dim] queries."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(cache.dim() == 4, f"{name} has {cache.dim()} dimensions; it needs 4: pages, KV heads, page, head_dim")
        check_tensor(name, cache, (k_cache.shape[0], k_cache.shape[1], k_cache.shape[2], q.shape[2]), q.device)
        require(cache.dtype == q.dtype, f"{name} is {cache.dtype}, the queries are {q.dtype}; they must be the same")
        require(cache.stride(3) == 1, f"{name} has stride {cache.stride(3)} in its last dimension; it must be 1")
    num_kv_heads, page_size = k_cache.shape[1], k_cache.shape[2]
    is_power = page_size & (page_size - 1) == 0
    require(
        MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE and is_power,
        f"the page size is {page_size}; possible are powers of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}",
    )
    num_heads = q.shape[1]
    require(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        f"{num_heads} heads cannot share {num_kv_heads} KV heads; the first must be a multiple of the second",
    )
    group = num_heads // num_kv_heads
    require(group <= MAX_GROUP, f"the query group has {group} heads; at most {MAX_GROUP} are possible")


def check_options(scale: float, window: int | None, softcap: float | None) -> None:
    """Check the numbers that shape the logits."""
    require(scale > 0.0, f"scale is {scale}; it must be positive")
    require(window is None or window > 0, f"window is {window}; it must be positive, or None for no window")
    require(softcap is None or softcap > 0.0, f"softcap is {softcap}; it must be positive, or None for no cap")


def check_out(out: torch.Tensor, q: torch.Tensor) -> None:
    """Check an output given by the caller: like the queries, contiguous in its last dimension."""
    check_tensor("out", out, tuple(q.shape), q.device)
    require(out.dtype == q.dtype, f"out is {out.dtype}, the queries are {q.dtype}; they must be the same")
    require(out.stride(2) == 1, f"out has stride {out.stride(2)} in its last dimension; it must be 1")
