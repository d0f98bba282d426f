"""Settings that must stand before any test module is imported."""

import os
from pathlib import Path

# Triton decides when it is first imported (transformers imports it too) whether kernels are compiled or interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
