"""Three mixes of requests that `bench/predict/run.py` sends: short chats, long documents, and both.

Prompts are random token ids, so that nothing of one is in the cache for another. Half of the requests run to their
max_tokens, as their client asked; the others stop at one of a few common tokens, drawn at temperature 1, long before:
their length is not known to anybody when they come.
"""

from __future__ import annotations

import random
from typing import Any

MIXES = ("chat", "documents", "both")
STOP_TOKEN_IDS = (199, 301, 13)
"""Line ends and a dash: together 2.5 % of what probe-26m generates at temperature 1."""
SPARSE = {"attention": {"mode": "sparse", "token_budget": 512}}
DENSE = {"attention": {"mode": "dense"}}
DOCUMENT_SHARE = 0.2
"""Of the requests of `both`."""


def draw(mix: str, source: random.Random, vocab_size: int) -> dict[str, Any]:
    """The body of one request, without a model."""
    is_document = mix == "documents" or (mix == "both" and source.random() < DOCUMENT_SHARE)
    if is_document:
        num_prompt = round(min(6000, max(1200, source.lognormvariate(8.0, 0.35))))
        num_output = round(min(96, max(8, source.lognormvariate(3.5, 0.5))))
    else:
        num_prompt = round(min(600, max(16, source.lognormvariate(4.8, 0.6))))
        num_output = round(min(160, max(8, source.lognormvariate(3.9, 0.5))))
    body: dict[str, Any] = {
        "prompt": [source.randrange(300, vocab_size) for _ in range(num_prompt)],
        "temperature": 1.0,
        "seed": source.randrange(1 << 31),
        "vashista": SPARSE if source.random() < 0.5 else DENSE,
    }
    if source.random() < 0.5:
        return body | {"max_tokens": num_output, "ignore_eos": True}
    return body | {"max_tokens": 3 * num_output, "stop_token_ids": list(STOP_TOKEN_IDS)}
