"""A list of kernel calls that is recorded once and run again and again by one team of threads: the door of a program.

A decode step of one token is some forty kernel calls of which most last 20 to 200 microseconds. Called one by one, each
calls a team of threads together, ends it and goes through Python to the next. A program leaves both out: between two
of its calls there is a barrier of a microsecond. What is computed is the same, to the bit.

`vashista.engine.models.decode_program` makes one for a model, through the `record_...` doors of linear.py, norm.py,
attend.py and sparse.py. Operands are fixed when a call is recorded: buffers of `max_rows` rows, of which a run uses the
first ones. What attention reads anew each step stands in a step record (`attend.StepRecord`, `sparse.StepRecord`),
whose address is fixed.

Measured on two cores (AMD EPYC with AVX-512, probe-26m, context 1,024, one request, median step of the engine in one
process with and without, 2026-11): float32 5.3 and 6.2 ms, bfloat16 2.5 and 3.2 ms.
"""

from __future__ import annotations

import torch

from vashista.kernels.cpu.library import Library


class Program:
    """Recorded kernel calls over fixed buffers. Not thread-safe."""

    def __init__(self, library: Library, capacity: int, max_rows: int, max_features: int) -> None:
        """At most `capacity` calls, on at most `max_rows` rows, of products of at most `max_features` input features.

        The number of threads is the one that torch has now.
        """
        self.library = library
        self.max_rows = max_rows
        self.max_features = max_features
        self.num_threads = library.num_threads
        self.scratch = torch.empty(self.num_threads * max_rows * padded(max_features))
        """For the prepared rows of any one product."""
        self._memory = torch.zeros(-(-library.program_bytes(capacity) // 8), dtype=torch.int64)
        self._capacity = capacity
        self._num_calls = 0
        self._held: list[object] = []
        library.program_begin(self.address, capacity)

    @property
    def address(self) -> int:
        """What the library's functions take for it."""
        return self._memory.data_ptr()

    def recorded(self, result: int, *operands: object) -> None:
        """A door has recorded a call over these operands, which now live as long as the program.

        Raises ValueError if the library refused it.
        """
        if result:
            raise ValueError(f"The call does not fit: {self._num_calls} of {self._capacity} are recorded.")
        self._num_calls += 1
        self._held += operands

    def run(self, num_rows: int) -> None:
        """Run all calls, on the first `num_rows` rows of their operands. Raises ValueError for rows there are not."""
        if not 1 <= num_rows <= self.max_rows or not self._num_calls:
            raise ValueError(
                f"{num_rows} rows of {self.max_rows}, {self._num_calls} calls: there must be some of each."
            )
        self.library.program_run(self.address, num_rows, self.num_threads)


def padded(in_features: int) -> int:
    """Floats of scratch that a row of a product takes; as `padded` in tasks.h."""
    return (in_features + 31) // 32 * 32
