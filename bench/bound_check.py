"""Whether the bounds of what sparse attention drops hold on the CPU: `python bench/bound_check.py`.

Draws keys and queries from ordinary and from adversarial generators, lets the compiled kernel select and attend, with
random budgets, windows, head sizes, types, instruction sets and page tables, and computes the truth in float64 from the
keys as they lie in the store. Counted are head-steps (one new token in one KV head) that dropped something; each is
judged for all of its query heads. Two statements are checked, which are what a reply is made of:

    mass   `log_dropped_bound` is at least the log of the dropped mass
    share  the share of the mass that follows from it and from `log_kept_mass` is at least the true share; judged by the
           log of dropped over kept mass, so that the last digits of shares near 0 and 1 count too

Slack is bound less truth, in nats; the least one says how near the generator came. A single violation, or a NaN, makes
the exit status 1. What is shown is that no violation was found in so many draws, not that there is none: the proof is
in kernels/cpu/sparse.h. Rule WINDOW has no bound (it says +inf) and is left out. 10^7 head-steps take about an hour.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tabulate import tabulate

from vashista.kernels.cpu import library as cpu_library
from vashista.kernels.cpu import sparse as kernel

GROUP = 4
NUM_KV_HEADS = 8
NUM_REQUESTS = 32
NUM_QUERIES = 8
"""Draws of queries, budgets and window for one draw of keys."""
RULES = (kernel.Rule.MEAN, kernel.Rule.MEAN_VARIANCE, kernel.Rule.BOX)


class Draw:
    """One layer's requests, all of one context length: keys in the store, and the next tokens' queries and keys."""

    def __init__(self, dice: torch.Generator) -> None:
        self.dice = dice
        self.dim = (64, 80, 128)[self.below(3)]
        self.dtype = (torch.float32, torch.bfloat16)[self.below(2)]
        self.context = 65 + self.below(235) if self.below(32) else 1500 + self.below(1500)
        num_pages = -(-self.context // kernel.UNIT_TOKENS)
        self.pages = torch.randperm(NUM_REQUESTS * num_pages, generator=dice).view(NUM_REQUESTS, num_pages)
        self.keys = self.normal(NUM_KV_HEADS, self.pages.numel() * kernel.UNIT_TOKENS, self.dim)
        self.angles = self.normal(NUM_REQUESTS, self.dim // 2)
        self.draw_queries()

    def below(self, limit: int) -> int:
        """A whole number from 0 to limit - 1."""
        return int(torch.randint(limit, (), generator=self.dice))

    def normal(self, *size: int) -> torch.Tensor:
        """Normally distributed numbers."""
        return torch.randn(*size, generator=self.dice)

    def draw_queries(self) -> None:
        """Queries and new keys as most generators leave them."""
        self.queries = self.normal(NUM_REQUESTS, NUM_KV_HEADS * GROUP, self.dim) * (1.0, 1.0, 8.0)[self.below(3)]
        self.new_keys = self.normal(NUM_REQUESTS, NUM_KV_HEADS, self.dim)


# Generators. Each spoils a draw in place: first the keys alone, then, for every draw of queries, the queries.
Spoiler = Callable[[Draw], None]


def keep(draw: Draw) -> None:
    """Leaves it normal."""


def scale_keys(factor: float) -> Spoiler:
    """Makes the keys larger or smaller."""

    def spoil(draw: Draw) -> None:
        draw.keys *= factor

    return spoil


def enlarge_keys(draw: Draw) -> None:
    """Makes the keys 10^3 to 10^16 times larger, beyond which squares leave float32."""
    draw.keys *= 10.0 ** (3 + draw.below(14))


def equal_keys(draw: Draw) -> None:
    """All keys of a head are equal."""
    draw.keys[:] = draw.keys[:, :1].clone()


def dominant_keys(draw: Draw) -> None:
    """Every 17th key is 100 times larger."""
    draw.keys[:, ::17] *= 100


def outlier_dimension(draw: Draw) -> None:
    """One dimension is far larger than the others, as in real models."""
    draw.keys[..., 3] += 1000


def keys_on_a_line(draw: Draw) -> None:
    """The keys of a head differ by a factor alone."""
    sizes = draw.normal(NUM_KV_HEADS, draw.keys.shape[1], 1)
    draw.keys[:] = 3 * sizes * draw.normal(1, 1, draw.dim)


def narrow_keys(draw: Draw) -> None:
    """The keys of a head point the same way."""
    draw.angles.zero_()
    draw.keys *= 0.05
    draw.keys += draw.normal(NUM_KV_HEADS, 1, draw.dim)


def aligned_queries(draw: Draw) -> None:
    """The queries point where the keys do."""
    middle = draw.keys.float().mean(1).repeat_interleave(GROUP, 0)
    draw.queries = 3 * middle + 0.01 * draw.normal(*draw.queries.shape)


def exact_keys(draw: Draw) -> None:
    """Equal keys that the codes hold without loss: the radius is 0, and rounding alone parts bound and truth."""
    draw.angles.zero_()
    key = torch.randint(-127, 128, (NUM_KV_HEADS, 1, draw.dim), generator=draw.dice).float()
    key[..., 0] = 127
    draw.keys[:] = key * 2.0 ** (draw.below(16) - 12)


def huge_new_keys(draw: Draw) -> None:
    """The new key, which is always kept, is huge and at right angles to every query: its logit is all rounding."""
    draw.angles.zero_()
    order = torch.randperm(draw.dim, generator=draw.dice)
    signs = torch.tensor([1.0, -1.0]).repeat(draw.dim // 2)
    draw.queries[..., order] = draw.queries[..., ::2].repeat_interleave(2, -1)
    draw.new_keys[..., order] = draw.new_keys[..., ::2].repeat_interleave(2, -1) * signs * 10.0 ** (3 + draw.below(5))


def exact_new_keys(draw: Draw) -> None:
    """The new key equals the others."""
    draw.new_keys = draw.keys[:, :1].transpose(0, 1).expand(NUM_REQUESTS, -1, -1).float()


GENERATORS: dict[str, tuple[Spoiler, Spoiler]] = {
    "normal": (keep, keep),
    "tiny keys": (scale_keys(1e-3), keep),
    "large keys": (scale_keys(30.0), keep),
    "huge keys": (enlarge_keys, keep),
    "denormal keys": (scale_keys(1e-39), keep),
    "equal keys": (equal_keys, keep),
    "dominant keys": (dominant_keys, keep),
    "outlier dimension": (outlier_dimension, keep),
    "keys on a line": (keys_on_a_line, keep),
    "aligned queries": (narrow_keys, aligned_queries),
    "right angles": (scale_keys(1e-3), huge_new_keys),
    "exact codes": (exact_keys, exact_new_keys),
}


@dataclass(slots=True)
class Count:
    """Of one generator and rule."""

    num_head_steps: int = 0
    num_mass_violations: int = 0
    num_share_violations: int = 0
    least_mass_slack: float = math.inf
    least_share_slack: float = math.inf

    def add(self, mass_slack: torch.Tensor, share_slack: torch.Tensor) -> None:
        """Both: [num_head_steps, GROUP], nats; NaN is a violation."""
        self.num_head_steps += mass_slack.shape[0]
        self.num_mass_violations += int((~(mass_slack >= 0)).any(1).sum())
        self.num_share_violations += int((~(share_slack >= 0)).any(1).sum())
        if mass_slack.numel():
            self.least_mass_slack = min(self.least_mass_slack, float(mass_slack.min()))
            self.least_share_slack = min(self.least_share_slack, float(share_slack.min()))


def main() -> int:
    """1 if a bound was below the truth."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head-steps", type=float, default=1e7, help="at least so many, over all generators and rules")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    library = cpu_library.load()
    if library is None:
        raise SystemExit(f"There is nothing to check: {cpu_library.status()}.")
    torch.set_num_threads(options.threads)
    dice = torch.Generator().manual_seed(options.seed)
    counts = {(name, rule): Count() for name in GENERATORS for rule in RULES}
    begin_s = time.monotonic()
    while sum(count.num_head_steps for count in counts.values()) < options.head_steps:
        for (name, rule), count in counts.items():
            check(library, dice, GENERATORS[name], rule, count)
    report(counts, f"seed {options.seed}, torch {torch.__version__}, {time.monotonic() - begin_s:.0f} s")
    return int(any(count.num_mass_violations or count.num_share_violations for count in counts.values()))


def check(
    library: cpu_library.Library,
    dice: torch.Generator,
    generator: tuple[Spoiler, Spoiler],
    rule: kernel.Rule,
    count: Count,
) -> None:
    """One draw of keys and NUM_QUERIES of queries."""
    library.instruction_set = int(torch.randint(len(library.set_names), (), generator=dice))
    draw = Draw(dice)
    spoil_keys, spoil_queries = generator
    spoil_keys(draw)
    store = torch.stack((draw.keys, torch.zeros_like(draw.keys))).to(draw.dtype)
    summaries = kernel.make_summaries(rule, NUM_KV_HEADS, store.shape[2], draw.dim)
    kernel.summarize(library, store, summaries, written(draw))
    slots = (draw.pages.unsqueeze(-1) * kernel.UNIT_TOKENS + torch.arange(kernel.UNIT_TOKENS)).flatten(1)
    slots = slots[:, : draw.context]
    keys = store[0].double()[:, slots].transpose(0, 1).contiguous()
    for _ in range(NUM_QUERIES):
        draw.draw_queries()
        spoil_queries(draw)
        window = (None, None, 40 + draw.below(260))[draw.below(3)]
        plan, queries = decode(library, draw, store, summaries, window)
        keys[:, :, -1] = store[0].double()[:, slots[:, -1]].transpose(0, 1)
        kept, dropped, drops = truth(queries @ keys.transpose(-1, -2), plan, window)
        found = plan.diagnostics[0].double().view(*kept.shape, -1)[drops]
        log_kept, log_bound = found[..., 0], found[..., 4]
        count.add(log_bound - dropped[drops], log_bound - log_kept - (dropped - kept)[drops])


def written(draw: Draw) -> list[tuple[int, int]]:
    """The slots of the tokens before the new one."""
    runs = []
    for pages in draw.pages.tolist():
        for index, page in enumerate(pages):
            num_tokens = min(draw.context - 1 - index * kernel.UNIT_TOKENS, kernel.UNIT_TOKENS)
            if num_tokens > 0:
                runs.append((page * kernel.UNIT_TOKENS, page * kernel.UNIT_TOKENS + num_tokens))
    return runs


def decode(
    library: cpu_library.Library,
    draw: Draw,
    store: torch.Tensor,
    summaries: kernel.Summaries,
    window: int | None,
) -> tuple[kernel.SparsePlan, torch.Tensor]:
    """One step of all requests; its queries, rotated and scaled: [requests, KV heads, GROUP, dim], float64."""
    shape = kernel.SparseShape(
        NUM_KV_HEADS * GROUP, NUM_KV_HEADS, draw.dim, kernel.UNIT_TOKENS, draw.dim**-0.5, draw.dtype, summaries.rule,
        num_sinks=draw.below(20), num_recent=1 + draw.below(40),
    )  # fmt: skip
    budgets = torch.randint(1, 200, (1, NUM_REQUESTS, NUM_KV_HEADS), dtype=torch.int32, generator=draw.dice)
    requests = [(row, draw.context, pages) for row, pages in enumerate(draw.pages.tolist())]
    cos, sin = draw.angles.cos(), draw.angles.sin()
    plan = kernel.plan(shape, requests, budgets, cos, sin)
    qkv = torch.cat((draw.queries, draw.new_keys, torch.zeros_like(draw.new_keys)), 1).to(draw.dtype)
    kernel.decode(library, plan, 0, qkv, store, summaries, torch.empty_like(qkv[:, : shape.num_heads]), window=window)
    first, second = qkv[:, : shape.num_heads].double().chunk(2, -1)
    cos, sin = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1) * shape.scale
    return plan, rotated.view(NUM_REQUESTS, NUM_KV_HEADS, GROUP, draw.dim)


def truth(
    logits: torch.Tensor, plan: kernel.SparsePlan, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logs of the kept and of the dropped mass, [requests, KV heads, GROUP], and which KV heads drop anything.

    logits: [requests, KV heads, GROUP, context], float64.
    """
    context, max_units = logits.shape[-1], plan.kept.shape[2]
    units = plan.kept.long().where(torch.arange(max_units) < plan.num_kept.unsqueeze(-1), max_units)
    is_kept = torch.zeros(NUM_REQUESTS, NUM_KV_HEADS, max_units + 1, dtype=torch.bool).scatter_(2, units, True)
    is_kept = is_kept[..., :max_units].repeat_interleave(kernel.UNIT_TOKENS, -1)[..., :context]
    is_visible = torch.arange(context) >= context - (window or context)
    is_dropped = is_visible & ~is_kept
    kept = logits.masked_fill(~(is_visible & is_kept).unsqueeze(2), -math.inf).logsumexp(-1)
    dropped = logits.masked_fill(~is_dropped.unsqueeze(2), -math.inf).logsumexp(-1)
    return kept, dropped, is_dropped.any(-1)


def report(counts: dict[tuple[str, kernel.Rule], Count], conditions: str) -> None:
    """The table, and its sum in a line."""
    rows = [
        {
            "generator": name, "rule": rule.name.lower(), "head-steps": count.num_head_steps,
            "below mass": count.num_mass_violations, "least slack": f"{count.least_mass_slack:.2e}",
            "below share": count.num_share_violations, "least slack ": f"{count.least_share_slack:.2e}",
        }
        for (name, rule), count in counts.items()
    ]  # fmt: skip
    print(tabulate(rows, headers="keys", disable_numparse=True, colalign=("left", "left", *["right"] * 5)))
    num_mass, num_share = (sum(getattr(c, name) for c in counts.values()) for name in
                           ("num_mass_violations", "num_share_violations"))  # fmt: skip
    total = sum(count.num_head_steps for count in counts.values())
    print(f"\n{total} head-steps, {num_mass} bounds below the mass, {num_share} below the share ({conditions})")


if __name__ == "__main__":
    sys.exit(main())
