"""Sparse decode of few pairs by clusters of thread blocks, in one launch, where a device has them.

With few (request, KV head) pairs a step of `unit_score` and `sparse_attend` is mostly waiting: launch waits for launch,
every program selects for itself, and the last one merges what others left in memory. The kernel of this folder has the
blocks of a cluster do all of it together, through their shared memory: score the units, select, attend and merge, and
write the summaries of the step's tokens. Same inputs, same masses, and the same kept groups where no two scores are
within a rounding of each other; the output differs in the order of its sums. Where blocks would have too many units to
score, and for formulas that `cluster_score.cu` does not have, `unit_score` scores before. Dense pairs of the batch stay
with `sparse_attend`, which the caller launches behind it. Called by `sparse_decode`; compiled and launched by
`launcher`.

Limits: compute capability 9.0, bfloat16 or float16, head_dim a multiple of 16 from 64 to 256, query groups of up to 8
heads (4 at head_dim 256), ranked groups. Elsewhere, and with more pairs, `unit_score` and `sparse_attend` do all.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from vashista.kernels.cuda import launcher
from vashista.kernels.key_summary import GROUP_TOKENS, MIN_SUMMARY_DIM, Rule, SummaryLevel
from vashista.kernels.paged_tile import device_limits
from vashista.kernels.selection import ScoreOptions, Selection
from vashista.kernels.triton_guard import next_power_of_two
from vashista.kernels.unit_mass import BOUND_SLACK

USE_CLUSTERS = True
THREADS = 256
MAX_CLUSTER = 16
"""Blocks a cluster: beyond 8 a kernel must ask for it, and a device of compute capability 9.0 has 16."""
MIN_CLUSTER = 8
"""With fewer blocks a pair its keys and values are read too slowly; `sparse_attend` cuts them into more pieces."""
MAX_KEYS_PER_THREAD = 8
MAX_SCORED_UNITS = THREADS
"""Units that a block scores itself, at most: with more, `unit_score` on the whole device is faster (H100)."""
PER_COARSE = 4
"""Groups in a coarse unit whose groups are scored here."""
MIN_SHARE, MIN_OPENED = 256, 8
"""Room for so many groups to attend to, and coarse units to score, costs nothing: fewer shapes are compiled."""
MAX_ITEMS = THREADS // 4
"""Groups that a block scores below a coarse level."""
MAX_GROUP = 8
MAX_HEAD_DIM = 256
MAX_ACROSS = 1024
"""Heads of a group times head_dim: what a block's shared memory has room for."""
SCORED_HEAD_DIMS = (64, 128, 256)
HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ClusterShape:
    """What the kernel is compiled for."""

    group: int
    head_dim: int
    page_size: int
    cluster: int
    """Blocks that share a pair."""
    keys_per_thread: int
    per_coarse: int
    """Groups in a unit of the coarse level that holds the candidates; 0: all groups are candidates."""
    is_scored: bool
    """Whether clusters score the units that are ranked first themselves; else `unit_score` does, before them."""
    max_share: int
    """Groups that a block attends to, at most."""
    max_opened: int
    """Coarse units whose groups a block scores, at most."""
    has_softcap: bool
    is_half: bool
    """float16; else bfloat16."""

    def names(self) -> dict[str, int]:
        """The kernel's constants."""
        return {
            "THREADS": THREADS,
            "CLUSTER": self.cluster,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "PAGE_SIZE": self.page_size,
            "KEYS_PER_THREAD": self.keys_per_thread,
            "PER_COARSE": self.per_coarse,
            "IS_SCORED": int(self.is_scored),
            "MAX_SHARE": self.max_share,
            "MAX_OPENED": self.max_opened,
            "HAS_SOFTCAP": int(self.has_softcap),
            "IS_HALF": int(self.is_half),
        }


class Level(ctypes.Structure):
    """The summaries of one level, as in `cluster_search.cu`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "second_codes", "steps")),
        *((name, ctypes.c_longlong) for name in ("record_bytes", "unit")),
    )


class Job(ctypes.Structure):
    """The kernel's argument, field by field as in `cluster_search.cu`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "q", "k_cache", "v_cache", "page_table", "context_lens", "budgets", "scores", "keys", "bounds",
            "slots", "coarse_units", "coarse_kept", "coarse_mass", "item_scores", "item_keys",
            "item_bounds", "units", "num_kept", "mass", "out", "lse",
        )),
        *((name, ctypes.c_longlong) for name in (
            "q_stride_row", "q_stride_head", "k_stride_page", "k_stride_head", "k_stride_token", "v_stride_page",
            "v_stride_head", "v_stride_token", "out_stride_row", "out_stride_head", "lse_stride", "table_stride",
            "capacity", "max_kept", "max_coarse", "item_capacity",
        )),
        ("levels", Level * 2),
        *((name, ctypes.c_int) for name in (
            "num_pairs", "num_kv_heads", "num_upkeep", "window", "num_sinks", "num_recent", "num_candidates",
            "per_kept", "full_context", "is_alone",
        )),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "slack")),
    )  # fmt: skip


def choose_shape(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    options: ScoreOptions,
    levels: tuple[SummaryLevel, ...],
    groups: Selection,
    coarse: Selection | None,
) -> ClusterShape | None:
    """The shape of the clusters for these tensors, or None where `sparse_attend` does better or clusters cannot be had.

    Decided by what a CUDA graph keeps: shapes and the device, no lengths.
    """
    k_cache, num_pairs = caches[0], groups.num_kept.shape[0]
    num_kv_heads, page_size, head_dim = k_cache.shape[1:]
    group = q.shape[1] // num_kv_heads
    is_small = head_dim <= MAX_HEAD_DIM and group <= MAX_GROUP and group * head_dim <= MAX_ACROSS
    is_fit = is_small and q.dtype in HALF_DTYPES and head_dim % 16 == 0 and head_dim >= MIN_SUMMARY_DIM
    cluster = find_blocks(num_pairs, q.device)
    if not (cluster and is_fit and page_size % GROUP_TOKENS == 0):
        return None
    is_paired = q.stride(2) == 1 and q.data_ptr() % 4 == 0 and all(step % 2 == 0 for step in q.stride()[:2])
    if not is_paired or not all(_has_whole_vectors(cache) for cache in caches):
        return None
    ranked = coarse or groups
    keys = next_power_of_two(-(-ranked.keys.shape[1] // (cluster * THREADS)))
    opened = -(-coarse.units.shape[1] // cluster) if coarse else 1
    can_score = _can_score(head_dim, options, levels)
    if keys > MAX_KEYS_PER_THREAD or (coarse and not (can_score and opened * PER_COARSE <= MAX_ITEMS)):
        return None
    shape = ClusterShape(
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        cluster=cluster,
        keys_per_thread=keys,
        per_coarse=PER_COARSE if coarse else 0,
        is_scored=can_score and ranked.keys.shape[1] <= cluster * MAX_SCORED_UNITS,
        max_share=next_power_of_two(max(-(-groups.units.shape[1] // cluster), MIN_SHARE)),
        max_opened=next_power_of_two(max(opened, MIN_OPENED)) if coarse else 1,
        has_softcap=options.softcap is not None,
        is_half=q.dtype == torch.float16,
    )
    return shape if launcher.can_launch(tuple(shape.names().items()), q.device) else None


def _can_score(head_dim: int, options: ScoreOptions, levels: tuple[SummaryLevel, ...]) -> bool:
    """Whether `cluster_score.cu` and `cluster_rank.cu` have the formulas, and `cluster_upkeep.cu` the summaries."""
    is_plain = not options.is_sum and options.softcap is None and head_dim in SCORED_HEAD_DIMS
    is_whole = len(levels) == 1 or (len(levels) == 2 and levels[1].unit_tokens == PER_COARSE * GROUP_TOKENS)
    are_right = all(level.rule == Rule.MEAN_VARIANCE and level.first.data_ptr() % 16 == 0 for level in levels)
    return is_plain and is_whole and are_right


def find_blocks(num_pairs: int, device: torch.device) -> int:
    """Blocks a pair of so many; 0 where clusters cannot be had, or would have too few."""
    if not (USE_CLUSTERS and launcher.has_clusters(device)):
        return 0
    count = count_blocks(num_pairs, device)
    return count if count >= MIN_CLUSTER else 0


def count_blocks(num_pairs: int, device: torch.device) -> int:
    """Blocks a pair, a power of two: as many as all have a multiprocessor for themselves, to MAX_CLUSTER."""
    most = device_limits(device).num_multiprocessors // num_pairs
    return min(1 << most.bit_length() >> 1, MAX_CLUSTER)


def _has_whole_vectors(cache: torch.Tensor) -> bool:
    """True if each key starts at 16 bytes and lies in one piece."""
    return cache.stride(3) == 1 and cache.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in cache.stride()[:3])


def attend_clusters(
    shape: ClusterShape,
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    page_table: torch.Tensor,
    context_lens: torch.Tensor,
    budgets: torch.Tensor,
    options: ScoreOptions,
    levels: tuple[SummaryLevel, ...],
    groups: Selection,
    coarse: tuple[Selection, tuple[int, int, int]] | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    slots: torch.Tensor | None = None,
    is_alone: bool = False,
) -> None:
    """Launch: outputs, kept groups and masses of sparse pairs and of empty contexts; nothing is written for others, but
    NaN if `is_alone`, where the caller vouches that there are none.

    Lengths, budgets and the page table are read while the kernel before may still work, which must not write them.

    levels: fine, and coarse if there is one, ranked by or not. coarse: the coarse level's selection, whose units are
    selected here and their groups scored, and how many to keep, as for `score_units`. slots: of the step's tokens,
    whose summaries are written too; only of shapes that are scored here. The tensors were checked by `sparse_decode`,
    and the shape was chosen for them.
    """
    k_cache, v_cache = caches
    ranked, above, limits = groups, groups, (0, 0, 0)
    if coarse is not None:
        ranked = above = coarse[0]
        limits = coarse[1]
    pointers = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "page_table": page_table, "context_lens": context_lens,
        "budgets": budgets, "scores": ranked.scores, "keys": ranked.keys, "bounds": ranked.bounds, "slots": slots,
        "coarse_units": above.units, "coarse_kept": above.num_kept, "coarse_mass": above.mass,
        "item_scores": groups.scores, "item_keys": groups.keys, "item_bounds": groups.bounds, "units": groups.units,
        "num_kept": groups.num_kept, "mass": groups.mass, "out": out, "lse": lse,
    }  # fmt: skip
    num_pairs, num_upkeep = groups.num_kept.shape[0], 0 if slots is None else len(levels)
    job = Job(
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in pointers.items()},
        **dict(zip(("q_stride_row", "q_stride_head"), q.stride(), strict=False)),
        **dict(zip(("k_stride_page", "k_stride_head", "k_stride_token"), k_cache.stride(), strict=False)),
        **dict(zip(("v_stride_page", "v_stride_head", "v_stride_token"), v_cache.stride(), strict=False)),
        **dict(zip(("out_stride_row", "out_stride_head"), out.stride(), strict=False)),
        lse_stride=0 if lse is None else lse.stride(0),
        table_stride=page_table.stride(0),
        capacity=ranked.scores.shape[1],
        max_kept=groups.units.shape[1],
        max_coarse=above.units.shape[1],
        item_capacity=groups.scores.shape[1],
        levels=(Level * 2)(*map(_point_to, levels)),
        num_pairs=num_pairs,
        num_upkeep=num_upkeep,
        num_kv_heads=k_cache.shape[1],
        window=options.window or 0,
        num_sinks=options.num_sinks,
        num_recent=options.num_recent,
        **dict(zip(("num_candidates", "per_kept", "full_context"), limits, strict=True)),
        is_alone=int(is_alone),
        scale=options.scale,
        softcap=options.softcap or 0.0,
        slack=BOUND_SLACK,
    )
    upkeep_clusters = -(-num_pairs * num_upkeep // shape.cluster)
    launcher.launch(shape.names(), job, num_pairs + upkeep_clusters, q.device)


def _point_to(level: SummaryLevel) -> Level:
    parts = {"codes": level.first, "second_codes": level.second, "steps": level.steps}
    pointers = {name: tensor.data_ptr() for name, tensor in parts.items()}
    return Level(record_bytes=level.first.stride(0), unit=level.unit_tokens, **pointers)
