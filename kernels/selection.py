"""What shapes a selection of units, and what a selection leaves: options, scratch and results.

Made by `sparse_decode.make_plan`, read and written by `unit_score` and `sparse_attend`. Sizes are fixed when it is
made, so that a CUDA graph can be captured over it; contents change with every call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vashista.kernels.requirements import require
from vashista.kernels.triton_guard import next_power_of_two
from vashista.kernels.unit_select import MAX_UNITS, ONE_STEP_UNITS


@dataclass(frozen=True)
class ScoreOptions:
    """What shapes the scores and the selection of every level."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    is_sum: bool = False
    """Log of the sum over the query group; otherwise the maximum."""
    num_sinks: int = 16
    """Tokens at the start that are always kept."""
    num_recent: int = 64
    """Tokens at the end that are always kept; at least 1."""

    def __post_init__(self) -> None:
        """Check the counts; the rest is checked with the tensors."""
        require(self.num_sinks >= 0, f"num_sinks is {self.num_sinks}; it must not be negative")
        require(self.num_recent >= 1, f"num_recent is {self.num_recent}; it must be at least 1")


@dataclass(frozen=True)
class Selection:
    """What one level keeps; scratch and result, made once by `make_selection` and written by every call."""

    scores: torch.Tensor
    """[num_pairs, capacity] float32: of unit first + i, or of the i-th unit inside the coarser level's kept ones."""
    keys: torch.Tensor
    """[num_pairs, capacity] float32: the same, but -inf for sinks and recent units."""
    bounds: torch.Tensor
    """[num_pairs, capacity] float32: no less than the log of the unit's mass for any head of the query group."""
    part_sums: torch.Tensor
    """[3, num_pairs, parts] float32, of parts of `part_units` units: the best free score, log of the sum of scores'
    exponentials, the same of bounds."""
    parts: torch.Tensor
    """[num_pairs, max_kept] int32: parts that the selection opens, ascending."""
    units: torch.Tensor
    """[num_pairs, max_kept] int32: kept units, ascending; a unit u holds positions u * unit_tokens and on."""
    num_kept: torch.Tensor
    """[num_pairs] int32; 0 for a pair that is not sparse."""
    mass: torch.Tensor
    """[num_pairs, 4] float32, nats: log of the mass estimated in kept units (but the newest token's), in dropped ones
    (those of coarser levels too), the largest score dropped, and a certain bound of the log of the mass that any head
    of the query group drops; -inf where nothing is."""
    part_units: int
    """Units a part; 0 where units are selected in one step."""
    num_parts: int
    """Parts, to a power of two; 0 likewise."""
    max_forced: int
    """Sinks and recent units, to a power of two."""
    block: int
    """Units that are looked at one by one, to a power of two."""


def choose_part(capacity: int, max_kept: int) -> int:
    """Units a part, so that both steps of a selection read about the same; 0: in one step."""
    if capacity <= ONE_STEP_UNITS:
        return 0
    part = min((4, 8, 16, 32), key=lambda size: max(-(-capacity // size), max_kept * size))
    return part if max_kept * part <= capacity // 2 else 0


def make_selection(
    num_pairs: int, capacity: int, max_kept: int, device: torch.device, *, max_forced: int, is_listed: bool = False
) -> Selection:
    """Scratch for `num_pairs` pairs of up to `capacity` candidate units, `max_kept` of them kept.

    max_forced: sinks and recent units, at most; is_listed: the candidates are those inside a coarser level's kept
    units. Raises KernelInputError for more candidates than one program can select from.
    """
    require(
        capacity <= MAX_UNITS,
        f"{capacity} units are to be ranked; at most {MAX_UNITS} are possible: use a coarse level, or larger units",
    )
    part = 0 if is_listed else choose_part(capacity, max_kept)
    num_parts = -(-capacity // part) if part else 1

    room = -(-capacity // 16) * 16  # rows start at whole vectors

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    return Selection(
        scores=floats(num_pairs, room),
        keys=floats(num_pairs, room),
        bounds=floats(num_pairs, room),
        part_sums=floats(3, num_pairs, num_parts),
        parts=integers(num_pairs, max_kept),
        units=integers(num_pairs, max_kept),
        num_kept=integers(num_pairs),
        mass=floats(num_pairs, 4),
        part_units=part,
        num_parts=max(16, next_power_of_two(num_parts)) if part else 0,
        max_forced=next_power_of_two(max_forced),
        block=max(16, next_power_of_two(max_kept * part if part else capacity)),
    )
