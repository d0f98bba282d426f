"""The door of native.c: the queue run forward in compiled code, where the install had a C compiler.

`engine/predict/predictor.py` asks it and takes `engine/predict/simulate.py` instead where `load()` answers None: both
say the same but for the last digits, and the tests hold them together. The queue's requests are read from the table
that `engine/predict/queue.py` keeps, so that a prediction does not go through them in Python.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import math
from array import array
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import msgspec

from vashista.engine.messages import SchedulerRules
from vashista.engine.pace import LEAST_CHUNK
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.features import COLD_KEEP, COUNTS, FEW_TOKENS, KNOTS
from vashista.engine.predict.kind_table import KindTable
from vashista.engine.predict.lengths import OutputLengths
from vashista.engine.predict.queue import QueueMirror
from vashista.engine.predict.simulate import MAX_EVENTS, MAX_OWN_EVENTS, Job
from vashista.engine.predict.timeline import POINT, Timeline
from vashista.engine.request import PATIENCE_S
from vashista.engine.work import WorkModel

VERSION = 5
"""Of the function that native.c exports; another one is refused."""
MAX_WINDOWS, MAX_PROMPT_ROWS = 64, 16
_NO_MEMORY, _STUCK, _UNKNOWN_COSTS = -1, -2, 1
_HEAD = 5
"""Numbers of a timeline before its points."""
_NUM_COSTS = 2 + 2 * len(KNOTS) + len(COUNTS)
"""Numbers of what steps take, at the end of a machine."""


class Start(msgspec.Struct, frozen=True):
    """Where a run begins, as `Simulation` takes it, and how often somebody joins."""

    now_s: float
    num_free_pages: float
    cold: float = 0.0
    idle: float = 0.0
    every_s: float = math.inf
    max_own_events: int = MAX_OWN_EVENTS


class Given(msgspec.Struct, frozen=True):
    """A job that is not in the queue, and from when on it waits."""

    job: Job
    at_s: float
    place: float = 0.0
    """Among requests of the same due time, whose places are 0, 1, 2 and so on: before the first is below 0."""

    def numbers(self) -> tuple[float, ...]:
        """As native.c reads it."""
        job = self.job
        costs = (job.fixed_s, job.context_s, job.fixed_pairs, job.context_pairs)
        return (job.rank[0], self.place, job.computed, job.known, job.remaining, *costs, job.own_tokens, self.at_s)


class Forward:
    """The compiled simulation."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file does not load, RuntimeError if it is of another version."""
        library = ctypes.PyDLL(str(path))  # keeps the interpreter's lock: a run takes less than giving it up may
        version, function = (getattr(library, name, None) for name in ("vashista_forward_version", "vashista_forward"))
        if version is None or function is None or version() != VERSION:
            raise RuntimeError(f"{path.name} is of another version: install the package again")
        pointer = c_void_p
        function.argtypes = (
            *(pointer, pointer, pointer, pointer, c_int64, pointer, pointer),
            *(pointer, c_int64, pointer, pointer, pointer),
        )
        function.restype = c_int
        self._run = function
        self._unknown = array("q", [0])
        """How many shapes are to be filled in, then the kind and the bucket of each."""

    def run(
        self,
        machine: array[float],
        start: Start,
        given: Sequence[Given],
        newcomer: Job | None = None,
        *,
        queue: QueueMirror,
        kinds: KindTable,
        lengths: OutputLengths,
    ) -> Timeline:
        """Until the own jobs among the given ones have ended. machine: of `packed`; newcomer: who joins every_s."""
        jobs = array("d", [number for one in given for number in one.numbers()])
        joining = None if newcomer is None else array("d", Given(newcomer, 0.0, -1.0).numbers())
        state = (start.now_s, start.num_free_pages, start.cold, start.idle)
        begin = array("d", [*state, start.every_s, float(start.max_own_events)])
        room = min(start.max_own_events, 2 * MAX_EVENTS) + 4
        timeline = array("d", bytes(8 * (_HEAD + POINT * room)))
        kinds.follow(queue.kinds)
        if len(self._unknown) < 1 + 2 * len(queue):  # a request has one shape
            self._unknown.extend([0] * (1 + 2 * len(queue) - len(self._unknown)))
        for _ in range(2):
            result = self._run(
                *(_address(machine), _address(begin), _address(queue.table), _address(queue.order), len(queue)),
                *(_address(kinds.table), _address(lengths.table), _address(jobs), len(given)),
                *(None if joining is None else _address(joining), _address(timeline), _address(self._unknown)),
            )
            if result != _UNKNOWN_COSTS:
                break
            end = 1 + 2 * self._unknown[0]
            kinds.fill(zip(self._unknown[1:end:2], self._unknown[2:end:2], strict=True))
        if result == _NO_MEMORY:
            raise MemoryError("no memory for a simulation of the queue")
        assert result != _STUCK, "nothing runs, nothing comes, and the own requests do not fit"
        assert result == 0, "what decode steps cost stays unknown"
        return _timeline(timeline)


def packed(rules: SchedulerRules, work: WorkModel) -> array[float] | None:
    """Rules and a model as native.c reads them, with room for what steps take, which `write_costs` fills.

    None for a model that it cannot hold, with too many kinds of windows, or of graphs for prompts.
    """
    if len(work.windows) > MAX_WINDOWS or len(rules.prompt_rows) > MAX_PROMPT_ROWS:
        return None
    room = [0.0] * (MAX_WINDOWS - len(work.windows))
    gap_s = -1.0 if rules.max_token_gap_s is None else rules.max_token_gap_s
    return array(
        "d",
        [
            *(rules.page_size, rules.num_pages, rules.max_running_requests, rules.max_batch_tokens),
            *(rules.prefix_caching, gap_s),
            *(LEAST_CHUNK, FEW_TOKENS, COLD_KEEP, math.log(COLD_KEEP), MAX_EVENTS),
            *(PATIENCE_S, work.weights, work.head, work.pair, sum(count for _, count in work.windows)),
            len(work.windows),
            *(float(rows) for rows in rules.prompt_rows),
            *([0.0] * (MAX_PROMPT_ROWS - len(rules.prompt_rows))),
            *(float(window or 0) for window, _ in work.windows),
            *room,
            *(float(count) for _, count in work.windows),
            *room,
            *KNOTS,
            *([0.0] * _NUM_COSTS),
        ],
    )


def write_costs(machine: array[float], costs: StepCoefficients) -> None:
    """What steps take now. machine: of `packed`; only what changes is written, as predictions wait for it."""
    machine[-_NUM_COSTS:] = array(
        "d", [costs.base_s, costs.gap_s, *costs.at_knots, *costs.per_token_s, *costs.counts_s]
    )


@functools.cache
def load() -> Forward | None:
    """The compiled simulation, or None where there is none or one of another version."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"native{suffix}")
        if path.is_file():
            try:
                return Forward(path)
            except (OSError, RuntimeError):
                return None
    return None


def _address(numbers: array[float] | array[int]) -> int:
    return numbers.buffer_info()[0]


def _timeline(numbers: array[float]) -> Timeline:
    runs_s, first_s, num_steps, num_events, num_points = numbers[:_HEAD]
    points = numbers[_HEAD : _HEAD + POINT * int(num_points)]
    return Timeline(runs_s, first_s, points, num_steps, int(num_events))
