"""The experiment with tails: where mean keys and values tell all, it gives full attention; and it checks itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "bench" / "quality"
MODEL = FOLDER.parents[1] / "deploy" / "models" / "reference-26m"
Scripts = Callable[[str], Any]
ARGUMENTS = ["--model", str(MODEL), "--device", "cpu", "--threads", "1", "--context", "768", "--budget", "192",
             "--counts", "single:2,loss:1", "--scored", "6", "--workers", "0", "--audited", "1"]  # fmt: skip


def even_store(scripts: Scripts, size: int) -> Any:
    """A store of 2 contexts, 2 KV heads, 512 tokens, in which `size` neighbours have the same key and value."""
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 2, 512 // size, 64).repeat_interleave(size, 2) for _ in range(2))
    return scripts("tail_store").LayerStore(keys.clone(), values.clone())


@pytest.mark.parametrize(("size", "unit"), [(16, 16), (64, 64)])
@pytest.mark.parametrize("mass", ["estimate", "exact"])
def test_a_tail_of_even_units_makes_up_for_all_that_was_dropped(
    scripts: Scripts, size: int, unit: int, mass: str
) -> None:
    rules, attention = scripts("tail_rules"), scripts("tail_attention")
    store = even_store(scripts, size)
    q, positions, both = torch.randn(2, 2, 4, 64) / 8, torch.tensor([511, 447]), slice(0, 2)
    kept = attention.keep(q, store, both, positions, [160, 96], True)
    tail = replace(rules.CUMULANT, mass=mass, value_unit=unit, mass_unit=unit if mass == "estimate" else 16)
    own, log_tail = rules.add_tail(tail, q, store, both, kept, torch.empty(0))
    true, log_all = attention.dense(q, store, both, positions)
    assert float((kept.result - true).norm() / true.norm()) > 0.3
    assert float((own - true).norm() / true.norm()) < 0.02  # codes of 8 bits
    torch.testing.assert_close(torch.logaddexp(log_tail, kept.log_mass.squeeze(3)), log_all, atol=0.02, rtol=0)


def test_means_alone_never_tell_more_mass_than_there_is(scripts: Scripts) -> None:
    rules, attention = scripts("tail_rules"), scripts("tail_attention")
    torch.manual_seed(1)
    store = scripts("tail_store").LayerStore(torch.randn(2, 2, 512, 64), torch.randn(2, 2, 512, 64))
    q, positions, both = torch.randn(2, 2, 4, 64) / 4, torch.tensor([511, 300]), slice(0, 2)
    exact = attention.exact_masses(q, store, both, positions)
    told = rules.log_masses(rules.JENSEN, q, store.planes[16], both)
    whole = torch.arange(512 // 16) * 16 + 15 <= positions[:, None, None, None]
    assert bool((told <= exact + 0.05)[whole.expand_as(exact)].all())  # codes of 8 bits


def test_a_budget_that_covers_the_context_is_full_attention(scripts: Scripts) -> None:
    attention, store = scripts("tail_attention"), even_store(scripts, 16)
    q, positions, both = torch.randn(2, 2, 4, 64), torch.tensor([500, 77]), slice(0, 2)
    kept = attention.keep(q, store, both, positions, [512, 512], False)
    torch.testing.assert_close(kept.result, attention.dense(q, store, both, positions)[0])


def test_a_token_written_changes_the_summaries_of_its_units_alone(scripts: Scripts) -> None:
    store = even_store(scripts, 16)
    before = {size: planes.mean.clone() for size, planes in store.planes.items()}
    store.write(torch.tensor([100, 511]), torch.full((2, 2, 64), 9.0), torch.zeros(2, 2, 64))
    for size, planes in store.planes.items():
        changed = (planes.mean != before[size]).any(3).any(1)
        assert changed.nonzero().tolist() == [[0, 100 // size], [1, 511 // size]]
    keys = store.keys[0, 0, 96:101]
    torch.testing.assert_close(store.planes[16].mean[0, 0, 6], keys.mean(0), atol=0.05, rtol=0)


def test_the_experiment_runs_on_the_bundled_model_and_agrees_with_the_product(
    scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tail.json"
    monkeypatch.setattr(sys, "argv", ["tail.py", *ARGUMENTS, "--only", "0,4,5,14,17,25,27", "--json", str(out)])
    scripts("tail").main()
    found = json.loads(out.read_text())
    single, loss = found["tasks"]["single"], found["tasks"]["loss"]
    assert single["dense (product)"]["values"] == [1.0, 1.0]
    assert single["vashista"]["values"] == single["vashista (product)"]["values"]
    assert loss["vashista"]["values"] == pytest.approx(loss["vashista (product)"]["values"], rel=1e-4)
    assert loss["tail"]["values"] != loss["vashista"]["values"]
    assert loss["dropped"][5][4:] == [0.0] * 4  # layer 5's second KV head retrieves
    assert loss["oracle: true masses"]["told"][0] == pytest.approx(loss["dropped"][0], rel=1e-3)
    assert str(tmp_path) not in out.read_text()
    assert "results differ by" in capsys.readouterr().out


def test_nothing_is_reported_where_the_product_does_something_else(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = scripts("tail_attention")
    monkeypatch.setattr(attention, "NUM_RECENT", 16)
    monkeypatch.setattr(sys, "argv", ["tail.py", *ARGUMENTS, "--only", "0"])
    with pytest.raises(SystemExit, match="on the same queries"):
        scripts("tail").main()
    assert "mean score" not in capsys.readouterr().out
