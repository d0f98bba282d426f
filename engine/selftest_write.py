"""Makes a model's known answers, for `vashista selftest --write`.

Run it where the installation is trusted: what it computes is what every other machine is held to. It takes what the
model says on the CPU in float32, and cuts each continuation where another processor's rounding might decide.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from vashista.engine.chat_template import ChatTemplate
from vashista.engine.config import EngineConfig
from vashista.engine.errors import SelftestModelError
from vashista.engine.messages import DENSE, AttentionMode
from vashista.engine.model_config import load_model_config
from vashista.engine.selftest_answers import (
    MIN_LEAD,
    KnownAnswer,
    RecallAnswers,
    SelftestAnswers,
    digest_files,
    encode_prompt,
)
from vashista.engine.selftest_model import ROOM_TOKENS, ModelTest

PROMPTS = (
    ("It was a dark and stormy night, and the old captain", False),
    ("The code of elephant is 48213.\n\nThe code of river is 90577.\n\nThe code of elephant is", False),
    ("The sun rose, the birds sang. The sun rose, the birds", False),
    ("Chapter I.\n\nIt is a truth universally acknowledged, that", False),
    ("The code of castle is 31604. What is the code of castle?", True),
)
"""And whether each is a user's message of a chat."""
NUM_TOKENS = 32
"""Of a continuation, at most."""
MIN_TOKENS = 4
"""A continuation whose lead is lost sooner is left out."""
PASSAGE_TOKENS = 8192
TOKEN_BUDGET = 1024
"""The server's default; of a short passage a quarter."""
CODES = {
    "elephant": "48213", "river": "90577", "castle": "31604", "garden": "27589", "bridge": "65042", "lantern": "14938",
}  # fmt: skip
NEEDLE = "The code of {name} is {code}.\n\n"
QUESTION = "\n\nQuestion: what is the code of {name}? Answer: the code of {name} is"
WORDINGS = ((NEEDLE, QUESTION), (NEEDLE, QUESTION + " "), (NEEDLE, "\n\nThe code of {name} is"))
"""How codes are hidden and asked for; the first wording that the model answers is taken."""


def write_answers(folder: Path, config: EngineConfig, num_passage_tokens: int | None = None) -> SelftestAnswers:
    """What the model in this folder says. Raises the engine's errors of a start, SelftestModelError for a model whose
    continuations are all too undecided to be compared.

    config: num_threads counts. The passage has PASSAGE_TOKENS unless told, or as many as the model allows.
    """
    longest = load_model_config(folder).max_position_embeddings - ROOM_TOKENS
    num_tokens = min(num_passage_tokens or PASSAGE_TOKENS, longest)
    test = ModelTest(folder, num_tokens, EngineConfig(
        model_dir=str(folder), device="cpu", dtype="float32", num_threads=config.num_threads))  # fmt: skip
    known = _known(folder, test)
    if not known:
        raise SelftestModelError(
            f"No continuation of {folder} keeps a lead of {MIN_LEAD} nats for {MIN_TOKENS} tokens: nothing that every "
            "processor would repeat."
        )
    return SelftestAnswers(files=digest_files(folder), known=known, recall=_recall(test, num_tokens))


def _known(folder: Path, test: ModelTest) -> list[KnownAnswer]:
    """Continuations, each up to the first token that does not lead."""
    has_template = ChatTemplate.load(folder) is not None
    known = []
    for prompt, is_chat in PROMPTS:
        if is_chat and not has_template:
            continue
        token_ids = encode_prompt(folder, test.tokenizer, prompt, is_chat)
        [answer] = test.complete([token_ids], [NUM_TOKENS], num_top=2)
        leads = [seen.top[0][1] - seen.top[1][1] for seen in answer.logprobs]
        size = next((index for index, lead in enumerate(leads) if lead < MIN_LEAD), len(leads))
        if size >= MIN_TOKENS:
            logprobs = [round(seen.logprob, 6) for seen in answer.logprobs[:size]]
            known.append(
                KnownAnswer(
                    prompt=prompt,
                    is_chat=is_chat,
                    prompt_token_ids=token_ids,
                    token_ids=answer.token_ids[:size],
                    logprobs=logprobs,
                )
            )
    return known


def _recall(test: ModelTest, num_tokens: int) -> RecallAnswers | None:
    """The codes that the model repeats, densely and sparsely; None for none."""
    budget = min(TOKEN_BUDGET, num_tokens // 4)
    modes = [DENSE, AttentionMode(token_budget=budget)] if test.is_sparse_possible else [DENSE]
    for needle, question in WORDINGS:
        recall = RecallAnswers(
            num_tokens=num_tokens,
            needle=needle,
            question=question,
            codes=CODES,
            asked=list(CODES),
            token_budget=budget,
        )
        right = set(CODES)
        for mode in modes:
            answers = test.ask(recall, list(CODES), mode)
            right &= {name for name, answer in zip(CODES, answers, strict=True) if CODES[name] in answer.text}
        if right:
            return msgspec.structs.replace(recall, asked=[name for name in CODES if name in right])
    return None
