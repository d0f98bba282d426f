"""From what the GPU's kernels report of each head to the `SpanSupport` of each request; on a CPU the kernels sum up.

In numpy: a step's numbers are few, and torch's calls on them would take longer than the sums.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vashista.engine.support import Audit, SpanSupport

Floats = NDArray[np.float32]


def sum_head_steps(
    *,
    log_kept: Floats,
    log_estimate: Floats,
    top_dropped: Floats,
    log_bound: Floats,
    num_kept: NDArray[np.float32],
    visible: NDArray[np.int64],
    audits: list[list[Audit]],
    has_estimate: bool,
) -> list[SpanSupport]:
    """Sums over layers and KV heads; a query group counts with its worst head.

    The first four: [num_layers, num_requests, num_kv_heads, group], nats: log of the kept mass; of the dropped mass,
    estimated; the largest logit estimated among dropped tokens; a bound of the log of the dropped mass. NaN where a
    rule knows nothing. num_kept: [num_layers, num_requests, num_kv_heads], tokens; visible: [num_layers,
    num_requests], tokens that a head could attend to. audits: of each request. has_estimate: False for a rule whose
    scores are bounds.
    """
    if not has_estimate:
        log_estimate = top_dropped = np.full_like(log_kept, np.nan)
    is_dense = num_kept >= visible[..., None]
    with np.errstate(over="ignore", invalid="ignore"):  # exp(inf) is inf, and 1 / inf the 0 that is meant
        estimate = (1 / (1 + np.exp(log_kept - log_estimate, dtype=np.float64))).max(-1)
        bound = (1 / (1 + np.exp(log_kept - log_bound, dtype=np.float64))).max(-1)
        gap = (log_kept - top_dropped).min(-1)
    estimate[is_dense] = bound[is_dense] = gap[is_dense] = 0.0
    bound[np.isnan(bound)] = 1.0
    sums = [values.sum((0, 2), dtype=np.float64) for values in (is_dense, num_kept, bound, estimate, gap)]
    num_visible = visible.sum(0) * num_kept.shape[2]
    return [
        SpanSupport(
            num_dense=int(sums[0][index]),
            tokens_attended=int(sums[1][index]),
            tokens_visible=int(num_visible[index]),
            dropped_mass_bound=float(sums[2][index]),
            dropped_mass_estimate=float(sums[3][index]),
            support_gap=float(sums[4][index]),
            audits=found,
            estimates=estimate[:, index],
        )
        for index, found in enumerate(audits)
    ]
