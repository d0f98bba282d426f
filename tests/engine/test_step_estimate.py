"""What a step that is thought of would take."""

import pytest

from vashista.engine.messages import AttentionMode, SamplingParams, Submit
from vashista.engine.pages import root_hash
from vashista.engine.predict.coefficients import StepCoefficients
from vashista.engine.predict.features import COUNTS, KNOTS
from vashista.engine.request import Request
from vashista.engine.scheduler import BatchItem
from vashista.engine.step_estimate import ModelledStep
from vashista.engine.work import WorkModel

KEPT_S = 1e-3
CONTEXT = 1000


@pytest.mark.parametrize(("whole_share", "pairs"), [(0.0, 16 * 256), (1 / 16, 15 * 256 + CONTEXT), (1.0, 16 * CONTEXT)])
def test_heads_that_attend_to_everything_are_not_within_the_budget(whole_share: float, pairs: int) -> None:
    costs = StepCoefficients(
        base_s=0.0, per_token_s=[0.0] * len(KNOTS), counts_s=[KEPT_S * (name == "kept_pairs") for name in COUNTS]
    )
    work = WorkModel(weights=1.0, head=1.0, pair=1.0, windows=((None, 16),))
    submit = Submit(
        "a", [1] * (CONTEXT - 1), SamplingParams(seed=0, max_tokens=9), arrival_s=0.0,
        attention=AttentionMode(token_budget=256),
    )  # fmt: skip
    request = Request(submit, root_hash("a"))
    request.token_ids.append(2)
    step = ModelledStep(costs, work, whole_share)
    step.add(BatchItem(request, CONTEXT - 1, 1))
    assert step.seconds() == pytest.approx(KEPT_S * pairs)


@pytest.mark.parametrize(("chunk", "is_split"), [(1, False), (2, True), (30, True), (31, False)])
def test_short_prompts_beside_streams_read_the_weights_again(chunk: int, is_split: bool) -> None:
    costs = StepCoefficients(
        base_s=1.0, per_token_s=[0.0] * len(KNOTS), counts_s=[0.5 * (name == "split") for name in COUNTS]
    )
    work = WorkModel(weights=1.0, head=1.0, pair=1.0, windows=((None, 16),))
    request = Request(Submit("a", [1] * 99, SamplingParams(seed=0, max_tokens=9), arrival_s=0.0), root_hash("a"))
    prompt, stream = BatchItem(request, 0, chunk), BatchItem(request, 98, 1)
    step = ModelledStep(costs, work, prompt_rows=(30,))
    assert step.seconds(prompt) == 1.0
    step.add(stream)
    assert step.seconds(prompt) == (1.5 if is_split else 1.0)
    step.add(prompt)
    assert step.seconds() == (1.5 if is_split else 1.0)
