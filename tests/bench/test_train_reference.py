"""The training of the reference model, in small: tokenizer, lessons, batches, steps, checkpoint, exported folder."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from vashista.engine.chat_template import ChatTemplate, require_chat_template
from vashista.engine.config import EngineConfig
from vashista.engine.engine import Engine
from vashista.engine.errors import ChatTemplateError
from vashista.engine.messages import SamplingParams, Submit

FOLDER = Path(__file__).parents[2] / "bench" / "train_reference"
Scripts = Callable[[str], Any]
BEGIN, END, USER = 0, 1, 4


@pytest.fixture(scope="module")
def data(scripts: Scripts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared and unpacked corpus of two books, with a tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("data")
    scripts("suite_path")  # lets the suite's modules be found
    haystack = scripts("haystack")
    texts = haystack.read_books()[:2]
    tokenizer = scripts("tokenizer").train_tokenizer(iter(texts), 1024)
    tokenizer.save(str(folder / "tokenizer.json"))
    entries = [
        {"title": f"Book {index}", "author": f"Author {index}", "year": 1900 + index, "text": text}
        for index, text in enumerate(texts)
    ]
    scripts("corpus").prepare(iter(entries), folder / "tokenizer.json", folder / "prepared", 10**9)
    scripts("corpus").unpack(folder / "prepared", folder / "unpacked", 1)
    return folder


@pytest.fixture(scope="module")
def maker(scripts: Scripts, data: Path) -> Any:
    return scripts("batches").BatchMaker(data / "unpacked", data / "tokenizer.json", 1)


def test_the_scripts_need_nothing_of_the_product() -> None:
    """A machine that trains has torch, numpy, tokenizers and safetensors, as the README says."""
    scripts = "tokenizer, corpus, train, export, evaluate, card"
    code = f"import sys; sys.modules['vashista'] = None; sys.path.insert(0, {str(FOLDER)!r}); import {scripts}"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_digits_are_single_tokens_and_a_text_comes_back_as_it_was(data: Path) -> None:
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    text = 'The code is 48213.\n\n"Well--ünïcode 🙂," he said.'
    encoding = tokenizer.encode(text)
    assert encoding.ids[0] == BEGIN
    assert tokenizer.decode(encoding.ids) == text
    assert [token for token in encoding.tokens if any(sign.isdigit() for sign in token)] == list("48213")
    assert "ĊĊ" in encoding.tokens


def test_the_same_texts_give_the_same_tokenizer(scripts: Scripts) -> None:
    texts = ["the cat sat on the mat and the dog sat on the log"] * 3
    first, second = (scripts("tokenizer").train_tokenizer(iter(texts), 270).to_str() for _ in range(2))
    assert first == second
    with pytest.raises(ValueError, match="were asked for"):
        scripts("tokenizer").train_tokenizer(iter(texts), 5000)


def test_an_unpacked_corpus_holds_the_books_tokens(scripts: Scripts, data: Path) -> None:
    corpus = scripts("corpus").Corpus(data / "unpacked")
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    haystack = scripts("haystack")
    for book, text in zip(corpus.books, haystack.read_books()[:2], strict=True):
        assert tokenizer.decode(corpus.of(book).tolist()) == text


@pytest.mark.parametrize("kind", ["recall", "plain", "repeat", "common_words", "frequent_words", "chat"])
def test_a_lesson_fills_its_length_with_weighted_tokens(maker: Any, kind: str) -> None:
    for seed in range(20):
        lesson = maker.lesson(kind, 513, random.Random(seed))
        assert len(lesson.ids) == len(lesson.weights) >= 513
        assert max(lesson.ids) < 1024
        assert sum(lesson.weights[:513]) > 10


def test_what_a_lesson_asks_was_said_before(maker: Any, data: Path) -> None:
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    num_answers = 0
    for seed in range(40):
        lesson = maker.lesson("recall", 513, random.Random(seed))
        text, answer, before = "", "", ""
        for token, weight in zip([*lesson.ids, END], [*lesson.weights, 0.0], strict=True):
            piece = tokenizer.decode([token], skip_special_tokens=False)
            if weight == 5.0:
                before, answer = before or text, answer + piece
            elif answer:
                assert f" is{answer}." in before, f"{answer} was never said in {before}"
                before, answer, num_answers = "", "", num_answers + 1
            text += piece
    assert num_answers > 150


def test_what_a_lesson_repeats_stands_in_it_before(scripts: Scripts, maker: Any, data: Path) -> None:
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    num_passages = 0
    for seed in range(20):
        lesson = maker.lesson("repeat", 513, random.Random(seed))
        text, passage, before = "", "", ""
        for token, weight in zip([*lesson.ids, END], [*lesson.weights, 0.0], strict=True):
            if weight == scripts("stages").PASSAGE:
                before, passage = before or text, passage + tokenizer.decode([token], skip_special_tokens=False)
            elif passage:
                assert passage.strip() in before, f"{passage!r} was never said in {before}"
                before, passage, num_passages = "", "", num_passages + 1
            text += tokenizer.decode([token], skip_special_tokens=False)
    assert num_passages > 40


def test_words_asked_of_a_list_are_its_commonest_by_the_alphabet_or_by_number(maker: Any, data: Path) -> None:
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    for task, number in (("common_words", 5), ("frequent_words", 3)):
        num_lists = 0
        for seed in range(8):
            lesson = maker.lesson(task, 2049, random.Random(seed))
            text = tokenizer.decode(lesson.ids, skip_special_tokens=False)
            for words, answer in re.findall(r"Words: ([^.]*)\..*? most \w+ words are ([^.<]*)\.", text, re.DOTALL):
                counts = Counter(words.split())
                commonest = [word for word, _ in counts.most_common(number)]
                expected = sorted(commonest) if task == "common_words" else commonest
                assert re.split(", | and ", answer) == expected
                num_lists += 1
        assert num_lists > 10


def test_names_are_words_of_the_list_or_of_the_books_and_never_held_out(maker: Any, scripts: Scripts) -> None:
    words = scripts("words")
    drawn = [maker._teacher.names.draw(300, random.Random(seed)) for seed in range(20)]
    assert all(len(set(names)) == 300 for names in drawn)
    listed = [set(names) <= set(words.TRAINING_WORDS) for names in drawn]
    assert 0 < sum(listed) < len(listed)
    assert not set(words.HELD_OUT_WORDS) & {word for names in drawn for word in names}


def test_a_batch_depends_on_its_seed_alone(scripts: Scripts, maker: Any, data: Path) -> None:
    stage = replace(scripts("stages").PRESETS["tiny"].stages[0], batch_size=8)
    again = scripts("batches").BatchMaker(data / "unpacked", data / "tokenizer.json", 1)
    for batch in (0, 5):
        for mine, other in zip(maker.make(0, stage, batch), again.make(0, stage, batch), strict=True):
            assert (mine == other).all()
    assert (maker.make(0, stage, 0)[0] != maker.make(0, stage, 1)[0]).any()
    assert (maker.make(0, stage, 0)[0] != maker.make(1, stage, 0)[0]).any()


def test_the_update_of_muon_is_nearly_orthogonal(scripts: Scripts) -> None:
    stack = torch.randn(3, 24, 48, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(scripts("optimizer").orthogonal(stack).float())
    assert values.min() > 0.4
    assert values.max() < 1.4


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_few_steps_on_one_batch_lower_its_loss(scripts: Scripts, maker: Any, name: str) -> None:
    torch.manual_seed(0)
    shape = replace(scripts("stages").PRESETS["tiny"].shape, vocab_size=1024)
    model = scripts("model").Model(shape, torch.float32)
    optimizer = scripts("optimizer").Optimizer(model, name, 0.1)
    stage = replace(scripts("stages").PRESETS["tiny"].stages[0], batch_size=2)
    ids, weights = (torch.from_numpy(part.astype("int64")) for part in maker.make(0, stage, 0))
    losses = []
    for _ in range(8):
        loss, _ = model.loss(ids, weights.float() * scripts("batches").WEIGHT_UNIT, scripts("model").Attention())
        loss.backward()
        optimizer.step(3e-3)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_the_rate_falls_by_steps_or_by_the_clock(scripts: Scripts) -> None:
    stage = replace(
        scripts("stages").PRESETS["tiny"].stages[0],
        num_steps=100,
        seconds=50.0,
        warmup_steps=10,
        first_rate=1.0,
        last_rate=0.2,
    )
    rate = scripts("train").learning_rate
    assert rate(stage, 0, 0.0) == pytest.approx(0.1)
    assert rate(stage, 50, 0.0) == pytest.approx(0.6)
    assert rate(stage, 50, 40.0) == pytest.approx(0.36)
    assert rate(stage, 99, 90.0) == pytest.approx(0.2)


def run_training(scripts: Scripts, data: Path, output: Path, num_steps: int) -> Any:
    """A tiny run of so many steps a stage, from the output's checkpoint on."""
    preset = scripts("stages").PRESETS["tiny"]
    stages = tuple(replace(stage, num_tokens=128, batch_size=2, num_steps=num_steps) for stage in preset.stages)
    preset = replace(preset, shape=replace(preset.shape, vocab_size=1024), stages=stages)
    output.mkdir(exist_ok=True)
    place = scripts("train").resume_place(output, "tiny")
    batches = data / "batches"
    workers = scripts("batches").Workers(
        data / "unpacked", data / "tokenizer.json", batches, stages, preset.seed, 1, place
    )
    try:
        trainer = scripts("train").Trainer(preset, output, torch.device("cpu"), "math", False)
        trainer.load()
        trainer.run(workers)
    finally:
        workers.close()
    return trainer


@pytest.fixture(scope="module")
def model_folder(scripts: Scripts, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, trained for four steps and exported; its weights drawn wide, so that its outputs differ."""
    folder = tmp_path_factory.mktemp("run")
    trainer = run_training(scripts, data, folder, 2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15)
    scripts("export").export_model(
        trainer.model.state_dict(), trainer.preset.shape, data / "tokenizer.json", folder / "model"
    )
    return folder / "model"


def test_a_finished_run_is_found_finished(scripts: Scripts, data: Path, tmp_path: Path) -> None:
    first = run_training(scripts, data, tmp_path / "run", 2)
    assert scripts("train").resume_place(tmp_path / "run", "tiny") == (2, 0)
    again = run_training(scripts, data, tmp_path / "run", 2)
    assert again.num_tokens == first.num_tokens == 2 * 2 * 2 * 128
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="is of the preset tiny, not long: give each leg an --output of its own"):
        scripts("train").resume_place(tmp_path / "run", "long")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == [0, 1]


def test_an_exported_model_says_the_same_in_transformers_in_the_engine_and_in_the_training(
    scripts: Scripts, model_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompt = "It was a dark night, and the code of river is 48213."
    ids = tokenizer(prompt).input_ids
    reference: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.inference_mode():
        output = reference.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=24, do_sample=False
        )
    expected = output[0, len(ids) :].tolist()
    expected = expected[: expected.index(END)] if END in expected else expected
    assert len(set(expected)) > 3, "a flat model would hide errors"
    mine = scripts("export").load_model(model_folder, torch.float32, torch.device("cpu"))
    assert scripts("evaluate").generate(mine, [ids, ids[:-3]], 24)[0] == expected
    config = EngineConfig(model_dir=str(model_folder), page_size=16, num_threads=1, kv_cache_bytes=8 << 20)
    engine = Engine(config)
    engine.submit(Submit("a", ids, SamplingParams(seed=0, temperature=0.0, max_tokens=24), 0.0))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for event in engine.step() for token in event.token_ids]
    assert [token for token in tokens if token != END] == expected


def test_the_chat_template_writes_turns_as_the_training_does(scripts: Scripts, model_folder: Path, maker: Any) -> None:
    template = require_chat_template(ChatTemplate.load(model_folder))
    messages = [{"role": "user", "content": "Hello."}]
    text = "<|begin|><|user|>Hello.<|end|><|assistant|>"
    assert template.render(messages) == text
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    assert tokenizer(text, add_special_tokens=False).input_ids[:2] == [BEGIN, USER]
    backend = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    lesson = maker.lesson("chat", 2000, random.Random(2))
    taught = backend.decode(lesson.ids, skip_special_tokens=False).split("<|begin|>")[1:-1]
    assert len(taught) > 5
    for conversation in taught:
        turns = re.findall(r"<\|(system|user|assistant)\|>(.*?)<\|end\|>", conversation, re.DOTALL)
        messages = [{"role": role, "content": content} for role, content in turns]
        assert template.render(messages, add_generation_prompt=False) == "<|begin|>" + conversation


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
    ],
)
def test_the_chat_template_refuses_other_roles_and_late_system_messages(
    model_folder: Path, messages: list[dict[str, str]]
) -> None:
    with pytest.raises(ChatTemplateError):
        require_chat_template(ChatTemplate.load(model_folder)).render(messages)


def test_an_evaluation_of_the_exported_model_scores_each_task(
    scripts: Scripts, model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output = tmp_path / "scores.json"
    arguments = ["--model", str(model_folder), "--output", str(output), "--device", "cpu", "--contexts", "700"]
    arguments += ["--tasks", "single", "frequent_words", "--samples", "2", "--chat-samples", "1"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    scripts("evaluate").main()
    result = json.loads(output.read_text())
    assert [entry["task"] for entry in result["tasks"]] == ["single", "frequent_words"]
    assert all(0 <= entry["plain"]["score"] <= 1 and entry["plain"]["num_samples"] == 2 for entry in result["tasks"])


def test_the_card_gives_counts_figures_and_the_hash_of_each_file(
    scripts: Scripts, data: Path, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "scores.json").write_text(
        json.dumps(
            {
                "device": "a CPU",
                "words": "held_out",
                "tasks": [
                    {
                        "task": "single",
                        "context": 4096,
                        "chance": 0.0,
                        "plain": {"score": 0.75, "num_samples": 4},
                        "chat": {"score": 0.5, "num_samples": 2},
                    }
                ],
                "books": {"4096": {}},
            }
        )
    )
    legs = [scripts("legs").Leg.read(f"tiny={model_folder.parent / 'log.jsonl'}")] * 2
    scripts("card").write_card(
        model_folder, data / "prepared", legs, [tmp_path / "scores.json"], "a CPU", "Its clock ran."
    )
    card = (model_folder / "README.md").read_text()
    assert "2 books, " in card
    assert "`tiny` (seed 1, " in card
    assert "Its clock ran." in card
    assert "Trained again" not in card
    assert "| single | 0.000 | 0.750 / 0.500 |" in card
    assert "4 samples a figure in plain form, 2 in chat form" in card
    weights = (model_folder / "model.safetensors").read_bytes()
    assert f"| model.safetensors | {len(weights):,} | `{hashlib.sha256(weights).hexdigest()}` |" in card
    assert "{" not in card


def test_the_card_of_the_bundled_model_follows_from_its_run_and_its_files(scripts: Scripts, tmp_path: Path) -> None:
    bundled, run = FOLDER.parents[1] / "deploy" / "models" / "reference-26m", FOLDER / "runs" / "reference-26m"
    model = Path(shutil.copytree(bundled, tmp_path / bundled.name))
    legs = [scripts("legs").Leg.read(f"{name}={run / f'log_{name}.jsonl'}") for name in ("short", "long")]
    scores = [run / "scores.json", run / "held_out.json"]
    again = [scripts("spread").Training.read(str(run.parent / name)) for name in ("again-1", "again-2")]
    scripts("card").write_card(model, run, legs, scores, "one NVIDIA H200", (run / "remarks.md").read_text(), again)
    card = (bundled / "README.md").read_text()
    assert (model / "README.md").read_text() == card
    assert all(f"| {path.name} | " in card for path in bundled.iterdir() if path.name != "README.md")


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train", ["--data", "/nowhere", "--output", "OUT"], "/nowhere is no folder that corpus.py wrote: it has no"),
        ("train", ["--data", "DATA", "--output", "/proc/x"], "the folder /proc/x cannot be made"),
        ("train", ["--data", "DATA", "--output", "OUT", "--stages", "0,7"], "the preset tiny has the stages 0 to 1"),
        ("train", ["--data", "DATA", "--output", "OUT", "--steps", "0"], "'0' is not a whole number of 1 or more"),
        ("train", ["--data", "DATA", "--output", "OUT", "--workers", "-1"], "'-1' is not a whole number"),
        ("train", ["--data", "DATA", "--output", "OUT", "--device", "cuda:99"], "CUDA devices, not cuda:99"),
        ("train", ["--data", "DATA", "--output", "OUT", "--begin-from", "OUT"], "is no folder that export.py wrote"),
        ("export", ["--checkpoint", "/nowhere", "--tokenizer", "x", "--output", "OUT"], "/nowhere is not a file"),
        (
            "corpus",
            ["--books", "OUT", "--tokenizer", "x", "--output", "OUT"],
            "is no folder of books: it has no train-",
        ),
        ("tokenizer", ["--corpus", "OUT", "--output", "OUT/tokenizer.json"], "is no folder of books"),
        ("evaluate", ["--model", "/nowhere", "--output", "OUT/s.json"], "is no folder that export.py wrote"),
        ("evaluate", ["--model", "MODEL", "--output", "/nowhere/s.json"], "/nowhere/s.json cannot be written"),
        ("evaluate", ["--model", "MODEL", "--output", "OUT/s.json", "--tasks", "riddle"], "invalid choice: 'riddle'"),
        ("card", ["--model", "MODEL", "--legs", "huge=x"], "a leg is PRESET=LOG, PRESET one of short, long, tiny"),
        ("card", ["--model", "MODEL", "--legs", "tiny=/nowhere"], "/nowhere is not a file"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_anything_runs(
    script: str,
    arguments: list[str],
    words: str,
    scripts: Scripts,
    data: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"DATA": str(data / "prepared"), "MODEL": str(model_folder), "OUT": str(tmp_path)}
    for name, place in places.items():
        arguments = [word.replace(name, place) for word in arguments]
    tiny = ["--preset", "tiny", "--device", "cpu"] if script == "train" else []
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *tiny, *arguments])
    with pytest.raises(SystemExit) as ended:
        scripts(script).main()
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
