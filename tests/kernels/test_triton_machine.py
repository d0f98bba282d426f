"""What Triton asks the machine is answered without starting a program."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vashista.kernels.triton_machine import VARIABLE, name_driver, name_platform

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
COMPILE = """
import sys
programs = []
sys.addaudithook(lambda event, arguments: event == "subprocess.Popen" and programs.append(arguments[1]))
import vashista.kernels.triton_guard
from triton.backends.nvidia import driver
from triton.runtime.build import compile_module_from_src, platform_key
from vashista.kernels.triton_machine import name_driver
import ctypes, os
ctypes.CDLL(sys.argv[1])
name_driver(os.environ)
assert driver.libcuda_dirs() == [os.path.dirname(sys.argv[1])], driver.libcuda_dirs()
source = '#include <Python.h>\\nint answer(void);\\nPyMODINIT_FUNC PyInit_launcher(void) {'
source += 'static struct PyModuleDef d = {PyModuleDef_HEAD_INIT, "launcher"};'
source += 'return answer() ? PyModule_Create(&d) : NULL; }'
compile_module_from_src(source, "launcher", driver.libcuda_dirs(), [], ["libcuda.so.1"])
print([os.path.basename(words[0]) for words in programs], platform_key())
"""


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's driver is loaded, which the test would replace")
def test_a_launcher_is_compiled_and_linked_with_no_program_started_but_the_compiler(tmp_path: Path) -> None:
    driver = tmp_path / "libcuda.so.1"
    (tmp_path / "driver.c").write_text("int answer(void) { return 1; }\n")
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(driver), str(tmp_path / "driver.c")]
    subprocess.run(command, check=True, timeout=60)
    environ = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environ.pop(VARIABLE, None)
    command = [sys.executable, "-c", COMPILE, str(driver)]
    said = [
        subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=True).stdout
        for _ in range(2)
    ]
    assert said[0] == f"['gcc'] {os.uname().machine},Linux\n"
    assert said[1] == f"[] {os.uname().machine},Linux\n", "the second run finds the launcher of the first"


def test_a_build_module_without_the_name_is_no_triton_that_was_tried() -> None:
    with pytest.raises(RuntimeError, match="platform_key"):
        name_platform(ModuleType("triton.runtime.build"))


@pytest.mark.parametrize(
    ("environ", "loaded", "found"),
    [
        ({}, "libcuda.so.580.65.06", True),
        ({}, "libcudart.so.13", False),
        ({VARIABLE: "/opt/driver"}, "libcuda.so.1", "/opt/driver"),
    ],
)
def test_the_driver_is_where_this_process_has_loaded_it_from_unless_it_was_said(
    environ: dict[str, str], loaded: str, found: bool | str, tmp_path: Path
) -> None:
    (tmp_path / "libcuda.so.1").touch()
    maps = tmp_path / "maps"
    maps.write_text(f"7f00-7f01 rw-p 00000000 00:00 0 \n7f02-7f03 r-xp 00000000 08:01 42   {tmp_path / loaded}\n")
    name_driver(environ, maps)
    assert environ.get(VARIABLE) == (str(tmp_path) if found is True else found or None)
