"""The support profile of a model: how many tokens each KV head must keep, measured once by `vashista calibrate`.

`engine/calibrate.py` fills it, `SupportProfile.save` writes it as JSON (by default `support_profile.json` in the model
folder), the engine loads it and asks for budgets, the predictor reads the device's times. No torch here.

For each (layer, KV head) and measured context C the profile knows the tokens that the rule must keep so that the
dropped mass tau (largest over the heads of the query group, mean over the measured positions) is at most each target.
What lies between and beyond the measured points is `engine/support_curves.py`'s to say. A
budget is a whole number of groups and covers the context at most: `budget >= visible tokens` means dense. All this is
an expectation over the sample text, never a bound: audits measure what a request really loses.

Retrieval heads (`engine/retrieval.py`) are not budgeted: they attend to all they see.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from vashista.engine.errors import (
    SupportProfileDamagedError,
    SupportProfileFileError,
    SupportProfileMismatchError,
    SupportProfileVersionError,
)
from vashista.engine.model_digest import model_digest
from vashista.engine.support_curves import Floats, SupportCurves
from vashista.engine.whole_file import write_whole

FILE_NAME = "support_profile.json"
VERSION = 1
MAX_FILE_BYTES = 256 << 20
TARGETS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)


RETRIEVAL_MASS = 0.2
"""A KV head with that mean mass on what followed an earlier occurrence is a retrieval head."""


class Rule(StrEnum):
    """What ranks groups of tokens; formulas in `engine/attention/rules.py`."""

    MEAN = "mean"
    MEAN_VARIANCE = "mean_variance"
    BOX = "box"
    WINDOW = "window"


class SupportStats(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens held a KV head's mass at one context; median and 90th percentile over positions and the group."""

    effective_median: float
    """exp(H(p)) of dense attention, in tokens."""
    effective_p90: float
    tokens_90_median: float
    """Fewest tokens that hold 90 % of the mass."""
    tokens_90_p90: float
    tokens_99_median: float
    """Fewest tokens that hold 99 % of the mass."""
    tokens_99_p90: float


class StepTime(msgspec.Struct, frozen=True):
    """One decode step of one request, measured."""

    context: int
    """Tokens in the cache."""
    step_s: float
    """Median."""


class SparseStepTime(msgspec.Struct, frozen=True):
    """The same with a token budget for every KV head, and no audit."""

    context: int
    token_budget: int
    step_s: float


class DeviceTimes(msgspec.Struct, frozen=True, kw_only=True):
    """What decode steps take on one device; batch 1, seconds."""

    dtype: str
    measured_at: str
    """ISO 8601, UTC."""
    overhead_s: float
    """A step without attention to the past: weights, launches, sampling."""
    dense_s_per_token: float
    """Dense attention of all layers per token of context."""
    dense_steps: list[StepTime]
    sparse_s_per_context_token: float | None = None
    """Scoring of all layers' summaries per token of context; None where no sparse step was measured."""
    sparse_s_per_kept_token: float | None = None
    """Attention of all layers per token that each KV head keeps; None as above."""
    sparse_steps: list[SparseStepTime] = []

    def dense_step_s(self, context_len: int) -> float:
        """Seconds of a decode step with dense attention at this context."""
        return self.overhead_s + self.dense_s_per_token * context_len

    def sparse_step_s(self, context_len: int, token_budget: float) -> float | None:
        """The same with so many tokens kept, on average over KV heads; None where that was not measured."""
        if self.sparse_s_per_context_token is None or self.sparse_s_per_kept_token is None:
            return None
        kept_s = self.sparse_s_per_kept_token * min(token_budget, context_len)
        return self.overhead_s + self.sparse_s_per_context_token * context_len + kept_s


class SupportProfile(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """See the module's text. Made by `engine/calibrate.py` or by `load`, which checks it."""

    version: int = VERSION
    model_digest: str
    rule: Rule
    """What ranked the groups."""
    group_tokens: int
    num_sinks: int
    """Tokens at the start that were always kept; part of the counts below."""
    num_recent: int
    """Tokens at the end that were always kept; part of the counts below."""
    contexts: list[int]
    """Measured context lengths, ascending."""
    num_positions: list[int]
    """Queries measured at each context."""
    targets: list[float]
    """Dropped mass, descending."""
    layer_windows: list[int | None]
    """Sliding window of each layer; a head sees no more tokens than that."""
    tokens: list[list[list[list[int]]]]
    """[num_layers][num_kv_heads][contexts][targets]: tokens to keep."""
    support: list[list[list[SupportStats]]]
    """[num_layers][num_kv_heads][contexts]"""
    retrieval: list[list[float]] | None = None
    """[num_layers][num_kv_heads]: mean mass on what followed an earlier occurrence; None: not measured."""
    devices: dict[str, DeviceTimes] = {}
    """By the device's name as the engine reports it."""

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.tokens)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a layer."""
        return len(self.tokens[0])

    @cached_property
    def retrieval_heads(self) -> NDArray[np.bool_]:
        """[num_layers, num_kv_heads]: which attend to everything in every mode; none where it was not measured."""
        if self.retrieval is None:
            return np.zeros((self.num_layers, self.num_kv_heads), dtype=bool)
        return np.array(self.retrieval) >= RETRIEVAL_MASS

    def budgets(self, context_len: int, max_dropped_mass: float) -> list[list[int]]:
        """Tokens each [layer][KV head] should keep so that the expected dropped mass is at most this.

        Whole groups; a head that needs all it sees, or retrieves, gets at least as many tokens as it sees. ValueError
        for a context below 1 or a mass outside 0 to 1: the caller has checked its user's input.
        """
        if context_len < 1 or not 0.0 <= max_dropped_mass <= 1.0:
            raise ValueError(f"budgets for a context of {context_len} and a dropped mass of {max_dropped_mass}")
        group, seen = self.group_tokens, self._visible(context_len)
        groups = np.broadcast_to(np.ceil(seen / group), (self.num_layers, self.num_kv_heads))
        if max_dropped_mass > 0.0:
            # Less a rounding error, so that a measured number of groups stays what it is.
            wanted = np.ceil(self._curves.tokens(context_len, max_dropped_mass) / group - 1e-6)
            groups = np.where(self.retrieval_heads, groups, np.minimum(wanted, groups))
        result: list[list[int]] = (groups * group).astype(int).tolist()
        return result

    def expected_dropped_mass(self, context_len: int, token_budget: int) -> list[list[float]]:
        """The dropped mass to expect of each [layer][KV head] that keeps `token_budget` tokens; 0.0 where that is all.

        The inverse of `budgets`. ValueError for a context or budget below 1.
        """
        if context_len < 1 or token_budget < 1:
            raise ValueError(f"dropped mass for a context of {context_len} and a budget of {token_budget}")
        mass = self._curves.mass(context_len, token_budget)
        is_whole = self.retrieval_heads | (token_budget >= self._visible(context_len))
        result: list[list[float]] = np.where(is_whole, 0.0, mass).tolist()
        return result

    @classmethod
    def load(cls, path: str | Path, model_dir: str | Path) -> SupportProfile:
        """Read and check a profile of the model in this folder.

        Raises SupportProfileFileError, SupportProfileDamagedError, SupportProfileVersionError,
        SupportProfileMismatchError, and the ModelError of a folder that is no model.
        """
        path = Path(path)
        profile = _decode(path, _read(path))
        problem = profile.problem()
        if problem:
            raise SupportProfileDamagedError(f"{path} is not a support profile: {problem}.")
        digest = model_digest(model_dir)
        if profile.model_digest != digest:
            raise SupportProfileMismatchError(
                f"{path} was made for another model (digest {profile.model_digest[:12]}) than the one in {model_dir} "
                f"(digest {digest[:12]})."
            )
        return profile

    def save(self, path: str | Path) -> None:
        """Write the profile: the file is either whole or as it was before. Raises SupportProfileFileError."""
        problem = self.problem()
        assert not problem, problem
        path = Path(path)
        try:
            write_whole(path, msgspec.json.encode(self))
        except OSError as error:
            raise SupportProfileFileError(f"{path} cannot be written: {error.strerror or error}.") from error

    def problem(self) -> str:
        """What contradicts itself in the profile; "" for nothing."""
        if not self.tokens or not self.tokens[0] or not self.contexts or not self.targets:
            return "it has no layer, KV head, context or target"
        checks = (
            (self.group_tokens >= 1 and self.num_sinks >= 0 and self.num_recent >= 0, "a count of tokens is negative"),
            (_ascends([0, *self.contexts]), "contexts do not ascend from 1"),
            (_ascends([0.0, *reversed(self.targets), 1.0]), "targets do not descend between 1 and 0"),
            (len(self.num_positions) == len(self.contexts), "num_positions has the wrong length"),
            (len(self.layer_windows) == self.num_layers, "layer_windows has the wrong length"),
            (all(window is None or window >= 1 for window in self.layer_windows), "a window has no token"),
            (self._is_whole(), "tokens or support lacks a layer, KV head or context, or has one too many"),
            (self._has_retrieval(), "retrieval lacks a layer or KV head, or is no share of the mass"),
            (self._tokens_rise(), "tokens are not positive, or fall from one target to the next"),
        )
        return next((problem for is_right, problem in checks if not is_right), "")

    @cached_property
    def _curves(self) -> SupportCurves:
        return SupportCurves(self.tokens, self.contexts, self.targets)

    def _visible(self, context_len: int) -> Floats:
        """[num_layers, 1]: tokens that a query of each layer sees."""
        return np.array([[min(context_len, window or context_len)] for window in self.layer_windows], dtype=np.float64)

    def _is_whole(self) -> bool:
        """Whether tokens and support have one entry for each layer, KV head and context."""
        right = {(self.num_kv_heads, len(self.contexts))}
        sizes = {(len(layer), *{len(head) for head in layer}) for layer in self.tokens}
        return len(self.support) == self.num_layers and right == sizes | {
            (len(layer), *{len(head) for head in layer}) for layer in self.support
        }

    def _has_retrieval(self) -> bool:
        """Whether it was not measured, or has one entry for each layer and KV head."""
        if self.retrieval is None:
            return True
        sizes = {len(layer) for layer in self.retrieval}
        is_whole = len(self.retrieval) == self.num_layers and sizes == {self.num_kv_heads}
        return is_whole and all(0.0 <= mass <= 1.0 for layer in self.retrieval for mass in layer)

    def _tokens_rise(self) -> bool:
        counts = (counts for layer in self.tokens for head in layer for counts in head)
        return all(len(c) == len(self.targets) and c[0] >= 1 and sorted(c) == c for c in counts)


def _ascends(numbers: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(numbers))


class _Version(msgspec.Struct):
    version: int


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            state = "is not a plain file" if path.exists() else "does not exist"
            raise SupportProfileFileError(f"The support profile {path} {state}.")
        num_bytes = path.stat().st_size
        if num_bytes > MAX_FILE_BYTES:
            raise SupportProfileDamagedError(f"{path} has {num_bytes} bytes; no support profile is that large.")
        return path.read_bytes()
    except OSError as error:
        raise SupportProfileFileError(f"{path} cannot be read: {error.strerror or error}.") from error


def _decode(path: Path, data: bytes) -> SupportProfile:
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version != VERSION:
            raise SupportProfileVersionError(f"{path} is of version {version}; this program reads version {VERSION}.")
        return msgspec.json.decode(data, type=SupportProfile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SupportProfileDamagedError(f"{path} is not a support profile: {error}.") from error
