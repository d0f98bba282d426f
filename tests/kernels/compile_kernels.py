"""Compiles every kernel for GPUs that are not there, with the arguments that its launch code really passes.

Run as a program by test_compile.py, without TRITON_INTERPRET: `python compile_kernels.py`; with --every, for many more
shapes (minutes). Prints one JSON object a compiled kernel: name, case, capability, shared memory, and the limit of that
capability, in bytes. With --search, the PTX of the search for the best scores instead.
"""

import json
import sys
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vashista.kernels import (
    key_summary,
    paged_decode,
    paged_prefill,
    rope_write,
    selection,
    sparse_attend,
    sparse_decode,
    support_sums,
    unit_score,
    unit_search,
)
from vashista.kernels.paged_tile import DeviceLimits
from vashista.kernels.triton_guard import tl

# shared memory one program may take: CUDA C++ programming guide, table of compute capabilities
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
MODULES = (rope_write, paged_decode, paged_prefill, key_summary, unit_score, sparse_attend, support_sums)


class Compiler:
    """Stands in for a kernel: a launch compiles it for `capability` instead of running it."""

    def __init__(self, kernel: Any, capability: int, case: str) -> None:
        self.kernel, self.capability, self.case = kernel, capability, case

    def __getitem__(self, grid: tuple[int, ...]) -> "Compiler":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in kwargs}
        names = self.kernel.arg_names
        signature, attributes = {}, {}
        for index, (name, value) in enumerate(zip(names, args, strict=False)):
            is_tensor = isinstance(value, torch.Tensor)
            if is_tensor:
                signature[name] = "*" + TYPES[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if is_tensor or (isinstance(value, int) and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        constants = {name: kwargs[name] for name in names[len(args) :]}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        limit = SHARED_BYTES[self.capability]
        report = {"kernel": self.kernel.__name__, "case": self.case, "capability": self.capability}
        print(json.dumps(report | {"shared": compiled.metadata.shared, "limit": limit}), flush=True)


def replace_kernels(module: ModuleType, capability: int, case: str) -> None:
    """Put compilers in the place of the module's kernels and of what it knows of the device."""
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        kernel = getattr(module, name)
        setattr(module, name, Compiler(kernel.kernel if isinstance(kernel, Compiler) else kernel, capability, case))
    limits = DeviceLimits(132, SHARED_BYTES[capability])
    module.device_limits = lambda device: limits  # type: ignore[attr-defined]
    module.has_pdl = lambda device: capability >= 90  # type: ignore[attr-defined]


def compile_case(capability: int, dtype: torch.dtype, shape: tuple[int, int, int], *, extras: bool) -> None:
    """Compile all kernels for (head_dim, group, page_size); `extras` are a window, a softcap and the lse."""
    head_dim, group, page_size = shape
    case = f"{TYPES[dtype]} head_dim {head_dim} group {group} page {page_size}" + (" window softcap lse" * extras)
    for module in MODULES:
        replace_kernels(module, capability, case)
    options: dict[str, Any] = {"scale": 0.1, "window": 100 if extras else None, "softcap": 30.0 if extras else None}
    cache = torch.zeros(4, 2, page_size, head_dim, dtype=dtype)
    q = torch.zeros(64, 2 * group, head_dim, dtype=dtype)
    k = torch.zeros(64, 2, head_dim, dtype=dtype)
    table, lens = torch.zeros(64, 16, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    starts = torch.zeros(65, dtype=torch.int32)
    lse = torch.zeros(64, 2 * group) if extras else None
    angles = torch.zeros(64, head_dim // 4 if extras else head_dim // 2)
    rope_write.rope_and_write_triton(q, k, k, angles, angles, cache, cache, torch.zeros(64, dtype=torch.int64))
    paged_decode.paged_decode_triton(q, cache, cache, table, lens, lse=lse, **options)
    for max_query_len in (1, 64) if extras else (64,):
        paged_prefill.paged_prefill_triton(q, cache, cache, table, starts, lens, max_query_len=max_query_len, **options)
    if head_dim >= key_summary.MIN_SUMMARY_DIM and head_dim % 16 == 0 and group <= unit_score.MAX_GROUP:
        compile_sparse((q[:4], cache, table[:4], lens[:4], lse), extras=extras)


def compile_sparse(inputs: tuple[Any, ...], *, extras: bool) -> None:
    """Compile the sparse path; `extras` are a coarse level, a window, a softcap, the lse and the sum over the group."""
    q, cache, table, lens, lse = inputs
    rule = key_summary.Rule.BOX if extras else key_summary.Rule.MEAN_VARIANCE
    units = (16, cache.shape[2]) if extras and cache.shape[2] > 16 else (16,)
    levels = tuple(key_summary.make_level(cache, rule, min(unit, 64)) for unit in units)
    key_summary.summarize_triton(cache, torch.zeros(64, dtype=torch.int64), *levels)
    options = selection.ScoreOptions(
        scale=0.1, window=4096 if extras else None, softcap=30.0 if extras else None, is_sum=extras
    )
    sparse_decode.require_triton = lambda operation, tensor: None  # type: ignore[attr-defined]
    budgets = torch.zeros(4, 2, dtype=torch.int32)
    lse = None if lse is None else lse[:4]
    slots = torch.zeros(4, dtype=torch.int64) if extras else None
    for some in (levels, ()):
        plan = sparse_decode.make_plan(q, cache, some, options, max_context=20_000, max_budget=2048)
        sparse_decode.sparse_decode(
            q, (cache, cache), some, table, lens, budgets, plan, lse=lse, slots=slots if some else None
        )
    num_layers, pairs = 3, budgets.numel()
    support_sums.sum_support_triton(
        torch.zeros(num_layers, *q.shape[:2]), torch.zeros(num_layers, pairs, 4),
        torch.zeros(num_layers, pairs, dtype=torch.int32), lens, torch.zeros(num_layers, dtype=torch.int32),
        torch.zeros(4, support_sums.report_size(num_layers, 2), dtype=torch.float64), has_estimate=not extras,
    )  # fmt: skip


@triton.jit
def search_kernel(scores, kept, need, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One score a thread: what a reduction adds first then comes from another thread."""
    index = tl.arange(0, BLOCK)
    is_kept, _ = unit_search.choose_units(tl.load(scores + index), need, need, BLOCK, BLOCK)
    tl.store(kept + index, is_kept.to(tl.int32))


def compile_search(block: int) -> str:
    """PTX of the search among `block` scores."""
    signature = {"scores": "*fp32", "kept": "*i32", "need": "i32", "BLOCK": "constexpr"}
    source = ASTSource(search_kernel, signature, {"BLOCK": block})
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])


CASES = [
    (80, torch.bfloat16, (64, 4, 16), True),
    (86, torch.bfloat16, (128, 4, 64), False),
    (90, torch.bfloat16, (128, 4, 64), False),
    (90, torch.float32, (64, 4, 64), False),
    (86, torch.float32, (128, 128, 64), False),
    (100, torch.float16, (80, 5, 32), False),
]
EVERY_SHAPE = [
    ((16, 1, 16), False), ((24, 16, 256), True), ((64, 7, 16), True), ((256, 8, 64), False), ((128, 128, 64), True)
]  # fmt: skip
EVERY_CASE = [
    (capability, dtype, shape, extras)
    for capability in SHARED_BYTES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for shape, extras in EVERY_SHAPE
]

if __name__ == "__main__":
    if "--search" in sys.argv:
        print(*(compile_search(block) for block in (16, 128)))
        sys.exit()
    for capability, dtype, shape, extras in EVERY_CASE if "--every" in sys.argv else CASES:
        compile_case(capability, dtype, shape, extras=extras)
