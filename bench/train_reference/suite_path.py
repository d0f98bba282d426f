"""Makes the suite's modules (bench/quality) importable: the training teaches the very sentences that the suite asks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
