"""Whether the bounds of what sparse attention drops hold on the CPU: `python bench/bound_check.py`.

Draws keys and queries from ordinary and from adversarial families (bound_families.py), lets the compiled kernel select
and attend, with random budgets, windows, head sizes, query groups, types, instruction sets and page tables, and
computes the truth in float64 from the keys as they lie in the store. Counted are head-steps (one new token in one KV
head) that dropped something; each is judged for all of its query heads. Two statements are checked, which are what a
reply is made of:

    mass   `log_dropped_bound` is at least the log of the dropped mass
    share  the share of the mass that follows from it and from `log_kept_mass` is at least the true share; judged by the
           log of dropped over kept mass, so that the last digits of shares near 0 and 1 count too

Slack is bound less truth, in nats; the least one says how near the family came. A single violation, or a NaN, makes the
exit status 1. What is shown is that no violation was found in so many draws, not that there is none: the proof is in
kernels/cpu/sparse.h. Rule WINDOW has no bound (it says +inf) and is left out.

That the check can fail: `--mutants` first builds the kernels with one mistake in a bound each (bound_mutants.py, needs
gcc) and demands that every mistake is found.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from bound_families import FAMILIES, NUM_KV_HEADS, UNIT, Draw, Family
from bound_mutants import MUTANTS, build
from tabulate import tabulate

from vashista.kernels.cpu import library as cpu_library
from vashista.kernels.cpu import sparse as kernel

NUM_QUERIES = 8
"""Draws of queries, budgets and window for one draw of keys."""
MUTANT_HEAD_STEPS = 60_000
RULES = (kernel.Rule.MEAN, kernel.Rule.MEAN_VARIANCE, kernel.Rule.BOX)


@dataclass(slots=True)
class Count:
    """Of one family and rule."""

    num_head_steps: int = 0
    num_query_heads: int = 0
    num_mass_violations: int = 0
    num_share_violations: int = 0
    least_mass_slack: float = math.inf
    least_share_slack: float = math.inf

    def add(self, mass_slack: torch.Tensor, share_slack: torch.Tensor) -> None:
        """Both: [num_head_steps, group], nats; NaN is a violation."""
        self.num_head_steps += mass_slack.shape[0]
        self.num_query_heads += mass_slack.numel()
        self.num_mass_violations += int((~(mass_slack >= 0)).any(1).sum())
        self.num_share_violations += int((~(share_slack >= 0)).any(1).sum())
        if mass_slack.numel():
            self.least_mass_slack = min(self.least_mass_slack, float(mass_slack.min()))
            self.least_share_slack = min(self.least_share_slack, float(share_slack.min()))


@dataclass(slots=True)
class Tally:
    """Of a whole run."""

    counts: dict[tuple[str, kernel.Rule], Count] = field(
        default_factory=lambda: {(name, rule): Count() for name in FAMILIES for rule in RULES}
    )
    kinds: dict[str, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in ("context up to", "dtype", "head_dim", "group", "set")}
    )
    """Head-steps by what they were drawn with."""

    @property
    def num_head_steps(self) -> int:
        """That dropped something."""
        return sum(count.num_head_steps for count in self.counts.values())

    @property
    def num_violations(self) -> tuple[int, int]:
        """Bounds below the mass, and below the share."""
        counts = self.counts.values()
        return sum(c.num_mass_violations for c in counts), sum(c.num_share_violations for c in counts)


def main() -> int:
    """1 if a bound was below the truth, or a mutant was not found out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head-steps", type=float, default=1e7, help="at least so many, over all families and rules")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mutants", action="store_true", help="first show that mistakes in the bounds are found")
    options = parser.parse_args()
    library = cpu_library.load()
    if library is None:
        raise SystemExit(f"There is nothing to check: {cpu_library.status()}.")
    torch.set_num_threads(options.threads)
    is_sharp = not options.mutants or find_mutants(options.seed)
    begin_s = time.monotonic()
    tally = run(library, options.seed, int(options.head_steps))
    report(tally, f"seed {options.seed}, torch {torch.__version__}, {time.monotonic() - begin_s:.0f} s")
    return int(any(tally.num_violations) or not is_sharp)


def find_mutants(seed: int) -> bool:
    """Whether each mutant breaks a bound, said aloud."""
    rows = []
    for mutant in MUTANTS:
        with build(mutant) as library:
            tally = run(library, seed, MUTANT_HEAD_STEPS)
        found = [name for (name, _), c in tally.counts.items() if c.num_mass_violations or c.num_share_violations]
        num_mass, num_share = tally.num_violations
        rows.append({"mistake": mutant.name, "head-steps": tally.num_head_steps, "below mass": num_mass,
                     "below share": num_share, "families": len(set(found))})  # fmt: skip
    print(tabulate(rows, headers="keys"))
    is_sharp = all(row["families"] for row in rows)
    print(
        "\nEvery mistake was found.\n" if is_sharp else "\nMISSED a mistake: the check below shows less.\n", flush=True
    )
    return is_sharp


def run(library: cpu_library.Library, seed: int, num_head_steps: int) -> Tally:
    """Rounds through all families and rules, until there are so many head-steps."""
    dice, tally = torch.Generator().manual_seed(seed), Tally()
    while tally.num_head_steps < num_head_steps:
        for (name, rule), count in tally.counts.items():
            check(library, dice, FAMILIES[name], rule, count, tally)
    return tally


def check(
    library: cpu_library.Library, dice: torch.Generator, family: Family, rule: kernel.Rule, count: Count, tally: Tally
) -> None:
    """One draw of keys and NUM_QUERIES of queries."""
    library.instruction_set = int(torch.randint(len(library.set_names), (), generator=dice))
    draw = Draw(dice, rule)
    family.spoil_keys(draw)
    store = torch.stack((draw.keys, torch.zeros_like(draw.keys))).to(draw.dtype)
    summaries = kernel.make_summaries(rule, NUM_KV_HEADS, store.shape[2], draw.dim)
    kernel.summarize(library, store, summaries, written(draw))
    num_units = -(-draw.context // UNIT)
    keys = torch.zeros(draw.num_requests, NUM_KV_HEADS, num_units * UNIT, draw.dim, dtype=torch.float64)
    keys[:, :, : draw.context] = store[0][:, draw.slots].transpose(0, 1)
    plans, queries, windows, new_keys = [], [], [], []
    for _ in range(NUM_QUERIES):
        draw.draw_queries()
        family.spoil_queries(draw, summaries)
        windows.append((None, None, 40 + draw.below(260))[draw.below(3)])
        plan, rotated = decode(library, draw, store, summaries, windows[-1])
        plans.append(plan)
        queries.append(rotated)
        new_keys.append(store[0][:, draw.slots[:, -1]].transpose(0, 1).double())
    before = count.num_head_steps
    all_logits = (torch.cat(queries, 2) @ keys.transpose(-1, -2)).split(draw.group, 2)
    for plan, logits, rotated, new_key, window in zip(plans, all_logits, queries, new_keys, windows, strict=True):
        logits[..., draw.context - 1] = (rotated * new_key.unsqueeze(2)).sum(-1)
        judge(draw, plan, logits, window, count)
    amount = count.num_head_steps - before
    context = next(limit for limit in (256, 1024, 4096, 16_384) if draw.context <= limit)
    values = (
        f"{context:6,}",
        str(draw.dtype)[6:],
        str(draw.dim),
        str(draw.group),
        library.set_names[library.instruction_set],
    )
    for kind, value in zip(tally.kinds, values, strict=True):
        tally.kinds[kind][value] += amount


def written(draw: Draw) -> list[tuple[int, int]]:
    """The slots of the tokens before the new one."""
    runs = []
    for pages in draw.pages.tolist():
        for index, page in enumerate(pages):
            num_tokens = min(draw.context - 1 - index * draw.page, draw.page)
            if num_tokens > 0:
                runs.append((page * draw.page, page * draw.page + num_tokens))
    return runs


def decode(
    library: cpu_library.Library, draw: Draw, store: torch.Tensor, summaries: kernel.Summaries, window: int | None
) -> tuple[kernel.SparsePlan, torch.Tensor]:
    """One step of all requests; its queries, rotated and scaled: [requests, KV heads, group, dim], float64."""
    shape = kernel.SparseShape(
        NUM_KV_HEADS * draw.group, NUM_KV_HEADS, draw.dim, draw.page, draw.dim**-0.5, draw.dtype, summaries.rule,
        num_sinks=draw.num_sinks, num_recent=draw.num_recent,
    )  # fmt: skip
    budgets = torch.randint(
        1, draw.most_kept, (1, draw.num_requests, NUM_KV_HEADS), dtype=torch.int32, generator=draw.dice
    )  # fmt: skip
    requests = [(row, draw.context, pages) for row, pages in enumerate(draw.pages.tolist())]
    cos, sin = draw.angles.cos(), draw.angles.sin()
    plan = kernel.plan(shape, requests, budgets, cos, sin)
    qkv = torch.cat((draw.queries, draw.new_keys, torch.zeros_like(draw.new_keys)), 1).to(draw.dtype)
    kernel.decode(library, plan, 0, qkv, store, summaries, torch.empty_like(qkv[:, : shape.num_heads]), window=window)
    first, second = qkv[:, : shape.num_heads].double().chunk(2, -1)
    cos, sin = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1) * shape.scale
    return plan, rotated.view(draw.num_requests, NUM_KV_HEADS, draw.group, draw.dim)


def judge(draw: Draw, plan: kernel.SparsePlan, logits: torch.Tensor, window: int | None, count: Count) -> None:
    """Both statements against float64. logits: [requests, KV heads, group, whole units of tokens]; what is not visible
    is overwritten."""
    context, num_units = draw.context, logits.shape[-1] // UNIT
    oldest = max(0, context - (window or context))
    logits[..., :oldest] = -math.inf
    logits[..., context:] = -math.inf
    masses = logits.unflatten(-1, (num_units, UNIT)).logsumexp(-1)
    units = plan.kept.long().where(torch.arange(plan.kept.shape[2]) < plan.num_kept.unsqueeze(-1), num_units)
    is_kept = torch.zeros(draw.num_requests, NUM_KV_HEADS, num_units + 1, dtype=torch.bool).scatter_(2, units, True)
    is_kept = is_kept[..., :num_units]
    is_kept[..., : oldest // UNIT] = True  # not visible: neither kept nor dropped
    drops = ~is_kept.all(-1)
    kept = masses.masked_fill(~is_kept.unsqueeze(2), -math.inf).logsumexp(-1)[drops]
    dropped = masses.masked_fill(is_kept.unsqueeze(2), -math.inf).logsumexp(-1)[drops]
    found = plan.diagnostics[0].double().view(*drops.shape, draw.group, -1)[drops]
    log_kept, log_bound = found[..., 0], found[..., 4]
    count.add(log_bound - dropped, log_bound - log_kept - (dropped - kept))


def report(tally: Tally, conditions: str) -> None:
    """The tables, and their sum in a line."""
    rows = [
        {
            "family": name, "rule": rule.name.lower(), "head-steps": count.num_head_steps,
            "below mass": count.num_mass_violations, "least slack": f"{count.least_mass_slack:.2e}",
            "below share": count.num_share_violations, "least slack ": f"{count.least_share_slack:.2e}",
        }
        for (name, rule), count in tally.counts.items()
    ]  # fmt: skip
    print(tabulate(rows, headers="keys", disable_numparse=True, colalign=("left", "left", *["right"] * 5)))
    total = tally.num_head_steps
    print()
    for kind, counter in tally.kinds.items():
        print(f"{kind}: " + ", ".join(f"{value} {100 * n / total:.2f} %" for value, n in sorted(counter.items())))
    num_mass, num_share = tally.num_violations
    num_query_heads = sum(count.num_query_heads for count in tally.counts.values())
    print(
        f"\n{total} head-steps with {num_query_heads} query heads, {num_mass} bounds below the mass, {num_share} below "
        f"the share ({conditions})"
    )


if __name__ == "__main__":
    sys.exit(main())
