"""What a trained model can do: each task of the suite at each context in dense attention, and its loss on books.

    python bench/train_reference/evaluate.py --model MODEL --output FILE.json --contexts 4096 8192 16384 32768

Prompts are the suite's (words of the evaluation, held-out books), decoded greedily in batches with plain torch. The
suite itself judges sparse attention through the engine; this is the training's own measure, quick on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

import suite_path  # noqa: F401
import torch
from argument_kinds import new_file
from arguments import count, device, model_folder
from export import load_model
from haystack import Haystack, read_books
from model import Attention, Model, rotation
from stages import Shape
from tasks import TASKS, Sample, make_sample, score
from tokenizer import ASSISTANT, BEGIN, CONTROL_TOKENS, END, USER
from tokenizers import Tokenizer
from torch.nn import functional
from words import EVALUATION_WORDS, HELD_OUT_WORDS

WORDS = {"evaluation": EVALUATION_WORDS, "held_out": HELD_OUT_WORDS}
ROOM = 96
"""Tokens of a context kept for control tokens and the answer."""
PREFILL_TOKENS = 1 << 18
"""Tokens of prompts computed at once on a GPU."""


class CachedAttention(Attention):
    """Attention of one batch over its own cache: a prompt at once, then a token a row a step."""

    def __init__(self, shape: Shape, num_rows: int, max_length: int, model: Model) -> None:
        super().__init__()
        size = (shape.num_layers, 2, num_rows, shape.num_kv_heads, max_length, shape.head_dim)
        self._cache = torch.zeros(size, dtype=model.dtype, device=model.embedding.device)
        self.lengths: torch.Tensor | None = None
        """[num_rows]: where the token of this step goes; None while the prompt is computed."""

    def rotation(self, shape: Shape, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().rotation(shape, ids) if self.lengths is None else rotation(shape, self.lengths)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch_size: int) -> torch.Tensor:
        keys, values = self._cache[layer]
        if self.lengths is None:
            for stored, new in ((keys, k), (values, v)):
                rows = new.unflatten(0, (batch_size, -1)).transpose(1, 2)
                stored[:, :, : rows.shape[2]] = rows
            return super().__call__(layer, q, k, v, batch_size)
        rows = torch.arange(batch_size, device=q.device)
        keys[rows, :, self.lengths] = k
        values[rows, :, self.lengths] = v
        longest = min(-(-(int(self.lengths.max()) + 1) // 64) * 64, keys.shape[2])
        mask = torch.arange(longest, device=q.device) <= self.lengths[:, None]
        grouped = q.unflatten(1, (k.shape[1], -1))
        out = functional.scaled_dot_product_attention(
            grouped, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask[:, None, None]
        )
        return out.flatten(1)


@torch.inference_mode()
def generate(model: Model, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy continuations up to END, of `max_tokens` at most."""
    device = model.embedding.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    attention = CachedAttention(model.shape, len(prompts), -(-(longest + max_tokens) // 64) * 64, model)
    hidden = model.hidden(ids.to(device), attention).unflatten(0, ids.shape)
    tokens = model.logits(hidden[torch.arange(len(prompts), device=device), lengths - 1]).argmax(-1)
    del hidden
    steps = [tokens]
    for _ in range(max_tokens - 1):
        attention.lengths = lengths
        tokens = model.logits(model.hidden(tokens[:, None], attention)).argmax(-1)
        lengths = lengths + 1
        steps.append(tokens)
    rows = torch.stack(steps, 1).tolist()
    end = CONTROL_TOKENS.index(END)
    return [row[: row.index(end)] if end in row else row for row in rows]


@cache
def _tools(tokenizer_path: str) -> tuple[Tokenizer, Haystack]:
    tokenizer = Tokenizer.from_file(tokenizer_path)
    return tokenizer, Haystack(read_books(), lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids))


def draw_sample(tokenizer_path: str, task: str, context: int, index: int, words: str) -> Sample:
    """The sample of this number; the same on every machine."""
    tokenizer, haystack = _tools(tokenizer_path)
    rng = random.Random(f"{task}/{context}/{index}")
    return make_sample(
        task,
        context - ROOM,
        rng,
        haystack,
        lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids),
        WORDS[words],
    )


def prompt_ids(tokenizer: Tokenizer, sample: Sample, is_chat: bool) -> list[int]:
    """The sample as the model was taught it."""
    begin, end, user, assistant = (CONTROL_TOKENS.index(token) for token in (BEGIN, END, USER, ASSISTANT))
    if not is_chat:
        return [begin, *tokenizer.encode(sample.prompt, add_special_tokens=False).ids]
    return [begin, user, *tokenizer.encode(sample.user, add_special_tokens=False).ids, end, assistant]


def judge(model: Model, tokenizer: Tokenizer, samples: list[Sample], is_chat: bool) -> tuple[list[float], list[str]]:
    """(score, generated text) of each sample; samples of one context."""
    prompts = [prompt_ids(tokenizer, sample, is_chat) for sample in samples]
    size = max(1, PREFILL_TOKENS // max(map(len, prompts), default=1))
    texts: list[str] = []
    for start in range(0, len(prompts), size):
        part = samples[start : start + size]
        outputs = generate(model, prompts[start : start + size], max(sample.max_tokens for sample in part))
        texts += [tokenizer.decode(output) for output in outputs]
    return [score(sample, text) for sample, text in zip(samples, texts, strict=True)], texts


@torch.inference_mode()
def book_losses(model: Model, tokenizer: Tokenizer, context: int, num_books: int) -> dict[str, float]:
    """Mean loss on the held-out books in nats a token, bits a byte, and of the last 1,024 of `context` tokens."""
    losses, tails, num_bytes = [], [], 0
    device = model.embedding.device
    for text in read_books()[:num_books]:
        ids = [CONTROL_TOKENS.index(BEGIN), *tokenizer.encode(text, add_special_tokens=False).ids][: context + 1]
        if len(ids) <= context:
            continue
        num_bytes += len(tokenizer.decode(ids[1:]).encode())
        tokens = torch.tensor([ids], device=device)
        logits = model.logits(model.hidden(tokens[:, :-1], Attention()))
        loss = functional.cross_entropy(logits, tokens[0, 1:], reduction="none").double()
        losses.append(loss)
        tails.append(loss[-1024:])
    if not losses:
        return {}
    every = torch.cat(losses)
    return {
        "nats_per_token": float(every.mean()),
        "bits_per_byte": float(every.sum()) / math.log(2) / num_bytes,
        "nats_per_token_in_last_1024": float(torch.cat(tails).mean()),
        "num_books": len(losses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_folder, required=True)
    parser.add_argument("--output", type=new_file, required=True)
    parser.add_argument("--contexts", type=count, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--words", choices=WORDS, default="evaluation", help="what the names are drawn from")
    parser.add_argument("--samples", type=count, default=32)
    parser.add_argument("--chat-samples", type=count, default=16)
    parser.add_argument("--books", type=int, default=13, help="whose loss is taken")
    parser.add_argument("--device", type=device, default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="leave out what is not begun by then")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    is_gpu = options.device.type == "cuda"
    name = torch.cuda.get_device_name(options.device) if is_gpu else "a CPU"
    start = time.perf_counter()
    path = str(options.model / "tokenizer.json")
    most = max(options.samples, options.chat_samples)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = {
            (context, task): [
                pool.submit(draw_sample, path, task, context, index, options.words) for index in range(most)
            ]
            for context in options.contexts
            for task in options.tasks
        }
        tokenizer = Tokenizer.from_file(path)
        model = load_model(options.model, torch.bfloat16 if is_gpu else torch.float32, options.device)
        result: dict[str, Any] = {"device": name, "words": options.words, "tasks": [], "books": {}}
        for context in (4096, 8192, 16384, 24576):
            if context <= max(options.contexts):
                result["books"][context] = book_losses(model, tokenizer, context, options.books)
        print(json.dumps(result["books"]), flush=True)
        for (context, task), futures in drawn.items():
            if time.perf_counter() - start > options.seconds:
                print(f"no time for {task} at {context}")
                continue
            samples = [future.result() for future in futures]
            entry: dict[str, Any] = {"task": task, "context": context, "chance": samples[0].chance}
            for form, num_samples in (("plain", options.samples), ("chat", options.chat_samples)):
                scores, texts = judge(model, tokenizer, samples[:num_samples], form == "chat")
                entry[form] = {"score": sum(scores) / num_samples, "num_samples": num_samples}
                wrong = [index for index, value in enumerate(scores) if value < 1][:2]
                entry[form]["wrong"] = [{"is": texts[i], "should": samples[i].answers} for i in wrong]
            result["tasks"].append(entry)
            scores_text = f"plain {entry['plain']['score']:.3f} chat {entry['chat']['score']:.3f}"
            print(f"{time.perf_counter() - start:6.1f} s  {context:6} {task:18} {scores_text}", flush=True)
            options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
