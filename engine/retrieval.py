"""Finds the KV heads that look up what followed an earlier occurrence of the text being read (retrieval heads).

A model copies, recalls and follows references with few of its heads: reading a passage for the second time, such a head
puts its mass on the one token that came next the first time. Whatever ranks groups of keys by a summary can miss that
token, and then an answer is lost though hardly any mass is; so these heads attend to everything in every sparse mode
(`engine/attention/policy.py`). `engine/calibrate.py` measures them: in a passage of text a stretch is repeated, and
within the repetition the mass on the token to be copied is taken. Olsson et al., "In-context Learning and Induction
Heads" (2022), measure the same on random tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vashista.engine.attention.capture import Captured
from vashista.engine.attention.rules import logits_of
from vashista.engine.support_curves import Floats

MAX_TOKENS = 4096
"""Of a passage with a repetition; a head that looks back 2,048 tokens looks back further, too."""
MAX_REPEATED = 512
MAX_POSITIONS = 64


class RepeatedPassage:
    """A passage whose last tokens are those from its first quarter on, and where to look in it."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        """token_ids: no more than MAX_TOKENS are used; fewer than 4 have no positions."""
        token_ids = list(token_ids[:MAX_TOKENS])
        num_repeated = min(len(token_ids) // 4, MAX_REPEATED)
        first, second = len(token_ids) // 4, len(token_ids) - num_repeated
        self.token_ids = token_ids[:second] + token_ids[first : first + num_repeated]
        self.distance = second - first
        """How far back the same token is."""
        half = num_repeated // 2  # the first half is for the model to find out that this is a repetition
        self.positions = range(second + half, len(self.token_ids), max(1, half // MAX_POSITIONS))


class RetrievalTaker:
    """Means over all positions of all passages; `observe` is the observer of a `PassageRun`."""

    def __init__(self, num_layers: int, num_kv_heads: int, scale: float) -> None:
        self._scale = scale
        self._mass = np.zeros((num_layers, num_kv_heads))
        self._num_seen = np.zeros(num_layers)
        self._distance = 0

    def start(self, passage: RepeatedPassage) -> None:
        """The next observations are of this passage."""
        self._distance = passage.distance

    def observe(self, seen: Captured) -> None:
        """Take the mass on the token that followed the last time; of a query group, the largest."""
        num_kv_heads = seen.keys.shape[0]
        self._num_seen[seen.layer] += 1
        at = seen.position + 1 - self._distance - seen.first
        if at < 0:  # the layer's window does not reach it
            return
        p = logits_of(seen.query.double(), seen.keys.double(), self._scale).softmax(-1)
        self._mass[seen.layer] += p[:, at].view(num_kv_heads, -1).amax(1).cpu().numpy()

    def mass(self) -> list[list[float]]:
        """[num_layers][num_kv_heads]"""
        means: Floats = self._mass / np.maximum(self._num_seen, 1)[:, None]
        result: list[list[float]] = means.round(4).tolist()
        return result
