"""Progress of a run on stderr: one bar while prompts are made, one while a load point runs.

`commands/bench.py` opens it around `runner.run_plan`. The bar is redrawn five times a second by tqdm's own limit, so it
costs the measurement nothing that shows.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from vashista.server.loadgen.outcome import Outcome
from vashista.server.loadgen.runner import LoadPoint, PointResult, Watcher


class ProgressBars:
    """Shows one bar at a time."""

    def __init__(self, *, is_quiet: bool) -> None:
        self._is_quiet = is_quiet
        self._bar: tqdm[None] | None = None
        self._num_failed = 0
        self._by_time = False
        self._begin_s = 0.0

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def watcher(self) -> Watcher:
        """The callbacks for a run."""
        if self._is_quiet:
            return Watcher()
        return Watcher(self._on_prepare, self._on_begin, self._on_outcome, self._on_end)

    def _open(self, label: str, total: float, unit: str) -> None:
        self._close()
        self._bar = tqdm(
            total=total, desc=label, unit=unit, file=sys.stderr, leave=False, mininterval=0.2, dynamic_ncols=True
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _on_prepare(self, point: LoadPoint, done: int, total: int) -> None:
        if done == 1:
            self._open(f"{point.label} prompts", total, "prompt")
        assert self._bar is not None
        self._bar.update()

    def _on_begin(self, point: LoadPoint) -> None:
        self._num_failed = 0
        self._by_time = point.num_requests is None
        self._begin_s = time.perf_counter()
        total = point.duration_s if self._by_time else point.num_requests
        assert total is not None
        self._open(point.label, max(1, round(total)), "s" if self._by_time else "req")

    def _on_outcome(self, outcome: Outcome) -> None:
        bar = self._bar
        assert bar is not None
        if not outcome.is_ok:
            self._num_failed += 1
            bar.set_postfix_str(f"{self._num_failed} failed", refresh=False)
        if self._by_time:
            passed_s = min(int(time.perf_counter() - self._begin_s), bar.total)
            bar.update(passed_s - bar.n)
        else:
            bar.update()

    def _on_end(self, result: PointResult) -> None:
        self._close()
