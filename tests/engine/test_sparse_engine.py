"""Sparse requests in the engine, on the bundled model: alone, in company, preempted, and audited."""

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from vashista.engine.attention.sparse_cpu import SparseCpuAttention
from vashista.engine.config import EngineConfig
from vashista.engine.engine import Engine
from vashista.engine.errors import AttentionModeError, SettingsError
from vashista.engine.messages import DENSE, AttentionMode, SamplingParams, Submit, SupportReport, TokenEvent

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the CPU's module")
MODEL = Path(__file__).parents[2] / "deploy/models/reference-26m"
BUDGET, MASS = AttentionMode(token_budget=128), AttentionMode(max_dropped_mass=0.2)


def make_engine(**values: Any) -> Engine:
    defaults = {
        "dtype": "float32", "num_threads": 1, "page_size": 16, "max_context": 2048, "kv_cache_bytes": 128 << 20,
        "attention": "vashista", "audit_rate": 1 / 4, "dense_below": 0, "max_batch_tokens": 256,
    }  # fmt: skip
    return Engine(EngineConfig(model_dir=str(MODEL), **defaults | values))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


def request(name: str, prompt: list[int], mode: AttentionMode, num_tokens: int = 12, arrival: float = 0.0) -> Submit:
    sampling = SamplingParams(seed=3, max_tokens=num_tokens, temperature=0.7, ignore_eos=True)
    return Submit(name, prompt, sampling, arrival_s=arrival, attention=mode)


def run(engine: Engine, submits: list[Submit]) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {submit.request_id: [] for submit in submits}
    for submit in submits:
        engine.submit(submit)
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
        engine.check()
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def support(events: list[TokenEvent]) -> SupportReport:
    report = events[-1].support
    assert report is not None
    return report


def assert_same(first: SupportReport | None, second: SupportReport | None) -> None:
    """Chunks of a prompt are cut elsewhere in company, which moves the last bits."""
    if first is None or second is None:
        assert first is second
        return
    builtins = [msgspec.to_builtins(report) for report in (first, second)]
    audits = [report.pop("audit") for report in builtins]
    assert builtins[0] == pytest.approx(builtins[1], rel=1e-4)
    assert audits[0] == pytest.approx(audits[1], rel=1e-3)


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1, 8192) for _ in range(length)]


def test_a_budget_that_covers_the_context_gives_dense_tokens_and_says_so(engine: Engine) -> None:
    prompt = prompt_of(random.Random(0), 400)
    dense = run(engine, [request("d", prompt, DENSE)])["d"]
    sparse = run(engine, [request("s", prompt, AttentionMode(token_budget=512))])["s"]
    assert tokens(sparse) == tokens(dense)
    assert dense[-1].support is None
    assert support(sparse).dense_share == 1.0
    assert (support(sparse).dropped_mass_bound, support(sparse).dropped_mass_estimate) == (0.0, 0.0)


def test_a_sparse_request_says_what_it_attended_to(engine: Engine) -> None:
    prompt = prompt_of(random.Random(1), 600)
    report = support(run(engine, [request("a", prompt, BUDGET, 9)])["a"])
    assert report.num_head_steps == 8 * 16
    assert report.dense_share == 1 / 16  # the retrieval head
    assert 15 * 112 <= 16 * report.tokens_attended - report.tokens_visible <= 15 * 128
    assert report.tokens_visible == pytest.approx(600 + 4.5)
    assert 0 < report.dropped_mass_estimate < report.dropped_mass_bound <= 1
    assert report.audit is not None
    assert report.audit.num_audits == 8 * 15 / 4
    assert 0 < report.audit.dropped_mass_low < report.audit.dropped_mass < report.audit.dropped_mass_high < 1
    assert 1 <= report.audit.effective_support <= 600
    assert report.audit.support_90 <= report.audit.support_99 <= 610


def test_a_target_mass_is_held_by_the_audits_and_needs_more_tokens_than_a_loose_one() -> None:
    engine = make_engine(audit_rate=1.0)
    prompt = prompt_of(random.Random(2), 1200)
    tight, loose = (
        support(run(engine, [request("a", prompt, AttentionMode(max_dropped_mass=mass), 64)])["a"])
        for mass in (0.03, 0.3)
    )
    assert tight.audit is not None
    assert loose.audit is not None
    assert tight.tokens_attended > 2 * loose.tokens_attended
    assert tight.audit.dropped_mass <= 0.045
    assert 0.15 <= loose.audit.dropped_mass <= 0.4


def test_the_seed_of_a_request_that_draws_nothing_changes_nothing() -> None:
    """Audits, which move budgets, begin with heads that follow from the seed where tokens are drawn."""
    prompt = prompt_of(random.Random(3), 1200)
    said = []
    for seed in (1, 2, 3):
        submit = request(str(seed), prompt, AttentionMode(max_dropped_mass=0.3), 40)
        sampling = msgspec.structs.replace(submit.sampling, seed=seed, temperature=0.0)
        events = run(make_engine(audit_rate=0.2), [msgspec.structs.replace(submit, sampling=sampling)])[str(seed)]
        said.append((tokens(events), support(events).tokens_attended))
    assert said[0] == said[1] == said[2]


def test_requests_of_all_modes_get_in_company_the_tokens_that_they_get_alone(engine: Engine) -> None:
    rng = random.Random(4)
    shared = prompt_of(rng, 320)
    modes = [DENSE, BUDGET, MASS, AttentionMode(token_budget=64), DENSE, MASS]
    submits = [
        request(str(index), shared + prompt_of(rng, 30 * index), mode, arrival=float(index))
        for index, mode in enumerate(modes)
    ]
    together = run(engine, submits)
    for submit in submits:
        alone = run(make_engine(), [submit])[submit.request_id]
        assert tokens(together[submit.request_id]) == tokens(alone)
        assert_same(together[submit.request_id][-1].support, alone[-1].support)


def test_a_preempted_sparse_request_goes_on_as_if_nothing_had_happened() -> None:
    rng = random.Random(5)
    submits = [request(str(i), prompt_of(rng, 200), (BUDGET, MASS, DENSE)[i % 3], 40, float(i)) for i in range(6)]
    pages = 40 * make_engine()._runner.attention.page_bytes()
    crowded = make_engine(kv_cache_bytes=pages)
    together = run(crowded, submits)
    assert crowded.stats.num_preemptions_total > 0
    roomy = make_engine()
    for submit in submits:
        alone = run(roomy, [submit])[submit.request_id]
        assert tokens(together[submit.request_id]) == tokens(alone)
        assert_same(together[submit.request_id][-1].support, alone[-1].support)


def test_what_a_sparse_request_generated_does_not_reach_a_dense_one_through_the_cache(engine: Engine) -> None:
    prompt = prompt_of(random.Random(6), 300)
    first = tokens(run(engine, [request("a", prompt, AttentionMode(token_budget=64), 40)])["a"])
    follower = request("b", prompt + first, DENSE)
    events = run(engine, [follower])["b"]
    assert events[0].num_cached_tokens == 300 // 16 * 16
    assert tokens(events) == tokens(run(make_engine(), [follower])["b"])


def test_a_dense_engine_refuses_sparse_requests() -> None:
    engine = make_engine(attention="dense")
    with pytest.raises(AttentionModeError, match="dense"):
        engine.submit(request("a", [1, 2, 3], BUDGET))
    assert not engine.has_work


@pytest.mark.parametrize("name", ["mean_key", "quest", "sinks_recent"])
def test_the_rules_of_others_run_as_modules_too(name: str) -> None:
    engine = make_engine(attention=name)
    report = support(run(engine, [request("a", prompt_of(random.Random(7), 500), BUDGET)])["a"])
    assert report.audit is not None
    assert report.audit.dropped_mass > 0
    assert engine.ready.attention == name
    if name == "sinks_recent":
        assert report.dropped_mass_estimate is None
        assert report.dropped_mass_bound == 1.0


@ON_CPU
def test_auto_takes_dense_where_the_sparse_kernels_do_not_serve_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: SparseCpuAttention, *args: object) -> None:
        raise SettingsError("not here")

    monkeypatch.setattr(SparseCpuAttention, "__init__", refuse)
    assert make_engine(attention="auto").ready.attention == "dense"
    with pytest.raises(SettingsError, match="not here"):
        make_engine(attention="vashista")


@ON_CPU
def test_audits_equal_a_float64_oracle(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    audit = SparseCpuAttention._audit

    def check(self: SparseCpuAttention, layer: int, index: int, qkv: torch.Tensor) -> list[Any]:
        audits = audit(self, layer, index, qkv)
        span = self._decoding[index]
        assert self._plan is not None
        keys, _ = self.read_cache(layer, span.pages, span.context_len)
        half = self.shape.head_dim // 2
        q = qkv[span.query_start, : self.shape.num_heads].double()
        cos, sin = self._cos[span.query_start].double(), self._sin[span.query_start].double()
        q = torch.cat((q[:, :half] * cos - q[:, half:] * sin, q[:, half:] * cos + q[:, :half] * sin), -1)
        for one in audits:
            group = q.view(self.shape.num_kv_heads, -1, self.shape.head_dim)[one.kv_head]
            p = (group @ keys[one.kv_head].double().T * self.shape.scale).softmax(-1)
            units = self._plan.kept[index, one.kv_head, : int(self._plan.num_kept[index, one.kv_head])].tolist()
            kept = [t for unit in units for t in range(16 * unit, min(16 * unit + 16, span.context_len))]
            found.append((one.dropped_mass, float((1 - p[:, kept].sum(-1)).max())))
            assert one.effective_support == pytest.approx(float(torch.special.entr(p).sum(-1).exp().mean()), rel=1e-3)
            ordered = p.sort(descending=True).values.cumsum(-1)
            assert one.support_90 == pytest.approx(float(((ordered < 0.9).sum(-1) + 1).double().mean()), abs=1)
        return audits

    monkeypatch.setattr(SparseCpuAttention, "_audit", check)
    run(engine, [request("a", prompt_of(random.Random(8), 700), BUDGET, 20)])
    assert len(found) > 50
    assert max(abs(mass - oracle) for mass, oracle in found) < 1e-3
