"""What Triton asks the machine before its first kernel, answered here without starting a program.

`kernels/triton_guard.py` calls both. By itself Triton 3.7 starts `/sbin/ldconfig` to find the driver's library, which
the image does not have and the hardened unit may not run; and Python starts `file` for the name of the platform, which
is part of the names of cached launchers, so that a cache from a machine that has `file` is lost on one that has not.
"""

from __future__ import annotations

import platform
from collections.abc import MutableMapping
from pathlib import Path
from types import ModuleType

DRIVER = "libcuda.so.1"
VARIABLE = "TRITON_LIBCUDA_PATH"


def name_platform(build: ModuleType) -> None:
    """Have `triton.runtime.build` name its launchers by machine and system alone."""
    if not hasattr(build, "platform_key"):
        raise RuntimeError(f"{build.__name__} has no platform_key any more: this Triton is not the one that was tried")
    vars(build)["platform_key"] = lambda: f"{platform.machine()},{platform.system()}"


def name_driver(environ: MutableMapping[str, str], maps: Path = Path("/proc/self/maps")) -> None:
    """Say where the driver's library lies that this process has loaded, unless the operator has said it."""
    if VARIABLE in environ:
        return
    for line in maps.read_text().splitlines():
        path = Path(line.split(maxsplit=5)[5]) if "/" in line else Path()
        if path.name.startswith("libcuda.so") and (path.parent / DRIVER).exists():
            environ[VARIABLE] = str(path.parent)
            return
