"""llama.cpp as a contestant, through llama-cpp-python's low-level calls: llama_decode and the greedy sampler in C.

The context stays in the KV cache between rounds; the tokens that a round added are taken out again. Flash attention and
the KV types are settings of `contest.py`.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
from protocol import context_ids, serve

BATCH = 512
GGML_TYPES = {"f32": 0, "f16": 1, "bf16": 30}


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


class Contestant:
    """Greedy decoding at batch 1."""

    def __init__(self, settings: dict[str, Any]) -> None:
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            settings["gguf"].encode(), llama_cpp.llama_model_default_params()
        )
        assert self._model, "llama.cpp cannot load the GGUF file"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = settings["max_context"]
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = settings["num_threads"]
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if settings["flash_attention"]
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k = params.type_v = GGML_TYPES[settings["kv_dtype"]]
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp cannot make a context"
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._sampler = llama_cpp.llama_sampler_init_greedy()
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._num_cached = 0
        self.info = {
            "runtime": f"llama-cpp-python {llama_cpp.__version__}",
            "system": llama_cpp.llama_print_system_info().decode(),
            "kv_dtype": settings["kv_dtype"],
            "flash_attention": settings["flash_attention"],
        }

    def _feed(self, tokens: list[int]) -> None:
        for begin in range(0, len(tokens), BATCH):
            part = tokens[begin : begin + BATCH]
            array = (llama_cpp.llama_token * len(part))(*part)
            status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(part)))
            assert status == 0, f"llama_decode returned {status}"

    def _sample(self) -> int:
        return int(llama_cpp.llama_sampler_sample(self._sampler, self._context, -1))

    def _forget_from(self, position: int) -> None:
        assert llama_cpp.llama_memory_seq_rm(self._memory, 0, position, -1)

    def greedy(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """Tokens and seconds of one request."""
        self._forget_from(0)
        self._num_cached = 0
        begin_s = time.perf_counter()
        self._feed(prompt)
        tokens = [self._sample()]
        while len(tokens) < num_tokens:
            self._feed(tokens[-1:])
            tokens.append(self._sample())
        return {"tokens": tokens, "seconds": time.perf_counter() - begin_s}

    def decode(self, context: int, num_tokens: int) -> dict[str, Any]:
        """Seconds of each decode step behind a context."""
        if self._num_cached != context:
            self._forget_from(0)
            self._feed(context_ids(context, self._vocab_size)[:-1])
            self._num_cached = context
        self._feed(context_ids(context, self._vocab_size)[-1:])
        token = self._sample()
        step_s = []
        for _ in range(num_tokens):
            begin_s = time.perf_counter()
            self._feed([token])
            token = self._sample()
            step_s.append(time.perf_counter() - begin_s)
        self._forget_from(context - 1)
        return {"step_s": step_s}


if __name__ == "__main__":
    contestant = Contestant(json.loads(sys.argv[1]))
    serve(contestant.info, {"greedy": contestant.greedy, "decode": contestant.decode})
