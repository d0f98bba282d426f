"""Positions of a prompt are encoded one by one: the encoder of a whole reply has only to copy them."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from vashista.engine.messages import TokenLogprobs
from vashista.server.logprobs import CompletionLogprobsWriter, prompt_logprobs


class Model:
    tokenizer: Any = None

    def __init__(self) -> None:
        self.tokenizer = self

    def token_label(self, token_id: int) -> str:
        return f"<{token_id}>"

    def token_text(self, token_id: int) -> str:
        return "ab"


MODEL: Any = Model()
ENTRIES = [None, TokenLogprobs(7, float("-inf"), 3, [(5, -0.5), (6, -1.5)])]


def test_of_prompt_logprobs() -> None:
    first, second = prompt_logprobs(MODEL, iter(ENTRIES), 1)
    assert first is None
    assert isinstance(second, msgspec.Raw)
    assert json.loads(bytes(second)) == {
        "5": {"logprob": -0.5, "rank": 1, "decoded_token": "<5>"},
        "7": {"logprob": -9999.0, "rank": 3, "decoded_token": "<7>"},
    }


def test_of_an_echoed_prompt() -> None:
    told = CompletionLogprobsWriter(MODEL, 2).write(iter(ENTRIES), [4, 7])
    assert isinstance(told.top_logprobs[1], msgspec.Raw)
    assert json.loads(msgspec.json.encode(told)) == {
        "tokens": ["<4>", "<7>"],
        "token_logprobs": [None, -9999.0],
        "top_logprobs": [None, {"<5>": -0.5, "<6>": -1.5, "<7>": -9999.0}],
        "text_offset": [0, 2],
    }
