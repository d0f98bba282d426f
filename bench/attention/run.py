"""Times Vashista's sparse decode on a GPU, beside dense decode in the same run: `python bench/attention/run.py`.

Needs torch and triton and a checkout, nothing installed; FlashInfer 0.6.13's paged decode is timed too where it can be
imported, else `paged_decode` of this project is the dense column. Each case is judged first (`judge.py`); a wrong
result ends the run before a time of it is printed. Shape: 32 heads, 8 KV heads, head_dim 128, bfloat16, pages of 64
tokens in shuffled order, groups of 16, 2048 tokens kept of each KV head. A time is that of a CUDA graph over several
layers that share no page (so that the L2 cache is cold), divided by their number; median of 15. Sparse times hold
everything of the step: summaries of the new token on both levels, scores, selection, attention, merge, log-sum-exps and
masses. Options: --only BATCHxCONTEXT,...; --levels 1,2 (ranked without and with the coarse level, else as the product
does); --rules RULE,... or all (the peers' rules too; WINDOW: sinks and the newest tokens); --paper (its own shape);
--tune (other launch settings); --no-dense.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from pathlib import Path

import torch
from judge import WrongResultError, judge_layer, judge_summaries
from pool import Layer, Pool, Shape, make_package, time_us

CASES = [(1, 32768), (1, 131072), (1, 524288), (8, 32768), (8, 131072), (32, 32768), (32, 131072)]
WANTED = {
    (1, 32768): (2.5, 4),
    (1, 131072): (8, 12),
    (1, 524288): (20, 40),
    (8, 32768): (6, 9),
    (8, 131072): (18, 28),
    (32, 32768): (9, 11),
    (32, 131072): (24, 34),
}
"""How many times faster than dense: must, aim."""
RULES = ("MEAN_VARIANCE", "MEAN", "BOX", "WINDOW")
"""Vashista's own and those of its peers: the paper's mean key, Quest's box, sinks and a window."""
BUDGET, COARSE_UNIT, CANDIDATES = 2048, 64, 8192
POOL_TOKENS = 3 * 32 * 131072
READ_TBS = 3.08
"""Read bandwidth of the H100 80GB as measured there."""
PAPER = Shape(num_heads=32, num_kv_heads=32, head_dim=128, page_size=16)
PAPER_DENSE_MS = {8192: 0.80, 16384: 1.65, 32768: 3.36, 65536: 6.80, 131072: 13.67}
PAPER_WANTED = {16384: 1, 32768: 1, 65536: 1, 131072: 10}
"""Times faster than dense; 25 at 131072 is aimed for."""
PAPER_SPARSE_MS = {8192: 21.9, 16384: 22.1, 32768: 22.6, 65536: 23.4, 131072: 24.7}


class SparseCase:
    """One shape with or without the coarse level: the whole step and its stages, as functions of a layer."""

    def __init__(self, pool: Pool, batch: int, context: int, num_levels: int, budget: int = BUDGET) -> None:
        from vashista.kernels.selection import ScoreOptions
        from vashista.kernels.sparse_decode import make_plan

        self.pool, self.context, self.budget = pool, context, budget
        self.levels, self.written = pool.levels[:num_levels], pool.levels
        q = torch.empty(batch, pool.shape.num_heads, pool.shape.head_dim, device="cuda", dtype=torch.bfloat16)
        self.probe = q
        self.budgets = torch.full((batch, pool.shape.num_kv_heads), budget, dtype=torch.int32, device="cuda")
        self.plan = make_plan(
            q, pool.keys, self.levels, ScoreOptions(scale=pool.shape.head_dim**-0.5), max_context=context,
            max_budget=budget, max_candidate_tokens=CANDIDATES if num_levels == 2 else None,
            candidates_per_kept=CANDIDATES // BUDGET if num_levels == 2 else 0, has_dense=False,
        )  # fmt: skip

    def step(self, layer: Layer) -> None:
        """Everything of one layer's step: summaries of its tokens too."""
        from vashista.kernels.sparse_decode import sparse_decode

        sparse_decode(
            layer.q, (self.pool.keys, self.pool.values), self.written, layer.table, layer.lens, self.budgets, self.plan,
            out=layer.out, lse=layer.lse, slots=layer.slots if self.written else None,
        )  # fmt: skip

    def score(self, layer: Layer, *, is_coarse: bool) -> None:
        from vashista.kernels.unit_score import score_units

        inputs = (layer.table, layer.lens, self.budgets, self.plan.options)
        if is_coarse:
            score_units(layer.q, self.levels[1], *inputs, self.plan.coarse)
        else:
            plan = self.plan
            coarse = (self.levels[1], plan.coarse, plan.limits) if plan.coarse else None
            score_units(layer.q, self.levels[0], *inputs, self.plan.fine, coarse=coarse)

    def attend(self, layer: Layer) -> None:
        from vashista.kernels.sparse_decode import attend_kept, choose_clusters

        inputs = (layer.table, layer.lens, self.budgets, self.plan.options)
        caches = (self.pool.keys, self.pool.values)
        clusters = choose_clusters(layer.q, caches, self.written, self.plan)
        attend_kept(
            layer.q, caches, self.written, inputs, self.plan, clusters, layer.out, layer.lse,
            layer.slots if self.written else None,
        )  # fmt: skip

    def stages(self) -> dict[str, tuple[object, int]]:
        """Each stage's function and the bytes a layer must read."""
        from vashista.kernels.key_summary import unit_bytes
        from vashista.kernels.sparse_decode import choose_clusters

        pairs = self.budgets.numel()
        token = 4 * self.pool.shape.head_dim
        if not self.levels:
            return {"attend": (self.attend, pairs * self.budget * token)}
        record = unit_bytes(self.levels[0].rule, self.pool.shape.head_dim) + 16
        stages, scored = {}, {"fine": self.context // 16}
        if len(self.levels) == 2:
            scored = {"coarse": self.context // self.levels[1].unit_tokens, "fine": min(CANDIDATES, self.context) // 16}
        upkeep = sum(level.unit_tokens for level in self.written)
        attended = pairs * (self.budget * token + upkeep * token // 2)
        clusters = choose_clusters(self.probe, (self.pool.keys, self.pool.values), self.written, self.plan)
        name = "attend"
        if clusters is not None:  # they score too: all that is ranked, or what is ranked below a coarse level
            inside = list(scored) if clusters.is_scored else list(scored)[1:]
            attended += pairs * sum(scored.pop(level) for level in inside) * record
            name = name if scored else "all at once"
        for level, units in scored.items():
            stages[level] = (functools.partial(self.score, is_coarse=level == "coarse"), pairs * units * record)
        stages[name] = (self.attend, attended)
        return stages


def flashinfer_calls(pool: Pool, layers: list[Layer]) -> dict[int, object]:
    """A planned paged decode for each layer, by the layer's id."""
    import flashinfer

    shape, calls = pool.shape, {}
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for layer in layers:
        batch, pages = layer.table.shape
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        starts = torch.arange(0, (batch + 1) * pages, pages, dtype=torch.int32, device="cuda")
        last = torch.full((batch,), shape.page_size, dtype=torch.int32, device="cuda")
        wrapper.plan(
            starts, layer.table.flatten().contiguous(), last, shape.num_heads, shape.num_kv_heads, shape.head_dim,
            shape.page_size, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip
        calls[id(layer)] = functools.partial(
            wrapper.run, layer.q, (pool.keys, pool.values), out=torch.empty_like(layer.q)
        )
    return calls


def time_dense(pool: Pool, layers: list[Layer], has_flashinfer: bool) -> dict[str, float]:
    """Microseconds of dense decode: ours, and FlashInfer's where it is there, whose result must agree."""
    from vashista.kernels.paged_decode import paged_decode

    def ours(layer: Layer) -> torch.Tensor:
        return paged_decode(
            layer.q, pool.keys, pool.values, layer.table, layer.lens, scale=pool.shape.head_dim**-0.5, out=layer.out
        )

    times = {"paged_decode": time_us(ours, layers, 7)}
    if has_flashinfer:
        calls = flashinfer_calls(pool, layers)
        theirs, mine = calls[id(layers[0])](), ours(layers[0])
        if not (theirs.double() - mine.double()).norm() < 4e-3 * mine.double().norm():
            raise WrongResultError("FlashInfer and paged_decode disagree")
        times["flashinfer"] = time_us(lambda layer: calls[id(layer)](), layers, 7)
    return times


def count_layers(pool: Pool, batch: int, context: int) -> int:
    """Layers that fit into the pool: 2 to 16."""
    return max(2, min(16, pool.keys.shape[0] * pool.shape.page_size // (batch * context)))


def choose_levels(pool: Pool, context: int) -> int:
    """Levels that the product uses."""
    from vashista.engine.attention.coarse import candidate_tokens

    if not pool.levels:
        return 0
    return 2 if candidate_tokens(pool.shape.page_size, context, BUDGET) else 1


def run_case(
    pool: Pool, rule: str, batch: int, context: int, dense: dict[str, float], options: argparse.Namespace
) -> dict[str, object]:
    """Judge and time one case, dense decode too unless its times are given; prints its rows."""
    layers = pool.layers(batch, context, count_layers(pool, batch, context))
    row: dict[str, object] = {"rule": rule, "batch": batch, "context": context, "layers": len(layers)}
    if not (dense or options.no_dense):
        dense |= time_dense(pool, layers, options.has_flashinfer)
    row |= dense
    best_dense = min(dense.values(), default=float("nan"))
    row["dense"] = best_dense
    row["chosen"] = choose_levels(pool, context)
    for num_levels in (options.levels if pool.levels else []) or [row["chosen"]]:
        case = SparseCase(pool, batch, context, num_levels)
        layers[0].out.fill_(float("nan"))
        case.step(layers[0])
        error = judge_layer(pool, layers[0], case.plan, case.levels, case.budgets)
        us = time_us(case.step, layers)
        error = max(error, judge_layer(pool, layers[-1], case.plan, case.levels, case.budgets))
        stages = {name: (time_us(call, layers), size) for name, (call, size) in case.stages().items()}
        row[f"levels_{num_levels}"] = {"us": us, "stages": {name: time for name, (time, _) in stages.items()}}
        split = ", ".join(
            f"{name} {time:.1f} ({size / time / 1e6 / READ_TBS:.0%})" for name, (time, size) in stages.items()
        )
        print(
            f"{rule:13} {batch:3} x {context:6}  dense {best_dense:8.1f}  levels {num_levels}: {us:7.1f} us  "
            f"{best_dense / us:5.1f}x  error {error:.1e} | {split}", flush=True,
        )  # fmt: skip
    return row


def run_paper(options: argparse.Namespace) -> list[dict[str, object]]:
    """The paper's notebook: batch 16, 32 heads without grouping, pages of 16, 64 pages kept; mean keys."""
    rows = []
    pool = Pool(PAPER, 16 * 131072)
    pool.summarize("MEAN", None)
    for context, published_ms in PAPER_DENSE_MS.items():
        layers = pool.layers(16, context, count_layers(pool, 16, context) if context < 131072 else 1)
        dense = time_dense(pool, layers, options.has_flashinfer)
        case = SparseCase(pool, 16, context, 1, budget=1024)
        case.step(layers[0])
        judge_layer(pool, layers[0], case.plan, case.levels, case.budgets)
        us, best = time_us(case.step, layers), min(dense.values())
        rows.append({"context": context, "us": us} | dense)
        print(
            f"paper {context:6}: dense {best:8.1f} us, sparse {us:7.1f} us, {best / us:5.1f}x"
            f" (must {PAPER_WANTED.get(context, '-')}); published: dense {published_ms} ms, sparse"
            f" {PAPER_SPARSE_MS[context]} ms", flush=True,
        )  # fmt: skip
    return rows


def tune(pool: Pool) -> None:
    """Other launch settings; columns are the whole step of five cases, and their stages."""
    from vashista.kernels import pair_deal, selection, sparse_attend, unit_score

    shapes = [(1, 32768, 1), (1, 524288, 1), (8, 32768, 1), (8, 131072, 1), (32, 131072, 2)]
    cases = [(SparseCase(pool, b, c, n), pool.layers(b, c, count_layers(pool, b, c))) for b, c, n in shapes]

    def measure(label: str) -> None:
        row = []
        for (b, c, n), (_, layers) in zip(shapes, cases, strict=True):
            case = SparseCase(pool, b, c, n)  # anew: some settings shape the scratch
            try:
                parts = [case.step, *(call for call, _ in case.stages().values())]
                row.append("/".join(f"{time_us(part, layers, 7):.1f}" for part in parts))
            except Exception as error:
                row.append(type(error).__name__)
        print(f"tune {label:44} {'  '.join(row)}", flush=True)

    measure("as it is")
    settings = [
        (pair_deal, "USE_PDL", (False,)),
        (unit_score, "PROGRAMS_PER_MULTIPROCESSOR", (3, 5)),
        (unit_score, "WAVES", (2,)),
        (unit_score, "TILE", (64,)),
        (unit_score, "NUM_STAGES", (3,)),
        (unit_score, "NUM_WARPS", (8,)),
        (selection, "ONE_STEP_UNITS", (1024, 2048, 8192)),
        (sparse_attend, "LONG_SPARSE_KEYS", (512, 1024)),
        (sparse_attend, "SHORT_STAGES", (3, 4)),
        (sparse_attend, "SPARSE_RUN_TILES", (2,)),
        (sparse_attend, "MERGE_ELEMENTS", (8192,)),
    ]
    for module, name, values in settings:
        usual = getattr(module, name)
        for value in values:
            setattr(module, name, value)
            measure(f"{name} {value}")
        setattr(module, name, usual)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases, such as 1x32768,8x131072")
    parser.add_argument("--levels", default="", help="1: ranks groups alone, 2: a coarse level too; both: 1,2")
    parser.add_argument("--rules", default=RULES[0], help=f"of {','.join(RULES)}, or all")
    parser.add_argument("--paper", action="store_true", help="the paper's own shape")
    parser.add_argument("--tune", action="store_true", help="also time other launch settings")
    parser.add_argument("--no-dense", action="store_true", help="do not time dense decode")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    options.levels = [int(level) for level in options.levels.split(",") if level]
    options.rules = list(RULES) if options.rules == "all" else options.rules.split(",")
    if unknown := set(options.rules) - set(RULES):
        parser.error(f"--rules has {', '.join(sorted(unknown))}; possible are {', '.join(RULES)} and all")
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; on a CPU run the tests of tests/kernels")
    make_package()
    import triton

    options.has_flashinfer = importlib.util.find_spec("flashinfer") is not None
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    print(
        "dense column:", "the faster of FlashInfer and paged_decode" if options.has_flashinfer else "paged_decode alone"
    )
    cases = [tuple(map(int, case.split("x"))) for case in options.only.split(",")] if options.only else CASES
    rows: list[dict[str, object]] = []
    try:
        if cases != [(0, 0)]:
            need = max(max(2 * b * c, min(16 * b * c, POOL_TOKENS)) for b, c in cases)
            pool = Pool(Shape(), need)
            dense: dict[tuple[int, ...], dict[str, float]] = {case: {} for case in cases}
            for rule in options.rules:
                pool.summarize(rule, COARSE_UNIT)
                judge_summaries(pool)
                rows += [run_case(pool, rule, *case, dense[case], options) for case in cases]
                if options.tune and pool.levels:
                    tune(pool)
            del pool
            torch.cuda.empty_cache()
        if options.paper:
            rows += run_paper(options)
    except WrongResultError as wrong:
        sys.exit(f"WRONG: {wrong}; no times are printed for wrong results")
    report(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def report(rows: list[dict[str, object]]) -> None:
    """What is wanted and what is met, of the levels that the product would choose, and the paper's ratio."""
    steps = {}
    print("rule          batch x context   dense us  sparse us  levels  times faster    must     aim")
    for row in rows:
        chosen = row.get(f"levels_{row.get('chosen')}")
        if chosen is None:
            continue
        case = (row["batch"], row["context"])
        is_own = row["rule"] == RULES[0]
        if is_own:
            steps[case] = chosen["us"]
        faster = row["dense"] / chosen["us"]
        must, aim = WANTED.get(case, (0, 0)) if is_own else (0, 0)
        verdict = "aim met" if faster >= aim else "must met" if faster >= must else "MISSED"
        verdict = verdict if is_own else "a peer"
        print(
            f"{row['rule']:13} {case[0]:5} x {case[1]:7} {row['dense']:10.1f} {chosen['us']:10.1f} {row['chosen']:7}"
            f" {faster:13.1f} {must:7} {aim:7}  {verdict}"
        )
    if (1, 32768) in steps and (1, 524288) in steps:
        ratio = steps[1, 524288] / steps[1, 32768]
        verdict = "aim met" if ratio <= 1.3 else "must met" if ratio <= 2.5 else "MISSED"
        print(f"time at 512k over time at 32k, batch 1: {ratio:.2f} (must 2.5, aim 1.3)  {verdict}")


if __name__ == "__main__":
    main()
