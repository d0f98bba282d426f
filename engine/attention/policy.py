"""How many tokens each KV head keeps, and which head-steps are audited: from a request's mode and the support profile.

The engine makes one `AttentionPolicy` for its model and one `RequestPolicy` for each sparse request, asks it for a
`Selection` before every generated token, and hands back what the step left out. Everything follows from the request
alone, never from its neighbours, so that a request gives the same tokens in any company. (Where sums are made in
another order, on a GPU in other company, on a CPU when another part of the prompt was cached, estimates differ by their
last bits, as all numbers do; a budget on an edge can then be a group more or less.)

Budgets. Heads that the profile found to retrieve attend to everything (`engine/retrieval.py`); what follows is of the
others. With a token budget every head keeps that many tokens. With a target for the dropped mass, a head keeps what
the support profile measured for the target at this context length, or without a profile half of the context; what its
steps drop then corrects it (`engine/attention/steering.py`). A head that stays above its target ends at the whole
context, and is dense.

Audits. Every 1 / audit_rate head-steps one is audited. Which one rotates through the (layer, KV head) in a fixed
shuffled order, from a place that follows from prompt and seed: a mean over audits is one over heads and steps, and
short replies, which have one or two audits, do not all audit the same heads. A turn of a head that attends to
everything passes. Retrieval heads have no turn: they drop nothing, and counting that would let the others drop more.
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vashista.engine.attention.interface import AttentionShape
from vashista.engine.attention.registry import RULES
from vashista.engine.attention.rules import GROUP_TOKENS
from vashista.engine.attention.steering import RATIO, Steering
from vashista.engine.config import EngineConfig
from vashista.engine.errors import SupportProfileMismatchError
from vashista.engine.messages import AttentionMode
from vashista.engine.step import EVERYTHING, Selection
from vashista.engine.support import SpanSupport
from vashista.engine.support_profile import FILE_NAME, Rule, SupportProfile

CONTEXT_STEP = 256
"""Budgets that follow from the profile are made anew after so many tokens."""


AUDIT_RATE = {"cpu": 1 / 1024, "cuda": 1 / 2048}
"""So that audits take at most 2 % of a step (`bench/sparse_cpu.py`; 6 % with 1/256 on a CPU)."""
DENSE_BELOW = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """What the operator sets, and what the device asks for."""

    audit_rate: float
    """Share of the sparse head-steps that are audited."""
    dense_below: int
    """Contexts of fewer tokens are attended to in full: there it costs no more."""
    has_estimates: bool = True
    """Whether the module's steps report what they dropped."""


def _estimates_mass(attention: str) -> bool:
    """Whether the scores of this module's rule say how much mass a group has."""
    return RULES.get(attention, Rule.MEAN_VARIANCE) not in {Rule.BOX, Rule.WINDOW}


def profile_path(config: EngineConfig) -> Path:
    """Where the profile is, or would be."""
    return Path(config.support_profile or Path(config.model_dir) / FILE_NAME)


def load_profile(config: EngineConfig) -> SupportProfile | None:
    """The profile that the configuration names, or else the one in the model's folder, if there is one.

    Raises SupportProfileError or a child if it cannot be used with this model, or was made for another rule.
    """
    path = profile_path(config)
    if config.support_profile is None and not path.exists():
        return None
    profile = SupportProfile.load(path, config.model_dir)
    rule = RULES.get(config.attention, Rule.MEAN_VARIANCE)
    if profile.rule == rule:
        return profile
    if config.support_profile is None:
        return None
    raise SupportProfileMismatchError(
        f"{path} was measured with the rule {profile.rule}; attention {config.attention!r} keeps tokens by {rule}."
    )


def make_policy(config: EngineConfig, shape: AttentionShape, profile: SupportProfile | None) -> AttentionPolicy:
    """The policy that the configuration asks for. Raises SupportProfileMismatchError if the profile's shape is another.

    A profile may name this model and yet have been edited to other layers or heads.
    """
    own = (shape.num_layers, shape.num_kv_heads)
    if profile is not None and (profile.num_layers, profile.num_kv_heads) != own:
        raise SupportProfileMismatchError(
            f"The support profile is of {profile.num_layers} layers with {profile.num_kv_heads} KV heads; the model has"
            f" {own[0]} layers with {own[1]}."
        )
    kind = shape.device.type
    options = PolicyOptions(
        audit_rate=AUDIT_RATE[kind] if config.audit_rate is None else config.audit_rate,
        dense_below=DENSE_BELOW[kind] if config.dense_below is None else config.dense_below,
        has_estimates=_estimates_mass(config.attention),
    )
    return AttentionPolicy(shape, profile, options)


class AttentionPolicy:
    """What all requests of one engine share."""

    def __init__(self, shape: AttentionShape, profile: SupportProfile | None, options: PolicyOptions) -> None:
        self.shape = shape
        self.profile = profile
        self.options = options
        size = (shape.num_layers, shape.num_kv_heads)
        whole = np.zeros(size, dtype=bool) if profile is None else profile.retrieval_heads
        self.whole = whole
        """[num_layers, num_kv_heads], bool: heads that attend to everything in every mode."""
        self.whole_share = float(whole.mean())
        self.order = [(layer, head) for layer, head in np.ndindex(size) if not whole[layer, head]]
        random.Random(0).shuffle(self.order)
        self.size = size

    def start(self, mode: AttentionMode, prompt_token_ids: Sequence[int] = (), seed: int = 0) -> RequestPolicy:
        """The policy of a request that has generated nothing; seed: of its sampling."""
        return RequestPolicy(self, mode, _first_turn(prompt_token_ids, seed))

    def base_budgets(self, mode: AttentionMode, context_len: int) -> NDArray[np.float64]:
        """Before any correction: [num_layers, num_kv_heads], tokens."""
        if mode.token_budget is not None:
            return np.full(self.size, float(mode.token_budget))
        assert mode.max_dropped_mass is not None
        if self.profile is None:
            return np.full(self.size, context_len / 2)
        return np.array(self.profile.budgets(context_len, mode.max_dropped_mass), dtype=np.float64)


class RequestPolicy:
    """The budgets and audits of one request; `reset` when its tokens are computed again."""

    def __init__(self, policy: AttentionPolicy, mode: AttentionMode, first_turn: int) -> None:
        self._policy = policy
        self._mode = mode
        self._first_turn = first_turn
        self.reset()

    def reset(self) -> None:
        """Forget all steps."""
        policy, target = self._policy, self._mode.max_dropped_mass
        ratio = RATIO[policy.shape.device.type]
        self._steering = None if target is None else Steering(policy.size, target, ratio)
        self._base: tuple[int, NDArray[np.float64]] | None = None
        self._selected: tuple[torch.Tensor, int] | None = None
        self._due = 0.5
        self._next = self._first_turn

    def select(self, context_len: int) -> Selection | None:
        """What the newest token of a context of this length may attend to; None for everything."""
        if context_len < self._policy.options.dense_below:
            return None
        budgets, least = self._budgets(context_len)
        audits, covered = self._choose_audits(budgets, context_len)
        is_dense = least >= context_len
        if self._steering is not None:
            if not self._policy.options.has_estimates:
                self._changes(self._steering.see_audits([(layer, head, 0.0) for layer, head in covered]))
            elif is_dense:
                self._changes(self._steering.see(np.zeros(self._policy.size)))
        return None if is_dense else Selection(budgets, audits)

    def learn(self, support: SpanSupport) -> None:
        """Correct the budgets after a step that had a selection; with a token budget they stay."""
        if self._steering is None:
            return
        if self._policy.options.has_estimates:
            assert support.estimates is not None
            self._changes(self._steering.see(support.estimates, support.audits))
        else:
            found = [(audit.layer, audit.kv_head, audit.dropped_mass) for audit in support.audits]
            self._changes(self._steering.see_audits(found))

    def _changes(self, is_changed: bool) -> None:
        if is_changed:
            self._selected = None

    def _budgets(self, context_len: int) -> tuple[torch.Tensor, int]:
        """[num_layers, num_kv_heads], int32, tokens; and the least of them."""
        part = 0 if self._mode.token_budget is not None else context_len // CONTEXT_STEP
        if self._base is None or self._base[0] != part:
            self._base = (part, self._policy.base_budgets(self._mode, (part + 1) * CONTEXT_STEP))
            self._selected = None
        if self._selected is None:
            wanted = self._base[1] if self._steering is None else self._base[1] * np.exp(self._steering.correction)
            groups = np.clip(np.ceil(wanted / GROUP_TOKENS), 1, 2**24)
            budgets = np.where(self._policy.whole, EVERYTHING, groups * GROUP_TOKENS).astype(np.int32)
            self._selected = (torch.from_numpy(budgets), int(budgets.min()))
        return self._selected

    def _choose_audits(
        self, budgets: torch.Tensor, context_len: int
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The (layer, KV head) of the rotation that are due: those to audit, and those that attend to everything."""
        policy = self._policy
        order = policy.order
        self._due += policy.options.audit_rate * len(order)
        chosen: list[tuple[int, int]] = []
        covered: list[tuple[int, int]] = []
        while self._due >= 1:
            layer, head = order[self._next % len(order)]
            self._next += 1
            self._due -= 1
            is_covered = int(budgets[layer, head]) >= policy.shape.visible(layer, context_len)
            (covered if is_covered else chosen).append((layer, head))
        return chosen, covered


def _first_turn(prompt_token_ids: Sequence[int], seed: int) -> int:
    """Where the rotation of audits begins: another place for other prompts and choices, the same for the same one."""
    return len(prompt_token_ids) + seed + zlib.crc32(array("q", prompt_token_ids[-64:]).tobytes())
