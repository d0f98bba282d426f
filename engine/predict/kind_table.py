"""The kinds of a queue's requests as `engine/predict/native.c` reads them, kept from one prediction to the next.

`engine/predict/predictor.py` owns one and hands it to `engine/predict/forward.py`. Clients choose how their requests
attend, so that a queue may have as many kinds as requests: only those that have changed are written again.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence

from vashista.engine.predict.decode_costs import SHAPE, DecodeCosts
from vashista.engine.predict.queue import Kind

_ROW = struct.Struct("=Qqddd")
"""Address and number of shapes; whether tokens are drawn, whether logits are shaped; the correction."""


class KindTable:
    """Of the queue that it followed last, but for empty ones."""

    def __init__(self, costs: DecodeCosts) -> None:
        self._costs = costs
        self._kinds: list[Kind] = []
        self._shapes: list[array[float]] = []
        self._lengths: list[int] = []
        """Of the shapes when their address was written: they move when they grow."""
        self._changes = costs.num_changes
        self.table = array("b")
        """[kinds * 40]: rows as `struct kind` in jobs.h, by their numbers in the queue."""

    def follow(self, kinds: Sequence[Kind]) -> None:
        """These are a queue's kinds now, by their numbers."""
        known, changes = self._kinds, self._costs.num_changes
        if not kinds or (changes == self._changes and kinds == known):
            return
        self._costs.remember(len(kinds))
        for things in (known, self._shapes, self._lengths):
            del things[len(kinds) :]
        has_learnt = changes[1] != self._changes[1]
        for number, kind in enumerate(kinds):
            if number == len(known):
                self._add(kind)
            elif kind is not known[number]:
                known[number], self._shapes[number] = kind, self._costs.shapes(kind[0])
            elif len(self._shapes[number]) == self._lengths[number] and not has_learnt:
                continue
            self._write(number)
        self._changes = changes

    def fill(self, unknown: Iterable[tuple[int, int]]) -> None:
        """Measure how kinds attend in buckets of contexts: (number of the kind, bucket)."""
        for number, bucket in unknown:
            self._costs.fill(self._shapes[number], self._kinds[number][0], bucket)
        self.follow(self._kinds)

    def _add(self, kind: Kind) -> None:
        self._kinds.append(kind)
        self._shapes.append(self._costs.shapes(kind[0]))
        self._lengths.append(-1)
        room = _ROW.size * len(self._kinds) - len(self.table)
        if room > 0:
            self.table.extend(bytes(room))

    def _write(self, number: int) -> None:
        shapes, (mode, is_drawn, is_shaped) = self._shapes[number], self._kinds[number]
        self._lengths[number] = len(shapes)
        numbers = (shapes.buffer_info()[0], len(shapes) // SHAPE, is_drawn, is_shaped, self._costs.correction(mode))
        _ROW.pack_into(self.table, _ROW.size * number, *numbers)
