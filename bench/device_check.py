"""Judges and times the Triton kernels on a GPU machine: `python bench/device_check.py [--tune] [--no-tests]`.

Needs torch, triton and a checkout, nothing installed. Runs tests/kernels if pytest is there, compares every timed shape
with the float64 reference, and prints times only if all of it passed. Times are of CUDA graph replays between two
events, the median of 30, with the L2 cache overwritten before each; what an empty graph takes that way is printed too
and is not subtracted. Shapes: Llama-3.1-8B attention (32 heads, 8 KV heads, head_dim 128), bfloat16, pages of 64 tokens
in shuffled order.
"""

import argparse
import functools
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 64
SCALE = DIM**-0.5
DECODE = [(1, 32768), (1, 131072), (1, 524288), (8, 32768), (8, 131072), (32, 32768), (32, 131072)]
MIXED = [131072] + [2048] * 31
PREFILL = [(1, 2048, 2048), (1, 8192, 8192), (4, 2048, 2048), (1, 2048, 32768), (64, 1, 4096)]
TOLERANCE = {"decode": 2e-3, "prefill": 2.5e-3}


def make_package(folder: str) -> None:
    """Let `vashista.kernels` be imported from the checkout: `folder`/vashista with links, on the path."""
    package = Path(folder) / "vashista"
    package.mkdir()
    for name in ("server", "engine", "kernels"):
        (package / name).symlink_to(ROOT / name)
    sys.path.insert(0, folder)


def run_tests(folder: str) -> bool:
    """tests/kernels, in parallel where pytest-xdist is there; True if they passed."""
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed: the tests of tests/kernels were not run")
        return True
    settings = Path(folder) / "pytest.ini"
    settings.write_text("[pytest]\naddopts = --import-mode=importlib -q -ra\nmarkers =\n    gpu: needs a CUDA device\n")
    parallel = ["-n", "12"] if importlib.util.find_spec("xdist") is not None else []
    command = [sys.executable, "-m", "pytest", "-c", str(settings), f"--confcutdir={ROOT / 'tests'}"]
    path = os.pathsep.join((folder, str(ROOT / "tests" / "kernels")))  # sparse_case.py: what several test files share
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "TRITON_INTERPRET": "0"}
    command += [*parallel, "-p", "no:cacheprovider", "--durations=5", str(ROOT / "tests" / "kernels")]
    return subprocess.run(command, env=environment, check=False).returncode == 0


class Timer:
    """Times a call as a replayed CUDA graph with a cold L2 cache."""

    def __init__(self) -> None:
        self.flush = torch.empty(64 << 20, dtype=torch.float32, device="cuda")

    def time_us(self, call, repeats=30) -> float:
        """Median microseconds."""
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.add_(1.0)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return sorted(times)[len(times) // 2]


class Cache:
    """One pair of caches for all shapes; a shape takes the pages it needs, in shuffled order."""

    def __init__(self, num_pages: int) -> None:
        self.keys = torch.randn(num_pages, KV_HEADS, PAGE, DIM, device="cuda", dtype=torch.bfloat16)
        self.values = torch.randn_like(self.keys)

    def requests(self, lens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(page_table, context_lens)."""
        counts = [-(-length // PAGE) for length in lens]
        order = torch.randperm(self.keys.shape[0], device="cuda").int()
        table = torch.zeros(len(lens), max(counts), dtype=torch.int32, device="cuda")
        for row, (count, first) in enumerate(zip(counts, itertools.accumulate([0, *counts]), strict=False)):
            table[row, :count] = order[first : first + count]
        return table, torch.tensor(lens, dtype=torch.int32, device="cuda")


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    error = ((out.double() - reference).norm() / reference.norm()).item()
    return error if torch.isfinite(out).all() else float("nan")


def decode_case(cache: Cache, lens: list[int]):
    """(call, error of the first and the last request)."""
    from vashista.kernels.paged_decode import paged_decode, paged_decode_reference

    table, context_lens = cache.requests(lens)
    q = torch.randn(len(lens), HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    out = torch.full_like(q, float("nan"))

    def call(**options):
        paged_decode(q, cache.keys, cache.values, table, context_lens, scale=SCALE, out=out, **options)

    call()
    errors = []
    for row in {0, len(lens) - 1}:
        rows = slice(row, row + 1)
        reference, _ = paged_decode_reference(
            q[rows], cache.keys, cache.values, table[rows], context_lens[rows], scale=SCALE
        )
        errors.append(relative_error(out[rows], reference))
    return call, max(errors), (q, table, context_lens, out)


def prefill_case(cache: Cache, num_requests: int, num_queries: int, context: int):
    """(call, error of the last request)."""
    from vashista.kernels.paged_prefill import paged_prefill, paged_prefill_reference

    table, context_lens = cache.requests([context] * num_requests)
    q = torch.randn(num_requests * num_queries, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    starts = torch.arange(0, len(q) + 1, num_queries, dtype=torch.int32, device="cuda")
    out = torch.full_like(q, float("nan"))

    def call():
        paged_prefill(
            q, cache.keys, cache.values, table, starts, context_lens, scale=SCALE, max_query_len=num_queries, out=out
        )

    call()
    tail = slice(len(q) - min(num_queries, 256), len(q))
    tail_starts = starts.new_tensor([0, len(q[tail])])
    reference = paged_prefill_reference(
        q[tail], cache.keys, cache.values, table[-1:], tail_starts, context_lens[-1:], scale=SCALE
    )
    return call, relative_error(out[tail], reference), (q, table, starts, context_lens, out)


def report_decode(cache: Cache, timer: Timer) -> None:
    cases = [(f"{batch} x {context}", [context] * batch) for batch, context in DECODE]
    for name, lens in [*cases, ("131072 + 31 x 2048", MIXED)]:
        call, error, _ = decode_case(cache, lens)
        if not error < TOLERANCE["decode"]:
            sys.exit(f"decode {name}: error {error:.2e}: no times are printed for wrong results")
        us = timer.time_us(call)
        kv_bytes = sum(lens) * KV_HEADS * DIM * 4
        print(f"decode  {name:22} {us:9.1f} us  {kv_bytes / us / 1e6:5.2f} TB/s  error {error:.1e}", flush=True)


def report_prefill(cache: Cache, timer: Timer) -> None:
    for num_requests, num_queries, context in PREFILL:
        name = f"{num_requests} x {num_queries} of {context}"
        call, error, _ = prefill_case(cache, num_requests, num_queries, context)
        if not error < TOLERANCE["prefill"]:
            sys.exit(f"prefill {name}: error {error:.2e}: no times are printed for wrong results")
        us = timer.time_us(call)
        pairs = num_requests * (num_queries * context - num_queries * (num_queries - 1) // 2)
        print(f"prefill {name:22} {us:9.1f} us  {4 * pairs * HEADS * DIM / us / 1e6:5.0f} TFLOP/s  error {error:.1e}")


def report_sdpa(timer: Timer) -> None:
    """torch's own attention over contiguous keys, as a mark to compare prefill with."""
    for length in (2048, 8192):
        q = torch.randn(1, HEADS, length, DIM, device="cuda", dtype=torch.bfloat16)
        k, v = torch.randn(2, 1, KV_HEADS, length, DIM, device="cuda", dtype=torch.bfloat16)
        attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        us = timer.time_us(functools.partial(attend, q, k, v))
        tflops = 2 * length**2 * HEADS * DIM / us / 1e6
        print(f"torch   {f'1 x {length} of {length}':22} {us:9.1f} us  {tflops:5.0f} TFLOP/s")


def report_rope(cache: Cache, timer: Timer) -> None:
    from vashista.kernels.rope_write import rope_and_write

    for num_tokens in (1, 64, 8192):
        qkv = torch.randn(num_tokens, HEADS + 2 * KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        cos, sin = torch.randn(2, num_tokens, DIM // 2, device="cuda")
        slots = torch.randperm(cache.keys.shape[0] * PAGE, device="cuda")[:num_tokens]
        call = functools.partial(rope_and_write, q, k, v, cos, sin, cache.keys, cache.values, slots)
        us = timer.time_us(call)
        num_bytes = 4 * qkv.numel() + 8 * cos.numel()
        print(f"rope    {f'{num_tokens} tokens':22} {us:9.1f} us  {num_bytes / us / 1e6:5.2f} TB/s")


def try_time(timer: Timer, call, expected: torch.Tensor) -> str:
    """Microseconds of `call(out=...)`, or why there are none: a tile that does not fit, or a wrong result."""
    out = torch.full_like(expected, float("nan"))
    call = functools.partial(call, out=out)
    try:
        call()
        if not relative_error(out, expected.double()) < 2 * TOLERANCE["prefill"]:
            return "   wrong"
        return f"{timer.time_us(call, 15):8.1f}"
    except Exception as error:
        return f"{type(error).__name__:>8}"


def tune_decode(cache: Cache, timer: Timer) -> None:
    """Times other tiles and numbers of programs; columns are 1 x 32k, 1 x 128k, 8 x 32k, 32 x 32k, microseconds."""
    from vashista.kernels import paged_decode as module
    from vashista.kernels.paged_tile import TileShape

    shapes = [(1, 32768), (1, 131072), (8, 32768), (32, 32768)]
    cases = [decode_case(cache, [context] * batch) for batch, context in shapes]
    chosen = module.choose_decode_tile(cases[0][2][0], 4)

    def measure(label: str, tile: TileShape) -> None:
        row = []
        for _, _, (q, table, lens, out) in cases:
            inputs = (q, cache.keys, cache.values, table, lens)
            call = functools.partial(module.paged_decode_triton, *inputs, scale=SCALE, tile=tile)
            row.append(try_time(timer, call, out))
        print(f"tune decode  {label:46} {' '.join(row)}", flush=True)

    measure(f"chosen {chosen.keys} {chosen.num_warps} {chosen.num_stages}", chosen)
    for keys, warps, stages in itertools.product((32, 64), (2, 4, 8), (2, 3, 4)):
        measure(f"keys {keys} warps {warps} stages {stages}", TileShape(16, keys, warps, stages))
    others = {"PROGRAMS_PER_MULTIPROCESSOR": (1, 3, 4), "MAX_WAVES": (1, 4), "LONG_RUN_KEYS": (2048, 8192)}
    for name, numbers in others.items():
        usual = getattr(module, name)
        for number in numbers:
            setattr(module, name, number)
            measure(f"{name} {number}", chosen)
        setattr(module, name, usual)
    module.SPLIT_DTYPES = ()
    measure("weights not split", chosen)
    module.SPLIT_DTYPES = (torch.bfloat16,)


def tune_prefill(cache: Cache, timer: Timer) -> None:
    """Times other tiles; columns are the first four shapes of PREFILL, microseconds."""
    from vashista.kernels.paged_prefill import paged_prefill_triton
    from vashista.kernels.paged_tile import TileShape

    cases = [prefill_case(cache, *shape) for shape in PREFILL[:4]]
    for rows, keys, warps, stages in [
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 4, 3), (128, 64, 4, 2), (128, 64, 4, 3),
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (256, 64, 8, 2),
    ]:  # fmt: skip
        row = []
        for (_, _, (q, table, starts, lens, out)), shape in zip(cases, PREFILL, strict=False):
            inputs = (q, cache.keys, cache.values, table, starts, lens)
            tile = TileShape(rows, keys, warps, stages)
            call = functools.partial(paged_prefill_triton, *inputs, scale=SCALE, max_query_len=shape[1], tile=tile)
            row.append(try_time(timer, call, out))
        print(f"tune prefill rows {rows} keys {keys} warps {warps} stages {stages}: {' '.join(row)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="also time other tiles")
    parser.add_argument("--no-tests", action="store_true", help="skip tests/kernels, not the checks of timed shapes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("device_check needs a CUDA device; on a CPU run the tests of tests/kernels")
    with tempfile.TemporaryDirectory() as folder:
        make_package(folder)
        if not options.no_tests and not run_tests(folder):
            sys.exit("tests/kernels failed: no times are printed for wrong results")
        import triton

        print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
        cache, timer = Cache(32 * 131072 // PAGE + 100), Timer()
        nothing = torch.empty(1, device="cuda")
        print(f"a graph of one empty kernel takes {timer.time_us(lambda: nothing.add_(1)):.1f} us")
        report_decode(cache, timer)
        report_prefill(cache, timer)
        report_sdpa(timer)
        report_rope(cache, timer)
        if options.tune:
            tune_decode(cache, timer)
            tune_prefill(cache, timer)


if __name__ == "__main__":
    main()
