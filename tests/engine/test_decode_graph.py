"""Decode steps over fixed tensors give what the layers give one by one: captured on a GPU, called again elsewhere."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from vashista.engine.attention import coarse, paged_gpu, sparse_triton
from vashista.engine.attention.plan_key import PlanKey, skips_dense
from vashista.engine.attention.sparse_triton import SparseTritonAttention
from vashista.engine.config import EngineConfig
from vashista.engine.model_config import load_model_config
from vashista.engine.models import decode_graph
from vashista.engine.models.capture_pause import FIRST_PAUSE_S, LONGEST_PAUSE_S
from vashista.engine.models.decode_graph import CudaCapture, DecodeGraphs, Replay, num_prompt_rows_of, num_rows_of
from vashista.engine.runner import Runner
from vashista.engine.step import EVERYTHING, Selection, Span, StepInput
from vashista.engine.support import SpanSupport
from vashista.kernels.cuda import cluster
from vashista.kernels.key_summary import Rule
from vashista.kernels.sparse_decode import SparsePlan
from vashista.kernels.triton_guard import triton

pytestmark = pytest.mark.skipif(triton is None, reason="the triton package is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTEXTS = [112, 1, 97, 100]
PAGE = 16
PAGES = 8
TOLERANCE = 1e-4


class AgainCapture:
    """Where there are no graphs: the function itself."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def __call__(self, compute: Callable[[], None]) -> Replay:
        compute()
        return compute

    def bytes_taken(self) -> int:
        return self.num_bytes


class FailingCapture(AgainCapture):
    """Where the memory does not suffice."""

    def __init__(self, on_try: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._on_try = on_try

    def __call__(self, compute: Callable[[], None]) -> Replay:
        self._on_try()
        raise torch.OutOfMemoryError("no memory")


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")  # type: ignore[assignment]


class Played:
    """A tiny model with the GPU's attention module, whose requests' tokens but the last are in the store."""

    def __init__(self, folder: Path, rule: Rule | None = Rule.MEAN_VARIANCE) -> None:
        config = EngineConfig(model_dir=str(folder), page_size=PAGE, kv_cache_bytes=8 << 20, attention="dense",
                              dtype="float32", device=DEVICE.type)  # fmt: skip
        self.runner = Runner(config, load_model_config(folder))
        self.attention = SparseTritonAttention("vashista", rule, self.runner.attention_shape)
        self.attention.allocate(PAGES * len(CONTEXTS))
        self.model = self.runner.model
        self.model._program = self.model._graphs = None
        for index, context in enumerate(CONTEXTS):
            if context > 1:
                self.eager([Span(0, context - 1, context - 1, self.pages(index))], seed=index)
        self.forget()

    def forget(self) -> None:
        """All graphs."""
        self.now_s = 0.0
        capture = CudaCapture(DEVICE) if DEVICE.type == "cuda" else AgainCapture()
        self.graphs = DecodeGraphs(self.model, self.attention, capture, lambda: 1 << 30, clock=lambda: self.now_s)

    @staticmethod
    def pages(index: int) -> list[int]:
        return list(range(PAGES * index, PAGES * (index + 1)))

    def spans(self, which: list[int], budgets: dict[int, int], audits: list[tuple[int, int]]) -> list[Span]:
        shape = self.runner.attention_shape
        spans = []
        for row, index in enumerate(which):
            selection = None
            if index in budgets:
                size = (shape.num_layers, shape.num_kv_heads)
                selection = Selection(torch.full(size, budgets[index], dtype=torch.int32), audits)
            spans.append(Span(row, 1, CONTEXTS[index], self.pages(index), selection))
        return spans

    def step(self, spans: list[Span], seed: int) -> StepInput:
        num_tokens = sum(span.num_queries for span in spans)
        generator = torch.Generator().manual_seed(seed)
        token_ids = torch.randint(1, tiny_models.VOCAB_SIZE, (num_tokens,), generator=generator)
        positions = torch.cat([torch.arange(span.start, span.context_len) for span in spans])
        return StepInput(token_ids.to(DEVICE), positions.to(DEVICE), spans, torch.arange(num_tokens, device=DEVICE))

    def eager(self, spans: list[Span], seed: int) -> tuple[torch.Tensor, list[SpanSupport]]:
        hidden = self.model.forward(self.step(spans, seed), self.attention)
        return hidden, self.attention.take_support()

    def graphed(self, spans: list[Span], seed: int) -> tuple[torch.Tensor, list[SpanSupport]] | None:
        with torch.inference_mode():
            hidden = self.graphs.run(self.step(spans, seed), self.attention)
        return None if hidden is None else (hidden, self.attention.take_support())


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Played:
    # one layer that sees everything, one with a window of 40
    return Played(tiny_models.build("qwen2-window", tmp_path_factory.mktemp("model"), head_dim=64))


@pytest.fixture
def played(filled: Played) -> Played:
    filled.forget()
    return filled


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "SEEN", 1)


def compare(played: Played, spans: list[Span], seed: int) -> None:
    """Graph after eager: both write the same token's keys."""
    hidden, support = played.eager(spans, seed)
    found = played.graphed(spans, seed)
    assert found is not None
    assert found[0].shape == hidden.shape
    assert (found[0] - hidden).norm() <= TOLERANCE * hidden.norm()
    assert len(found[1]) == len(support)
    for ours, theirs in zip(found[1], support, strict=True):
        assert (ours.num_dense, ours.tokens_attended) == (theirs.num_dense, theirs.tokens_attended)
        assert ours.dropped_mass_bound == pytest.approx(theirs.dropped_mass_bound, abs=1e-3)
        assert ours.dropped_mass_estimate == pytest.approx(theirs.dropped_mass_estimate, abs=1e-3, nan_ok=True)
        assert ours.estimates == pytest.approx(theirs.estimates, abs=1e-3, nan_ok=True)
        assert [(a.layer, a.kv_head) for a in ours.audits] == [(a.layer, a.kv_head) for a in theirs.audits]
        for one, other in zip(ours.audits, theirs.audits, strict=True):
            assert one.dropped_mass == pytest.approx(other.dropped_mass, abs=1e-4)


@pytest.mark.usefixtures("at_once")
def test_dense_steps_of_any_company_share_a_graph(played: Played) -> None:
    for seed, which in enumerate([[0, 1, 2, 3], [3, 2, 0]]):
        compare(played, played.spans(which, {}, []), seed)
    assert len(played.graphs._graphs) == 1


@pytest.mark.usefixtures("at_once")
def test_sparse_and_dense_requests_share_a_step_and_are_audited(played: Played) -> None:
    compare(played, played.spans([0, 1, 2, 3], {0: 96, 3: 80}, [(0, 1), (1, 0)]), 1)
    compare(played, played.spans([3, 0, 2], {3: 96}, [(0, 0)]), 2)
    assert len(played.graphs._graphs) == 1


@pytest.mark.usefixtures("at_once")
def test_a_graph_follows_requests_that_grow_leave_and_change_places(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page numbers and budgets are sent where they change, of one request and of several: the same selections over
    steps, and others."""
    monkeypatch.setattr(paged_gpu, "FEW_ROWS", 1)
    one, two = (span.selection for span in played.spans([0, 3], {0: 96, 3: 80}, [(0, 1)]))

    def span(index: int, context_len: int, selection: Selection | None) -> Span:
        return Span(0, 1, context_len, played.pages(index), selection)

    steps = [
        [span(0, 111, one), span(3, 96, two), span(2, 65, None)],
        [span(0, 112, one), span(3, 97, two), span(2, 66, None)],  # within a page, and past the end of one
        [span(3, 97, two), span(0, 112, one), span(1, 1, None)],
        [span(2, 97, None), span(3, 65, one), span(0, 112, two)],
    ]
    for seed, spans in enumerate(steps):
        for row, own in enumerate(spans):
            own.query_start = row
        compare(played, spans, seed)
    assert len(played.graphs._graphs) == 1


@pytest.mark.usefixtures("at_once")
def test_the_estimates_of_heads_belong_to_their_requests_layers_and_heads(played: Played) -> None:
    """As one request alone has them; a dense one stands before."""
    budgets = torch.tensor([[96, 32], [EVERYTHING, 32]], dtype=torch.int32)
    rows = [Span(0, 1, CONTEXTS[2], played.pages(2)), Span(1, 1, CONTEXTS[0], played.pages(0), Selection(budgets, []))]
    rows.append(Span(2, 1, CONTEXTS[3], played.pages(3), Selection(budgets.flip(0), [])))
    step = played.step(rows, 3)
    found = played.graphed(rows, 3)
    assert found is not None
    assert len(found[1]) == 2
    for support, row in zip(found[1], rows[1:], strict=True):
        own = StepInput(step.token_ids[row.query_start :][:1], step.positions[row.query_start :][:1],
                        [replace(row, query_start=0)], step.logit_rows[:1])  # fmt: skip
        played.model.forward(own, played.attention)
        (alone,) = played.attention.take_support()
        assert support.estimates == pytest.approx(alone.estimates, abs=1e-4)
        assert support.estimates is not None
        # of the layer without a window, which is all covered
        assert (support.estimates[0] == 0).tolist() == (row.selection.budgets[0] == EVERYTHING).tolist()


@pytest.mark.usefixtures("at_once")
def test_steps_that_rank_nothing_are_captured_too(tmp_path: Path) -> None:
    played = Played(tiny_models.build("qwen2-window", tmp_path, head_dim=64), rule=None)
    compare(played, played.spans([0, 1, 2, 3], {0: 96, 3: 80}, [(0, 1), (1, 0)]), 1)
    compare(played, played.spans([3, 0, 2], {3: 96}, [(0, 0)]), 2)
    assert len(played.graphs._graphs) == 1


def is_capturing() -> bool:
    """Whether what is launched is recorded for a graph, and not run."""
    return DEVICE.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Vouched:
    """In place of the kernels, slow in Triton's interpreter: what they are told must be true of their rows."""

    def __init__(self) -> None:
        self.told: list[bool] = []
        """By each call: whether a head may attend to everything."""
        self._captured: list[tuple[torch.Tensor, torch.Tensor, SparsePlan]] = []

    def __call__(
        self, q: torch.Tensor, caches: Any, levels: Any, table: Any, lengths: torch.Tensor, budgets: torch.Tensor,
        plan: SparsePlan, **rest: Any,
    ) -> torch.Tensor:  # fmt: skip
        """In place of `sparse_decode`. Within a capture nobody may look at values, and they are those of padding."""
        self.told.append(plan.has_dense)
        if is_capturing():
            self._captured.append((lengths, budgets, plan))
        else:
            self._look(lengths, budgets, plan)
        return torch.zeros_like(q)

    def look_at_replayed(self) -> None:
        """At the values that the captured calls have worked on last: a replay calls nothing here."""
        for lengths, budgets, plan in self._captured:
            self._look(lengths, budgets, plan)

    @staticmethod
    def _look(lengths: torch.Tensor, budgets: torch.Tensor, plan: SparsePlan) -> None:
        visible = lengths if plan.options.window is None else lengths.clamp(max=plan.options.window)
        is_whole = (budgets >= visible[:, None]) & (lengths[:, None] > 0)
        assert plan.has_dense or not is_whole.any()


@pytest.fixture
def vouched(monkeypatch: pytest.MonkeyPatch) -> Vouched:
    """As where clusters attend."""
    vouched = Vouched()
    monkeypatch.setattr(sparse_triton, "skips_dense", lambda num_pairs, device: True)
    monkeypatch.setattr(sparse_triton, "sparse_decode", vouched)
    return vouched


def heads(played: Played, index: int, budgets: list[int]) -> Span:
    """A request whose KV heads keep different numbers of tokens, the same in all layers."""
    shape = played.runner.attention_shape
    kept = torch.tensor(budgets, dtype=torch.int32).expand(shape.num_layers, -1).contiguous()
    return Span(0, 1, CONTEXTS[index], played.pages(index), Selection(kept, [(0, 0)]))


@pytest.mark.usefixtures("at_once")
def test_the_kernels_are_told_that_no_head_attends_to_everything_only_where_that_is_so(
    played: Played, vouched: Vouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests alone and in company, in steps that are captured, of padding and of the same graph, and in others."""
    monkeypatch.setattr(coarse, "MAX_CANDIDATES", 104)
    has_dense = {  # by what the heads of the requests keep; contexts are 112, 97 and 100
        "sparse": ([heads(played, 0, [96, 64]), heads(played, 2, [64, 64]), heads(played, 3, [80, 96])], False),
        "one head keeps all": ([heads(played, 0, [96, EVERYTHING]), heads(played, 2, [64, 64])], True),
        "one head is covered": ([heads(played, 0, [96, 64]), heads(played, 3, [80, 100])], True),
        "too much to be ranked": ([heads(played, 0, [96, 108])], True),
        "in dense company": ([heads(played, 2, [64, 64]), *played.spans([0], {}, [])], True),
        "sparse again": ([heads(played, 2, [64, 96]), heads(played, 0, [64, 64]), heads(played, 3, [48, 96])], False),
    }
    keys = {}
    for seed, (name, (spans, expected)) in enumerate(has_dense.items()):
        for row, span in enumerate(spans):
            span.query_start = row
        keys[name] = played.attention.graph_key(spans, num_rows_of(len(spans)))
        assert isinstance(keys[name], PlanKey)
        assert keys[name].has_dense == expected, name
        vouched.told.clear()
        step = played.step(spans, seed)
        with torch.inference_mode():
            played.model.forward(step, played.attention)
            assert len(vouched.told) == 2
            assert played.graphs.run(step, played.attention) is not None
            vouched.look_at_replayed()
        # eager and captured, and without a GPU played; the second layer has a window, which a budget below the context
        # may cover
        assert vouched.told == [expected, True] * (len(vouched.told) // 2), name
    assert keys["sparse"] == keys["sparse again"]
    assert keys["sparse"] in played.graphs._graphs
    alone = keys["one head keeps all"]._replace(has_dense=False)
    assert alone not in played.graphs._graphs, "two requests of whom one keeps all have a graph of their own"


@pytest.mark.usefixtures("vouched")
def test_steps_with_and_without_a_head_that_attends_to_everything_never_share_a_graph(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it makes no difference to the kernels: too many rows for clusters, or no device that has them."""
    sparse, whole = ([heads(played, 0, budgets)] for budgets in ([96, 64], [96, EVERYTHING]))
    first, second = (played.attention.graph_key(spans, 1) for spans in (sparse, whole))
    assert first == second._replace(has_dense=False)
    assert first != second
    monkeypatch.setattr(sparse_triton, "skips_dense", lambda num_pairs, device: False)
    assert played.attention.graph_key(sparse, 1) == played.attention.graph_key(whole, 1) == second


@pytest.mark.usefixtures("vouched")
def test_a_module_that_ranks_nothing_has_no_clusters(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(played.attention, "_rule", None)
    assert played.attention._plan_key([heads(played, 0, [96, 64])], 1, 16384).has_dense


def test_it_makes_a_difference_where_the_device_has_clusters_and_pairs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not skips_dense(1, torch.device("cpu"))
    monkeypatch.setattr(cluster.launcher, "has_clusters", lambda device: True)
    monkeypatch.setattr(cluster, "count_blocks", lambda num_pairs, device: 32 // num_pairs)
    assert [skips_dense(num_pairs, DEVICE) for num_pairs in (1, 4, 5)] == [True, True, False]
    monkeypatch.setattr(cluster, "USE_CLUSTERS", False)
    assert not skips_dense(1, DEVICE)


def test_a_shape_is_captured_when_it_has_come_often(played: Played) -> None:
    spans = played.spans([0, 2], {}, [])
    assert [played.graphed(spans, 0) is None for _ in range(4)] == [True, True, False, False]
    prompt = [Span(0, 3, CONTEXTS[0], played.pages(0))]
    assert [played.graphed(prompt, 0) is None for _ in range(4)] == [True, True, False, False]


@pytest.mark.usefixtures("at_once")
def test_chunks_of_a_prompt_are_padded_and_write_what_the_layers_would(played: Played) -> None:
    """A first chunk, a second one of the same graph, and a token after them that attends sparsely."""
    spare = played.pages(1)  # of a request of one token, which is not looked at again
    first, second = Span(0, 20, 20, spare), Span(0, 31, 51, spare)
    shape = played.runner.attention_shape
    budget = Selection(torch.full((shape.num_layers, shape.num_kv_heads), 32, dtype=torch.int32), [(0, 0)])
    token = Span(0, 1, 52, spare, budget)
    expected = [played.eager([span], seed)[0] for seed, span in enumerate((first, second, token))]
    for layer in range(shape.num_layers):
        played.attention._store.keys[layer][spare] = torch.nan
        for level in played.attention._levels[layer]:
            for plane in level.planes:
                plane[spare] = 0
    found = [played.graphed([span], seed) for seed, span in enumerate((first, second))]
    for hidden, reply in zip(expected, found, strict=False):
        assert reply is not None
        assert reply[1] == []
        assert reply[0].shape == hidden.shape
        assert (reply[0] - hidden).norm() <= TOLERANCE * hidden.norm()
    assert len(played.graphs._graphs) == 1
    hidden, _ = played.eager([token], 2)
    assert (hidden - expected[2]).norm() <= TOLERANCE * hidden.norm()


@pytest.mark.usefixtures("at_once")
def test_a_step_of_streams_and_prompts_is_two_graphs(played: Played) -> None:
    """Dense, sparse and audited streams, and a prompt that begins with pages which one of them reads."""
    shared = [*played.pages(0)[:3], *played.pages(1)[3:]]
    streams = played.spans([0, 2, 3], {0: 96, 3: 80}, [(0, 1), (1, 0)])
    compare(played, [*streams, Span(3, 20, 3 * PAGE + 20, shared)], 1)
    compare(played, [*played.spans([3, 0], {3: 96}, [(0, 0)]), Span(2, 31, 31, played.pages(1))], 2)
    assert len(played.graphs._graphs) == 3  # of 4 and 2 streams, and of prompts


@pytest.mark.usefixtures("at_once")
def test_a_stream_gets_the_same_numbers_with_and_without_a_prompt_beside_it(played: Played) -> None:
    streams = played.spans([0, 2, 3], {0: 96}, [])
    prompt = Span(3, 20, 20, played.pages(1))
    step = played.step([*streams, prompt], 7)
    own = Span(0, 20, 20, prompt.pages)
    steps = [step] + [
        StepInput(step.token_ids[part], step.positions[part], spans, step.logit_rows)
        for part, spans in ((slice(3), streams), (slice(3, None), [own]))
    ]
    with torch.inference_mode():
        found = [played.graphs.run(one, played.attention) for one in steps]
    both, *alone = [hidden for hidden in found if hidden is not None]
    assert torch.equal(both, torch.cat(alone))


@pytest.mark.usefixtures("at_once")
def test_prompts_of_one_step_share_a_graph(played: Played) -> None:
    """Two chunks, and a prompt's last token behind them; then one chunk alone, where three were."""
    prompts = [Span(0, 9, 9, played.pages(1)[:1]), Span(9, 22, 40, played.pages(1)[1:4]),
               Span(31, 1, 5, played.pages(1)[5:6])]  # fmt: skip
    played.eager([Span(0, 18, 18, played.pages(1)[1:4])], 5)
    played.eager([Span(0, 4, 4, played.pages(1)[5:6])], 6)
    compare(played, prompts, 1)
    compare(played, [Span(0, 30, 30, played.pages(1))], 2)
    assert len(played.graphs._graphs) == 1


def test_both_parts_of_a_step_are_counted(played: Played) -> None:
    spans = [*played.spans([0, 2], {}, []), Span(2, 3, 3, played.pages(1))]
    assert [played.graphed(spans, 0) is None for _ in range(4)] == [True, True, False, False]
    assert len(played.graphs._graphs) == 2


def test_what_no_graph_serves_is_not_captured(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts too long, alone or together, or too many; a sparse stream behind a prompt."""
    monkeypatch.setattr(decode_graph, "PROMPT_ROWS", (16,))
    monkeypatch.setattr(decode_graph, "MAX_PROMPTS", 2)
    sparse = played.spans([0], {0: 96}, [])[0]
    sparse.query_start = 3
    for spans in (
        [Span(0, 17, 17, played.pages(1))],
        [*played.spans([0], {}, []), Span(1, 17, 17, played.pages(1))],
        [Span(0, 9, 9, played.pages(1)), Span(9, 8, CONTEXTS[0], played.pages(0))],
        [Span(2 * row, 2, 2, played.pages(1)[row:]) for row in range(3)],
        [Span(0, 3, 3, played.pages(1)), sparse],
    ):
        assert [played.graphed(spans, 0) for _ in range(4)] == [None] * 4
    assert not played.graphs._graphs


@pytest.mark.usefixtures("at_once")
def test_the_graphs_used_least_recently_go(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "MAX_GRAPHS", 2)
    for which in ([1], [0, 1], [1], [0, 1, 2]):
        assert played.graphed(played.spans(which, {}, []), 0) is not None
    assert list(played.graphs._graphs) == [(1, 0, 0, False, True), (4, 0, 0, False, True)]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("max_bytes", "left"), [(499, [4]), (500, [1, 4]), (700, [2, 1, 4]), (99, [4])])
def test_graphs_whose_tensors_take_too_much_together_go_too(
    played: Played, monkeypatch: pytest.MonkeyPatch, max_bytes: int, left: list[int]
) -> None:
    """Of 100 bytes a row; one that takes more than all may is kept alone."""
    capture = AgainCapture()
    graphs = played.graphs = DecodeGraphs(played.model, played.attention, capture, lambda: max_bytes)
    fix = played.attention.fix

    def take(key: Hashable, num_rows: int) -> object:
        capture.num_bytes += 100 * num_rows
        return fix(key, num_rows)

    monkeypatch.setattr(played.attention, "fix", take)
    for which in ([1], [0, 1], [1], [0, 1, 2]):
        assert played.graphed(played.spans(which, {}, []), 0) is not None
    assert [graph.token_ids.shape[0] for graph in graphs._graphs.values()] == left


def test_a_gpus_graphs_may_take_half_of_what_the_pages_leave(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "free_bytes", lambda device: 3000)
    monkeypatch.setattr(decode_graph, "CudaCapture", lambda device: AgainCapture())
    monkeypatch.setattr(played.model, "embedding", torch.empty(1, 1, device="meta").as_subclass(OnCuda))
    graphs = DecodeGraphs.make(played.model, played.attention)
    assert graphs is not None
    assert graphs._max_bytes == 1500


@pytest.mark.usefixtures("at_once")
def test_what_failed_for_want_of_memory_is_gone_before_memory_is_given_back(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    is_gone: list[bool] = []
    fix = played.attention.fix

    def watch(key: Hashable, num_rows: int) -> object:
        fixed = fix(key, num_rows)
        made.append(weakref.ref(fixed.host_budgets))  # type: ignore[attr-defined]
        return fixed

    monkeypatch.setattr(played.attention, "fix", watch)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: is_gone.append(made[0]() is None))
    played.graphs._capture = FailingCapture()
    assert played.graphed(played.spans([1], {}, []), 0) is None
    assert is_gone == [True]


@pytest.mark.usefixtures("at_once")
def test_without_memory_for_a_graph_steps_run_layer_by_layer(
    played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (played.spans(which, {}, []) for which in ([1], [0, 1]))
    assert played.graphed(one, 0) is not None

    played.graphs._capture = FailingCapture()
    assert played.graphed(two, 0) is None
    assert "lower kv_memory_fraction" in capsys.readouterr().err
    assert played.graphed(one, 0) is None  # its memory was given back
    hidden, _ = played.eager(two, 0)
    assert torch.isfinite(hidden).all()


@pytest.mark.usefixtures("at_once")
def test_without_memory_for_a_prompt_decode_steps_keep_their_graphs(
    played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    one, prompt = played.spans([1], {}, []), [Span(0, 20, 20, played.pages(1))]
    assert played.graphed(one, 0) is not None

    capture, played.graphs._capture = played.graphs._capture, FailingCapture()
    assert played.graphed(prompt, 0) is None
    assert "prompts are launched layer by layer" in capsys.readouterr().err
    played.graphs._capture = capture
    assert played.graphed(prompt, 0) is None  # nor is it tried again at once
    assert played.graphed([*one, Span(1, 20, 20, played.pages(0))], 0) is None
    assert list(played.graphs._graphs) == [(1, 0, 0, False, True)]
    assert played.graphed(one, 0) is not None

    longer = [Span(0, 33, 33, played.pages(1))]
    played.now_s = FIRST_PAUSE_S
    assert played.graphed(longer, 0) is not None
    assert played.graphed(prompt, 0) is None  # it was this that failed
    played.now_s = LONGEST_PAUSE_S
    assert played.graphed(prompt, 0) is not None


@pytest.mark.usefixtures("at_once")
def test_decode_steps_are_captured_again_when_memory_is_back(played: Played) -> None:
    one, two = (played.spans(which, {}, []) for which in ([1], [0, 1]))
    assert played.graphed(two, 0) is not None

    good, played.graphs._capture = played.graphs._capture, FailingCapture()
    assert played.graphed(one, 0) is None
    played.graphs._capture = good
    played.now_s = FIRST_PAUSE_S - 1
    assert played.graphed(two, 0) is None
    assert not played.graphs._graphs
    played.now_s = FIRST_PAUSE_S
    compare(played, two, 0)
    assert played.graphed(one, 0) is None
    played.now_s = LONGEST_PAUSE_S
    compare(played, one, 0)
    assert played.graphed(two, 0) is not None  # which is still there


@pytest.mark.usefixtures("at_once")
def test_captures_that_fail_again_and_again_become_rare(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    tries: list[float] = []
    played.graphs._capture = FailingCapture(lambda: tries.append(played.now_s))
    steps = [played.spans([index % 4 for index in range(count)], {}, []) for count in (1, 2, 4)]
    for second in range(0, 20000, 10):
        played.now_s = float(second)
        for spans in steps:
            assert played.graphed(spans, 0) is None
    assert tries[:2] == [0, 30]
    assert "(time 2 for decode steps)" in capsys.readouterr().err
    assert len(tries) <= 12


@pytest.mark.usefixtures("at_once")
def test_what_is_captured_again_fits_into_what_is_free_then(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 bytes a row: first there was room for all, then for two rows."""
    capture, free = AgainCapture(), [1000]
    graphs = played.graphs = DecodeGraphs(
        played.model, played.attention, capture, lambda: free[0], clock=lambda: played.now_s
    )
    fix = played.attention.fix

    def take(key: Hashable, num_rows: int) -> object:
        capture.num_bytes += 100 * num_rows
        return fix(key, num_rows)

    monkeypatch.setattr(played.attention, "fix", take)
    one, two, four = (played.spans(which, {}, []) for which in ([1], [0, 1], [0, 1, 2]))
    for spans in (one, four):
        assert played.graphed(spans, 0) is not None
    graphs._capture = FailingCapture()
    assert played.graphed(two, 0) is None
    graphs._capture, free[0], played.now_s = capture, 200, FIRST_PAUSE_S
    assert played.graphed(one, 0) is not None
    assert played.graphed(four, 0) is None  # which alone is too large
    assert not graphs._graphs


def test_rows_are_padded_to_few_numbers() -> None:
    assert [num_prompt_rows_of(count) for count in (2, 32, 33, 1000, 1025)] == [32, 32, 64, 1024, None]
    assert [num_rows_of(count) for count in (1, 2, 3, 4, 5, 8, 9, 17, 64)] == [1, 2, 4, 4, 8, 8, 16, 24, 64]
