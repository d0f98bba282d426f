"""A support profile as text for a terminal: tables, and a plot of support against context.

`vashista calibrate` prints what `profile_text` returns. Nothing here measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from vashista.engine.support_profile import RETRIEVAL_MASS, SupportProfile, SupportStats

SHOWN_TARGETS = 4
"""Of the targets, so many are columns of the table: the middle ones."""


def profile_text(profile: SupportProfile) -> str:
    """Everything about the profile that fits a terminal."""
    parts = [_support_table(profile), _head_table(profile), support_plot(profile), _budget_table(profile)]
    parts.append(_retrieval_lines(profile))
    return "\n\n".join([*parts, _times_table(profile)])


def heads(profile: SupportProfile) -> Iterator[tuple[int, int, list[SupportStats]]]:
    """(layer, KV head, stats at each context) of every head."""
    for layer, in_layer in enumerate(profile.support):
        for head, stats in enumerate(in_layer):
            yield layer, head, stats


def _support_table(profile: SupportProfile) -> str:
    """Median and largest head at each context."""
    lines = [
        "Support: tokens that hold the attention mass; the median KV head, then the largest",
        f"{'context':>9}  {'effective':>17}  {'90 % of mass':>17}  {'99 % of mass':>17}",
    ]
    for index, context in enumerate(profile.contexts):
        stats = [values[index] for _, _, values in heads(profile)]
        columns = (
            [s.effective_median for s in stats],
            [s.tokens_90_median for s in stats],
            [s.tokens_99_median for s in stats],
        )
        cells = "  ".join(f"{median(column):>8.0f} {max(column):>8.0f}" for column in columns)
        lines.append(f"{context:>9}  {cells}")
    return "\n".join(lines)


def _head_table(profile: SupportProfile) -> str:
    """Every head: tokens of 90 % at the first and the last context."""
    first, last = profile.contexts[0], profile.contexts[-1]
    lines = [f"Tokens of 90 % at a context of {first} > {last}, median over positions; layers down, KV heads across"]
    lines.append("layer " + "".join(f"{head:>14}" for head in range(profile.num_kv_heads)))
    for layer, in_layer in enumerate(profile.support):
        cells = (f"{stats[0].tokens_90_median:.0f} > {stats[-1].tokens_90_median:.0f}" for stats in in_layer)
        lines.append(f"{layer:>5} " + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def support_plot(profile: SupportProfile) -> str:
    """Support of all heads against context, both axes logarithmic: each number counts the heads in its place."""
    counts: list[dict[int, int]] = [{} for _ in profile.contexts]
    middles = []
    for index in range(len(profile.contexts)):
        values = [_row(stats[index].tokens_90_median) for _, _, stats in heads(profile)]
        for row in values:
            counts[index][row] = counts[index].get(row, 0) + 1
        middles.append(_row(median(stats[index].tokens_90_median for _, _, stats in heads(profile))))
    rows = [row for column in counts for row in column]
    lines = ["KV heads by tokens of 90 % (down) and context (across); [ ] marks the median head"]
    for row in range(max(rows), min(rows) - 1, -1):
        cells = ""
        for column, middle in zip(counts, middles, strict=True):
            text = str(column.get(row, "")) if row != middle else f"[{column.get(row, ' ')}]"
            cells += f"{text:^9}"
        label = f"{2 ** (row / 2):.0f}" if row % 2 == 0 else ""
        lines.append(f"{label:>9} |{cells}".rstrip())
    lines.append(" " * 10 + "+" + "-" * (9 * len(counts)))
    lines.append(" " * 11 + "".join(f"{context:^9}" for context in profile.contexts).rstrip())
    return "\n".join(lines)


def _row(tokens: float) -> int:
    """Half powers of two."""
    return round(2 * math.log2(max(tokens, 1.0)))


def _budget_table(profile: SupportProfile) -> str:
    """Tokens to keep for some targets: mean over heads, which is what a step costs, and the largest head."""
    first = max(0, len(profile.targets) - SHOWN_TARGETS) // 2
    shown = range(first, min(first + SHOWN_TARGETS, len(profile.targets)))
    lines = [
        f"Tokens to keep for a mean dropped mass (rule {profile.rule}, {profile.num_sinks} sinks, {profile.num_recent} "
        "recent); mean over KV heads, then the largest",
        f"{'context':>9}" + "".join(f"  {'<= ' + f'{profile.targets[t]:g}':>17}" for t in shown),
    ]
    for index, context in enumerate(profile.contexts):
        line = f"{context:>9}"
        for target in shown:
            tokens = [counts[index][target] for layer in profile.tokens for counts in layer]
            line += f"  {sum(tokens) / len(tokens):>8.0f} {max(tokens):>8}"
        lines.append(line)
    return "\n".join(lines)


def _retrieval_lines(profile: SupportProfile) -> str:
    """Which heads attend to everything, and why."""
    masses = profile.retrieval
    if masses is None:
        return "Which heads retrieve was not measured: all of them are budgeted."
    places = zip(*profile.retrieval_heads.nonzero(), strict=True)
    found = [f"layer {layer} head {head} ({masses[layer][head]:.2f})" for layer, head in places]
    what = f"mass of at least {RETRIEVAL_MASS:g} on what followed an earlier occurrence of the text being read"
    return f"Retrieval heads, which attend to everything: {', '.join(found) or 'none'}; {what}"


def _times_table(profile: SupportProfile) -> str:
    lines = []
    for name, times in profile.devices.items():
        lines.append(f"Decode step of one request, dense, {name}, {times.dtype}")
        lines += [f"{step.context:>9} {1000 * step.step_s:>9.2f} ms" for step in times.dense_steps]
        slope = f"{1e6 * times.dense_s_per_token:.3f} us per token of context"
        lines.append(f"      fit {1000 * times.overhead_s:>9.2f} ms + {slope}")
        if times.sparse_steps:
            lines += ["Sparse, with a token budget", f"{'context':>9} {'budget':>9}"]
            lines += [f"{s.context:>9} {s.token_budget:>9} {1000 * s.step_s:>9.2f} ms" for s in times.sparse_steps]
            scoring_s, attending_s = times.sparse_s_per_context_token or 0.0, times.sparse_s_per_kept_token or 0.0
            slopes = f"{1e6 * scoring_s:.3f} us per token of context + {1e6 * attending_s:.3f} us per token kept"
            lines.append(f"      fit {1000 * times.overhead_s:>9.2f} ms + {slopes}")
    return "\n".join(lines)
