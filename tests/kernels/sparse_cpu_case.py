"""Requests for the sparse CPU kernel on scattered pages, everything that is not theirs poisoned, and their truth."""

import math

import torch
from cpu_kernels import LIMITS

from vashista.kernels.cpu.library import Library
from vashista.kernels.cpu.sparse import (
    UNIT_TOKENS,
    Rule,
    SparsePlan,
    SparseShape,
    Summaries,
    decode,
    make_summaries,
    plan,
    summarize,
)

NAN_STEPS = -1
"""Codes of no unit: -1 everywhere, with steps of NaN."""


class SparseCase:
    """heads, KV heads, head size and rotated dimensions as `dims`; random keys, or what `spoil` makes of them."""

    def __init__(
        self,
        contexts: list[int],
        dims: tuple[int, int, int, int],
        dtype: torch.dtype = torch.float32,
        rule: Rule = Rule.MEAN_VARIANCE,
        page: int = 16,
        num_sinks: int = 16,
        num_recent: int = 64,
        key_scale: float = 1.0,
    ) -> None:
        torch.manual_seed(sum(contexts))
        self.heads, self.kv_heads, self.dim, self.rotary = dims
        self.group = self.heads // self.kv_heads
        self.scale = self.dim**-0.5
        self.contexts, self.page = contexts, page
        self.shape = SparseShape(
            self.heads, self.kv_heads, self.dim, page, self.scale, dtype, rule, num_sinks, num_recent
        )  # fmt: skip
        counts = [-(-context // page) for context in contexts]
        order = torch.randperm(sum(counts) + 3).tolist()
        self.pages = [[order.pop() for _ in range(count)] for count in counts]
        self.store = torch.full((2, self.kv_heads, (sum(counts) + 3) * page, self.dim), torch.nan, dtype=dtype)
        for context, slots in zip(contexts, self.slots(), strict=True):
            self.store[0][:, slots[:-1]] = (torch.randn(self.kv_heads, context - 1, self.dim) * key_scale).to(dtype)
            self.store[1][:, slots[:-1]] = torch.randn(self.kv_heads, context - 1, self.dim).to(dtype)
        self.qkv = torch.randn(len(contexts) + 2, self.heads + 2 * self.kv_heads, self.dim).to(dtype)
        angles = torch.randn(len(contexts) + 2, self.rotary // 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.rows = torch.randperm(len(contexts) + 2)[: len(contexts)].tolist()
        self.summaries = self.blank()

    def blank(self) -> Summaries:
        summaries = make_summaries(self.shape.rule, self.kv_heads, self.store.shape[2], self.dim)
        summaries.codes.fill_(NAN_STEPS)
        summaries.steps.fill_(math.nan)
        return summaries

    def slots(self) -> list[torch.Tensor]:
        """Of each request, its tokens' slots in order."""
        own = [torch.tensor(pages).unsqueeze(1) * self.page + torch.arange(self.page) for pages in self.pages]
        return [slots.flatten()[:context] for slots, context in zip(own, self.contexts, strict=True)]

    def written(self, which: list[int] | None = None) -> list[tuple[int, int]]:
        """The slot ranges of the tokens before the new one, page by page."""
        runs = []
        for i in range(len(self.rows)) if which is None else which:
            left = self.contexts[i] - 1
            for page in self.pages[i]:
                if left > 0:
                    runs.append((page * self.page, page * self.page + min(left, self.page)))
                left -= self.page
        return runs

    def run(
        self,
        library: Library,
        budget: int | torch.Tensor,
        window: int | None = None,
        which: list[int] | None = None,
    ) -> tuple[torch.Tensor, SparsePlan]:
        """Summarize what is there and decode. budget: for all, or [num_requests, kv_heads]."""
        summarize(library, self.store, self.summaries, self.written(which))
        return self.decode(library, budget, window, which)

    def decode(
        self,
        library: Library,
        budget: int | torch.Tensor,
        window: int | None = None,
        which: list[int] | None = None,
    ) -> tuple[torch.Tensor, SparsePlan]:
        chosen = list(range(len(self.rows))) if which is None else which
        requests = [(self.rows[i], self.contexts[i], self.pages[i]) for i in chosen]
        if isinstance(budget, int):
            budget = torch.full((len(self.rows), self.kv_heads), budget)
        made = plan(self.shape, requests, budget[chosen].int().unsqueeze(0), self.cos, self.sin)
        for tensor in (made.diagnostics, made.scratch):
            tensor.fill_(torch.nan)
        out = torch.full((len(self.qkv), self.heads, self.dim), torch.nan, dtype=self.store.dtype)
        decode(library, made, 0, self.qkv, self.store, self.summaries, out, window=window)
        return out, made

    def queries(self, i: int) -> torch.Tensor:
        """[kv_heads, group, dim], float64, rotated and scaled."""
        row, half = self.rows[i], self.rotary // 2
        x = self.qkv[row, : self.heads].double()
        a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        cos, sin = self.cos[row].double(), self.sin[row].double()
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), 1)
        return rotated.view(self.kv_heads, self.group, self.dim) * self.scale

    def logits(self, i: int) -> torch.Tensor:
        """[kv_heads, group, context], float64, of the keys as they are in the store."""
        keys = self.store[0][:, self.slots()[i]].double()
        return self.queries(i) @ keys.transpose(1, 2)

    def kept_tokens(self, made: SparsePlan, i: int, window: int | None) -> torch.Tensor:
        """[kv_heads, context]: whether a token is visible and in a kept unit."""
        context = self.contexts[i]
        is_kept = torch.zeros(self.kv_heads, context, dtype=torch.bool)
        unit = torch.arange(context) // UNIT_TOKENS
        for head in range(self.kv_heads):
            units = made.kept[i, head, : made.num_kept[i, head]]
            assert torch.equal(units, units.unique()), "ascending, none twice"
            is_kept[head] = torch.isin(unit, units)
        is_kept[:, : max(0, context - (window or context))] = False
        return is_kept

    def scores(self, made: SparsePlan, i: int, window: int | None) -> torch.Tensor:
        """[kv_heads, group, units], of the visible units: what the kernel left in its scratch."""
        first = max(0, self.contexts[i] - (window or self.contexts[i])) // UNIT_TOKENS
        end = -(-self.contexts[i] // UNIT_TOKENS)
        width, full = (-(-count // UNIT_TOKENS) * UNIT_TOKENS for count in (end - first, end))
        start = int(made.offsets[i])
        floats = [made.scratch[start + h * (2 * self.group + 1) * full :] for h in range(self.kv_heads)]
        rows = [own[: self.group * width].view(self.group, width)[:, : end - first] for own in floats]
        return torch.stack(rows)

    def assert_true(self, out: torch.Tensor, made: SparsePlan, window: int | None = None) -> None:
        """Outputs and diagnostics of all requests against float64, for the units that the kernel kept."""
        untouched = [row for row in range(len(self.qkv)) if row not in self.rows]
        assert out[untouched].isnan().all()
        for i, row in enumerate(self.rows):
            kept = self.kept_tokens(made, i, window).unsqueeze(1)
            visible = torch.arange(self.contexts[i]) >= self.contexts[i] - (window or self.contexts[i])
            logits = self.logits(i)
            inside = logits.masked_fill(~kept, -math.inf)
            p = inside.softmax(-1)
            values = self.store[1][:, self.slots()[i]].double().masked_fill(~kept.transpose(1, 2), 0.0)
            expected = (p @ values).view(self.heads, self.dim).to(out.dtype).double()
            error = (out[row].double() - expected).norm() / expected.norm()
            size = logits[..., visible].abs().amax(-1) + 1
            limit = LIMITS[out.dtype] + size.max() * 2.0**-22  # float32 logits have no more digits
            assert error <= limit, (self.contexts[i], float(error))
            seen = made.diagnostics[0, i].double().view(self.kv_heads, self.group, 6)
            assert ((seen[..., 0] - inside.logsumexp(-1)).abs() <= 1e-5 * size).all()
            entropy = -(p * p.clamp_min(1e-300).log()).sum(-1)
            assert ((seen[..., 1] - entropy).abs() <= 2e-5 * size).all()
            assert (seen[..., 5] == kept.sum(-1)).all()
            dropped = logits.masked_fill(kept | ~visible, -math.inf).logsumexp(-1)
            assert (seen[..., 4] >= dropped).all(), "the bound is below the truth"
            true_odds = (dropped - inside.logsumexp(-1))[dropped > -math.inf]
            odds = (seen[..., 4] - seen[..., 0])[dropped > -math.inf]
            assert (odds >= true_odds).all(), "the dropped share that follows is below the truth"
            assert ((seen[..., 4] == -math.inf) == (kept | ~visible).all(-1)).all()
