"""Every kernel compiles for GPUs that are not there, into shared memory that they have."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from vashista.kernels import (
    key_summary,
    paged_decode,
    paged_prefill,
    rope_write,
    sparse_attend,
    support_sums,
    unit_score,
)

MODULES = (paged_decode, paged_prefill, rope_write, key_summary, sparse_attend, support_sums, unit_score)

PROGRAM = Path(__file__).parent / "compile_kernels.py"


def compile_for_gpus(tmp_path, *options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, PROGRAM, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_kernel_compiles_for_ampere_hopper_and_blackwell(tmp_path):
    reports = [json.loads(line) for line in compile_for_gpus(tmp_path).splitlines()]
    kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    for capability in (80, 90, 100):
        assert {report["kernel"] for report in reports if report["capability"] == capability} == kernels
    too_large = [report for report in reports if report["shared"] > report["limit"]]
    assert not too_large


def test_all_threads_of_a_search_add_the_same_numbers(tmp_path):
    """x * x + y, rounded once, differs between two threads that trade x and y: then thresholds differ too."""
    searches = compile_for_gpus(tmp_path, "--search").split(".version")[1:]
    assert len(searches) == 2
    for ptx in searches:
        traded = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%r\d+),", ptx))
        assert len(traded) > 20
        addends = re.findall(r"fma\.rn\.f32\s+%r\d+, [^,]+, [^,]+, (\S+);", ptx)
        assert addends
        assert not traded & set(addends)
