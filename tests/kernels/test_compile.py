"""Every kernel compiles for GPUs that are not there, into shared memory that they have."""

import json
import os
import subprocess
import sys
from pathlib import Path

from vashista.kernels import key_summary, paged_decode, paged_prefill, rope_write, sparse_attend, unit_score

MODULES = (paged_decode, paged_prefill, rope_write, key_summary, sparse_attend, unit_score)

PROGRAM = Path(__file__).parent / "compile_kernels.py"


def test_every_kernel_compiles_for_ampere_hopper_and_blackwell(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    for capability in (80, 90, 100):
        assert {report["kernel"] for report in reports if report["capability"] == capability} == kernels
    too_large = [report for report in reports if report["shared"] > report["limit"]]
    assert not too_large
