"""Learns what steps take on this machine: measured kernel times first, then every step that the engine runs.

    seconds of a step = speed * (base + tokens + rows + requests + pairs ...), coefficients >= 0

The engine owns one `StepTimeModel` and shows it every step; the coefficients go to the server, which predicts with
them. Three things are learnt, at three paces:

- coefficients: least squares of relative errors over all features (`engine/predict/features.py`), never negative,
  each step counting less the further it is from what was expected (Huber), so that a step in which the machine did
  something else teaches little. Steps are remembered by kind (their tokens, sparse or not), and one is forgotten as
  others of its kind come: a day of short chats does not wear away what is known of long prompts. The first guess
  counts as a few steps of each kind and is outweighed soon. Where none of a kind have come it speaks on, but of a
  machine as fast as the nearest kind that has is thought to be: more tokens take no less time, so that kinds never
  seen, guessed too slow, would hold up those between them;
- speed: a factor for steps of few tokens and one for steps of many, each over the last of its kind: the clock of a hot
  processor, a neighbour who takes memory bandwidth from the one and a core from the other. When a speed has moved by
  more than MOVED, or SOLVE_STEPS steps have passed, new coefficients are said;
- the gap between two steps.

No torch here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.features import COUNTS, FEW_TOKENS, KNOTS, NUM_FEATURES, StepFeatures
from vashista.engine.predict.non_negative import Floats, solve_non_negative
from vashista.engine.support_profile import DeviceTimes
from vashista.engine.work import GROUP_TOKENS, WorkModel

KIND_STEPS = 1000.0
"""Steps of one kind after which an old one counts 1/e."""
FIRST_GUESS_WEIGHT = 0.05
"""Steps that each synthetic step of the first guess counts for. With 0.3 they had a pause cost half of what it did."""
HUBER = 0.08
"""Relative error from which a step counts less."""
SPEED_STEPS = (30, 10)
"""Of few tokens, of many."""
MOST_SLOWER = 2.0
"""How many times their median a step of few tokens may count for in their speed, or the median it. What is predicted
of them is the time of a whole reply, a sum: it takes their mean, slow ones included. A prompt's step is one of its own,
and what it takes most likely is nearer to the median. Replayed over three recordings (chats idle and at 60 %, both
idle), the mean missed a reply's steps by 5.5, 7.5 and 3.9 %, a middle of the same 30 by 5.5, 9.7 and 5.5 %."""
USUAL_STEPS = 30
LEAST_S = 1e-9
"""Of a step by a guess or a solution, where one is divided by the other."""
LEAST_STEPS = 3
"""A speed is taken from so many steps at least; those that have not come yet count as foreseen. The first step of a
kind may load what later ones find there, and alone would have all others expected to be as slow."""
MOVED = 0.05
ERROR_STEPS = 30.0
SOLVE_STEPS = 24
"""New coefficients after so many steps; a solution takes 0.2 to 0.7 ms."""
GAP_STEPS = 50.0
EARLY_STEPS = frozenset({1, 2, 4, 8, 16})


@dataclass(frozen=True)
class Rates:
    """What a kind of device does a second, roughly: the guess before anything was measured on it."""

    launch_s: float
    """A step that computes nothing."""
    madds: float
    bytes: float


RATES = {"cpu": Rates(1e-3, 4e10, 1.5e10), "cuda": Rates(3e-3, 2e14, 2e12)}
"""Two cores of a server; an H100. A wrong guess lasts a few steps."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class StepTimeModel:
    """Seconds of a step, corrected by each step that ran. One engine, one thread."""

    def __init__(self, guess: StepCoefficients, work: WorkModel) -> None:
        """The first guess comes from `guess_of` or from a file of an earlier run."""
        self._work = work
        synthetic = _synthetic(guess, work)
        self._guess_kinds = list(synthetic)
        self._guess_grams = np.stack([gram for gram, _ in synthetic.values()])
        self._guess_moments = np.stack([moments for _, moments in synthetic.values()])
        self._guessed = np.asarray(guess.vector())
        self._usual: dict[tuple[int, bool], tuple[Floats, int]] = {}
        """By kind, the mean counts of its steps and over how many, up to USUAL_STEPS."""
        self._sums: dict[tuple[int, bool], tuple[Floats, Floats]] = {}
        self._waiting: dict[tuple[int, bool], list[tuple[Floats, float, float]]] = {}
        """By kind, steps that the sums do not yet hold: counts, seconds, weight."""
        self._vector = self._guessed
        few, many = SPEED_STEPS
        self._speeds = [_Speed(few, is_of_sums=True), _Speed(many, is_of_sums=False)]
        self._gap_s = guess.gap_s
        self._num_steps = 0
        self._num_before = guess.num_steps
        self.error = 0.0
        """Mean relative error of the last steps, without sign."""
        self.coefficients = guess
        """Of now; another object when they have changed."""

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """A step with these counts took `seconds`."""
        if seconds <= 0.0 or features.num_tokens == 0:
            return
        x = np.asarray(features.vector())
        speed = self._speeds[features.num_tokens > FEW_TOKENS]
        off = speed.follow(x, seconds, self._vector)
        self.error += (min(abs(off), 1.0) - self.error) / ERROR_STEPS
        kind = _kind_of(features)
        usual, num_steps = self._usual.get(kind, (x, 0))
        num_steps = min(num_steps + 1, USUAL_STEPS)
        self._usual[kind] = usual + (x - usual) / num_steps, num_steps
        self._waiting.setdefault(kind, []).append((x, seconds, 1.0 if abs(off) <= HUBER else HUBER / abs(off)))
        self._num_steps += 1
        if self._num_steps % SOLVE_STEPS == 0 or self._num_steps in EARLY_STEPS or speed.has_moved:
            self._solve()

    def observe_gap(self, seconds: float) -> None:
        """So long was it from the end of a step to the begin of the next, with work to do."""
        self._gap_s += (min(seconds, 4 * self._gap_s + 1e-4) - self._gap_s) / GAP_STEPS

    def _sum_up(self) -> None:
        """Take the waiting steps into the sums, all at once: a step that waits costs the engine half as much."""
        keep = 1.0 - 1.0 / KIND_STEPS
        for kind, steps in self._waiting.items():
            rows = np.stack([x for x, _, _ in steps]) / np.array([[seconds] for _, seconds, _ in steps])
            weights = np.array([weight for _, _, weight in steps]) * keep ** np.arange(len(steps) - 1, -1, -1)
            weighted = rows * weights[:, None]
            gram, moments = self._sums.get(kind) or (np.zeros((NUM_FEATURES, NUM_FEATURES)), np.zeros(NUM_FEATURES))
            old = keep ** len(steps)
            self._sums[kind] = (gram * old + weighted.T @ rows, moments * old + weighted.sum(0))
        self._waiting.clear()

    def _solve(self) -> None:
        self._sum_up()
        off = {kind: self._off(usual) for kind, (usual, _) in self._usual.items()}
        faster = np.array([1.0 / _of_nearest(kind, off) for kind in self._guess_kinds])
        gram = 1e-9 * np.eye(NUM_FEATURES) + np.tensordot(faster**2, self._guess_grams, 1)  # of counts / seconds
        moments = faster @ self._guess_moments
        for more_gram, more_moments in self._sums.values():
            gram, moments = gram + more_gram, moments + more_moments
        self._vector = solve_non_negative(gram, moments, near=self._vector)
        factors = [speed.find(self._vector) for speed in self._speeds]
        num_steps = self._num_before + self._num_steps
        found = StepCoefficients.of(self._vector.tolist(), gap_s=self._gap_s, num_steps=num_steps)
        self.coefficients = found.scaled(*factors)

    def _off(self, usual: Floats) -> float:
        """How many times longer than guessed such steps take by the last solution, which speeds are no part of."""
        solved_s, guessed_s = max(float(usual @ self._vector), LEAST_S), max(float(usual @ self._guessed), LEAST_S)
        return solved_s / guessed_s


class _Speed:
    """How many times longer than by the coefficients the last steps of one kind took."""

    def __init__(self, num_steps: int, *, is_of_sums: bool) -> None:
        """is_of_sums: whether what many steps take together is predicted, else what one takes."""
        self._last: deque[tuple[Floats, float]] = deque(maxlen=num_steps)
        self._num_steps = num_steps
        self._is_of_sums = is_of_sums
        self._log = self._said = 0.0

    def follow(self, x: Floats, seconds: float, vector: Floats) -> float:
        """Take a step in; the relative error of what was expected of it, in logs."""
        off = math.log(seconds / float(x @ vector)) - self._log
        self._log += max(-4 * HUBER, min(4 * HUBER, off)) / self._num_steps
        self._last.append((x, seconds))
        return off

    @property
    def has_moved(self) -> bool:
        """Whether it is clearly another than when it was found."""
        return abs(self._log - self._said) > MOVED

    def find(self, vector: Floats) -> float:
        """The factor anew from the last steps, for coefficients that are new; 1 before the first step."""
        if self._last:
            logs = [math.log(seconds / float(x @ vector)) for x, seconds in self._last]
            logs += [0.0] * (LEAST_STEPS - len(logs))
            middle = sorted(logs)[len(logs) // 2]
            if self._is_of_sums:
                most = math.log(MOST_SLOWER)
                ratios = [math.exp(max(middle - most, min(middle + most, one))) for one in logs]
                self._log = math.log(sum(ratios) / len(ratios))
            else:
                self._log = sum(max(middle - HUBER, min(middle + HUBER, one)) for one in logs) / len(logs)
        self._said = self._log
        return math.exp(self._log)


def _of_nearest(kind: tuple[int, bool], known: Mapping[tuple[int, bool], float]) -> float:
    """What is known of the kind, or else of the nearest one."""
    size, is_sparse = kind
    return known[min(known, key=lambda seen: (abs(seen[0] - size), seen[1] != is_sparse, seen[0]))]


def guess_of(work: WorkModel, *, device: str, dtype: str, times: DeviceTimes | None) -> StepCoefficients:
    """What steps should take: from the device's measured times where there are some, else from its kind.

    device: `cpu` or `cuda`.
    """
    rates, num_bytes = RATES[device], _BYTES[dtype]
    num_heads = sum(count for _, count in work.windows)
    base_s = rates.launch_s + work.weights * num_bytes / rates.bytes
    # One query group reads a key and a value, half of `pair` multiply-adds long each, whatever the group's size.
    pair_s = work.pair / 4 * num_bytes / rates.bytes
    decode_s, scored_s, kept_s = pair_s, pair_s / 2, pair_s * 2
    if times is not None:
        base_s = times.overhead_s
        decode_s = times.dense_s_per_token / num_heads
        scored_s = (times.sparse_s_per_context_token or times.dense_s_per_token / 10) * GROUP_TOKENS / num_heads
        kept_s = (times.sparse_s_per_kept_token or 2 * times.dense_s_per_token) / num_heads
    token_s = work.weights / rates.madds
    # Few tokens cost what the weights' bytes do; where computing takes longer, each more costs its multiply-adds.
    few = max(1.0, (base_s - rates.launch_s) / token_s)
    per_token_s = [token_s * (0.3 if knot < few / 2 else 1.0) for knot in KNOTS]
    counts = {
        "num_rows": work.head / rates.madds,
        "num_requests": 5e-5,
        "num_drawn": 1e-4,
        "num_shaped": 1e-4,
        "num_sparse": 2e-4,
        "decode_pairs": decode_s,
        "prompt_pairs": work.pair / rates.madds,
        "scored_pairs": scored_s,
        "kept_pairs": kept_s,
        "cold": 0.0,
        "split": base_s if device == "cuda" else 0.0,
        "idle": 0.0,
    }
    return StepCoefficients(
        base_s=base_s, per_token_s=per_token_s, counts_s=[counts[name] for name in COUNTS], gap_s=1e-4
    )


def _kind_of(features: StepFeatures) -> tuple[int, bool]:
    return int(features.num_tokens).bit_length(), features.num_sparse > 0


def _synthetic(guess: StepCoefficients, work: WorkModel) -> dict[tuple[int, bool], tuple[Floats, Floats]]:
    """By kind, sums over steps of many kinds, each as long as the guess says."""
    heads = sum(count for _, count in work.windows)
    steps = []
    for tokens in (*KNOTS, 2 * KNOTS[-1]):
        for context in (64, 1024, 8192):
            pairs = float(tokens * context * heads)
            steps.append(StepFeatures(tokens, 1, 1, prompt_pairs=pairs, decode_pairs=0.0))
            steps.append(StepFeatures(tokens, 1, 1, prompt_pairs=pairs, split=float(tokens > 1)))
            steps.append(StepFeatures(tokens, 1, 1, prompt_pairs=pairs, idle=1.0))
            if tokens <= 64:
                steps.append(StepFeatures(tokens, tokens, tokens, decode_pairs=pairs))
                steps.append(StepFeatures(tokens, tokens, tokens, decode_pairs=pairs, cold=float(tokens <= FEW_TOKENS)))
                steps.append(StepFeatures(tokens, tokens, tokens, tokens, tokens, decode_pairs=pairs))
                scored, kept = pairs / GROUP_TOKENS, pairs / 8
                steps.append(StepFeatures(tokens, tokens, tokens, 0, 0, tokens, 0.0, 0.0, scored, kept))
                steps.append(StepFeatures(tokens, tokens, tokens, 0, 0, tokens, 0.0, 0.0, scored, kept / 4))
    rows: dict[tuple[int, bool], list[Floats]] = {}
    for features in steps:
        rows.setdefault(_kind_of(features), []).append(np.asarray(features.vector()) / guess.step_s(features))
    return {
        kind: (FIRST_GUESS_WEIGHT * np.transpose(own) @ np.stack(own), FIRST_GUESS_WEIGHT * np.sum(own, 0))
        for kind, own in rows.items()
    }
