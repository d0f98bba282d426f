"""Settings that must stand before any test module is imported."""

import os
from pathlib import Path

from hypothesis import settings

# Triton decides when it is first imported (transformers imports it too) whether kernels are compiled or interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No example is wrong because it was slow: a shared machine may stop for a moment at any time.
# The same examples every time, so that a failure is one for everybody; `--hypothesis-profile=explore` draws new ones.
settings.register_profile("explore", deadline=None)
settings.register_profile("vashista", deadline=None, derandomize=True, database=None)
settings.load_profile("vashista")
