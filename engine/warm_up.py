"""What the first requests on a GPU would wait for, done before the engine is ready.

Kernels are compiled at their first launch, which takes seconds each where the disk has no cache of them, and steps are
captured as CUDA graphs (`engine/models/decode_graph.py`). So prompts of every padded length are read here, and one is
decoded in every number of rows, densely and, where the attention module can, sparsely: with a head that attends to
everything, as requests for a dropped mass mostly have and those of a model with retrieval heads always, and with none
(`engine/attention/plan_key.py`). What is written goes into pages that nobody has been given yet. Graphs of other
contexts and budgets are captured when they have come a few times. Last, tokens are chosen in every way that a request
may ask for: what a device loads at its first use is then loaded.
"""

from __future__ import annotations

import torch

from vashista.engine.messages import SamplingParams, Submit
from vashista.engine.models.decode_graph import PROMPT_ROWS, SEEN, num_rows_of
from vashista.engine.pages import root_hash
from vashista.engine.request import Request
from vashista.engine.runner import Runner
from vashista.engine.sampler import SamplingRow, choose, log_probabilities, sample
from vashista.engine.scheduler import Batch, BatchItem
from vashista.engine.step import EVERYTHING, Selection

PROMPT_TOKENS = 2176
"""More than TOKEN_BUDGET, so that something is left out."""
SHORT_TOKENS = 17
TOKEN_BUDGET = 1024
"""A usual one."""
CHOICES = (
    SamplingParams(seed=0, max_tokens=1, temperature=0.0),
    SamplingParams(seed=0, max_tokens=1),
    SamplingParams(seed=0, max_tokens=1, temperature=0.7, top_p=0.9, top_k=20, min_p=0.01),
    SamplingParams(
        seed=0, max_tokens=1, temperature=0.7, presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.1,
        logit_bias={0: 1.0},
    ),
)  # fmt: skip


def warm_up(runner: Runner, max_requests: int) -> None:
    """Compile and capture for up to `max_requests` requests. Raises what a step raises."""
    room = min(runner.max_context, runner.num_pages * runner.config.page_size)
    num_prompt = min(PROMPT_TOKENS, room - 1)
    if num_prompt < 1:
        return
    requests = [_request(str(index), num_prompt, runner) for index in range(max_requests)]
    for num_tokens in {num_prompt, min(SHORT_TOKENS, num_prompt)}:
        _run(runner, [BatchItem(requests[0], 0, num_tokens)], None)
    for num_tokens in [rows for rows in PROMPT_ROWS if rows <= num_prompt] if runner.model.is_captured else []:
        for _ in range(SEEN):
            _run(runner, [BatchItem(requests[0], 0, num_tokens)], None)
    selections: list[Selection | None] = [None]
    if runner.attention.name != "dense" and num_prompt > TOKEN_BUDGET:
        shape = runner.attention_shape
        budgets = torch.full((shape.num_layers, shape.num_kv_heads), TOKEN_BUDGET, dtype=torch.int32)
        some = budgets.clone()
        some[-1, -1] = EVERYTHING
        selections += [Selection(budgets, [(0, 0)]), Selection(some, [(0, 0)])]
    for num_rows in sorted({num_rows_of(count) for count in range(1, max_requests + 1)}, reverse=True):
        items = [BatchItem(request, num_prompt, 1) for request in requests[:num_rows]]
        for selection in selections:
            for _ in range(SEEN):
                _run(runner, items, selection)
    _choose(runner.logits(_run(runner, [BatchItem(requests[0], 0, 1)], None)))


def _run(runner: Runner, items: list[BatchItem], selection: Selection | None) -> torch.Tensor:
    """One whole step; the hidden state of the last token, [1, hidden_size]."""
    output = runner.execute(Batch(items), lambda item: True, lambda item: selection)
    hidden = output.hidden[-1:]
    tokens = choose(runner.logits(hidden), [SamplingRow(CHOICES[0], [0], 1, [])])
    output.take_support()
    tokens.tolist()
    return hidden


def _choose(logits: torch.Tensor) -> None:
    """Tokens by each of CHOICES and by all at once, and their log probabilities; logits: [1, vocab_size]."""
    allowed = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    rows = [SamplingRow(sampling, [0, 0], 1, [1], allowed) for sampling in CHOICES]
    for some in [*([row] for row in rows), rows]:
        many = logits.expand(len(some), -1)
        tokens = [max(token, 0) for token in sample(many.clone(), some)]  # -1 where the model gives NaN: no index
        log_probabilities(many, tokens, [1] * len(some))


def _request(name: str, num_prompt: int, runner: Runner) -> Request:
    """All have the same tokens in the same pages: what they write is the same, too."""
    submit = Submit(name, [0] * (num_prompt + 1), SamplingParams(seed=0, max_tokens=1), arrival_s=0.0)
    request = Request(submit, root_hash("warm-up"))
    request.pages = list(range(-(-(num_prompt + 1) // runner.config.page_size)))
    return request
