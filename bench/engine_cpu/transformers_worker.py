"""transformers as a contestant: the judge of correctness, and batched `generate` as most people run it."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from protocol import context_ids, serve
from transformers import AutoModelForCausalLM, DynamicCache

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Contestant:
    """Greedy decoding at batch 1, and padded batches."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["num_threads"])
        torch.set_grad_enabled(False)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(
            settings["model_dir"], dtype=DTYPES[settings["dtype"]], attn_implementation="sdpa"
        ).eval()
        self._cache = DynamicCache()
        self._num_cached = 0
        self.info = {"runtime": f"transformers {transformers.__version__}, torch {torch.__version__}, sdpa"}

    def _generate(self, prompts: list[list[int]], num_tokens: int) -> torch.Tensor:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )[:, longest:]

    def greedy(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """Tokens and seconds of one request."""
        begin_s = time.perf_counter()
        tokens = self._generate([prompt], num_tokens)[0].tolist()
        return {"tokens": tokens, "seconds": time.perf_counter() - begin_s}

    def decode(self, context: int, num_tokens: int) -> dict[str, Any]:
        """Seconds of each decode step behind a context."""
        ids = context_ids(context, self._model.config.vocab_size)
        if self._num_cached != context:
            self._cache = DynamicCache()
            self._model(torch.tensor([ids[:-1]]), past_key_values=self._cache, logits_to_keep=1)
            self._num_cached = context
        token = self._step(torch.tensor([ids[-1:]]))
        step_s = []
        for _ in range(num_tokens):
            begin_s = time.perf_counter()
            token = self._step(token)
            step_s.append(time.perf_counter() - begin_s)
        self._cache.crop(-(num_tokens + 1))
        return {"step_s": step_s}

    def _step(self, token: torch.Tensor) -> torch.Tensor:
        logits = self._model(token, past_key_values=self._cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def batch(self, requests: list[tuple[list[int], int]]) -> dict[str, Any]:
        """Seconds of one padded batch that runs to its longest answer; only the tokens asked for count."""
        begin_s = time.perf_counter()
        self._generate([prompt for prompt, _ in requests], max(num for _, num in requests))
        return {"seconds": time.perf_counter() - begin_s, "num_tokens": sum(num for _, num in requests)}


if __name__ == "__main__":
    contestant = Contestant(json.loads(sys.argv[1]))
    serve(contestant.info, {"greedy": contestant.greedy, "decode": contestant.decode, "batch": contestant.batch})
