"""What a request demands of its own run: to be done by a deadline, to cost no more than so much.

Admission asks `Terms` of every request that could run, after it was predicted. A deadline holds where the upper end of
the predicted total is within it, a limit of cost where the upper end of the price is; both are for all of max_tokens.
What does not hold is refused before anything runs, with the prediction, and with the time after which it would hold;
or, where the client allows it, the request attends to fewer tokens and says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from vashista.engine.errors import (
    CostLimitError,
    DeadlineError,
    DeadlineImpossibleError,
    InvalidRequestError,
    PredictionMissingError,
    VashistaError,
)
from vashista.engine.messages import AttentionMode, Submit
from vashista.engine.predict.prediction import Prediction
from vashista.server.forecaster import Forecaster
from vashista.server.foresight import Foresight
from vashista.server.schemas.fields import VashistaOptions
from vashista.server.schemas.responses import Adapted, AskedAttention
from vashista.server.settings import Settings

DEADLINE, COST = "vashista.deadline_s", "vashista.max_cost"


@dataclass(frozen=True)
class Run:
    """How a request is to run."""

    submits: list[Submit]
    foresight: Foresight | None
    adapted: Adapted | None = None


class Terms:
    """Of one server."""

    def __init__(self, settings: Settings, forecaster: Forecaster) -> None:
        self._forecaster = forecaster
        self._is_free = settings.prices().is_free
        self._least_budget = settings.min_token_budget
        self._most_dropped = settings.max_allowed_dropped_mass
        self._can_be_sparse = settings.attention != "dense"

    def meet(self, options: VashistaOptions | None, run: Run) -> Run:
        """The run as it is or as it must be; an error that says what is missing where no run meets the terms."""
        if options is None or (options.deadline_s is None and options.max_cost is None):
            return run
        if options.max_cost is not None and self._is_free:
            raise InvalidRequestError(
                f"{COST}: this server has no prices, so nothing can be said of a cost; leave the field out.", param=COST
            )
        if run.foresight is None:
            raise PredictionMissingError(
                "The request has a deadline_s or max_cost, but this server cannot predict at present.",
                param=DEADLINE if options.deadline_s is not None else COST,
            )
        if _is_met(options, run.foresight.prediction):
            return run
        adapted, why_not = self._adapt(options, run) if options.adapt else (None, "")
        if adapted is not None:
            return adapted
        refusal = self._refusal(options, run.foresight, why_not)
        refusal.prediction = run.foresight.prediction
        raise refusal

    def _refusal(self, options: VashistaOptions, foresight: Foresight, why_not: str) -> VashistaError:
        """What stands against the request; of a deadline with its Retry-After, or that no waiting helps.

        why_not: why it could not be adapted; empty where that was not asked for.
        """
        prediction = foresight.prediction
        if _is_dear(options, prediction):
            assert prediction.money is not None
            return CostLimitError(
                f"{COST} is {options.max_cost:g} {prediction.currency}; this request with {prediction.num_tokens} "
                f"tokens to generate may cost up to {prediction.money.upper:.3g} {prediction.currency} (median "
                f"{prediction.money.median:.3g}).{why_not}",
                param=COST,
            )
        assert options.deadline_s is not None
        now_s = time.monotonic()
        alone_s = self._forecaster.alone_s(foresight, now_s)
        if alone_s > options.deadline_s:
            return DeadlineImpossibleError(
                f"{DEADLINE} is {options.deadline_s:g} s; with {prediction.num_tokens} tokens to generate this request "
                f"takes up to {alone_s:.3g} s even when nobody else is served.{why_not}",
                param=DEADLINE,
            )
        return DeadlineError(
            f"{DEADLINE} is {options.deadline_s:g} s; now this request with {prediction.num_tokens} tokens to generate "
            f"would take up to {prediction.total_s.upper:.3g} s (median {prediction.total_s.median:.3g} s), with "
            f"{prediction.queue.num_running} requests running and {prediction.queue.num_waiting} waiting.{why_not}",
            retry_after_s=self._forecaster.wait_s(foresight, options.deadline_s, now_s),
            param=DEADLINE,
        )

    def _adapt(self, options: VashistaOptions, run: Run) -> tuple[Run | None, str]:
        """The run with the largest of `_budgets` that meets the terms and drops no more than is allowed, or why none.

        Found by halving, in five predictions of twenty budgets: as budgets fall, what is predicted of total and cost is
        assumed not to rise, and the dropped mass not to fall. Where that fails a larger budget that would do, or the
        only one, may be missed; what is returned meets the terms by its own prediction in any case.
        """
        if not self._can_be_sparse:
            return None, " It cannot be adapted: this server runs dense attention alone."
        asked = run.submits[0].attention
        own = None if options.attention is None else options.attention.max_dropped_mass
        allowed = self._most_dropped if own is None else own
        budgets = self._budgets(asked, run.submits)
        if not budgets:
            least = self._least_budget
            return None, f" It cannot be adapted: the least token budget, {least}, is all that it attends to."
        found, low, high = None, 0, len(budgets)
        why_not = f" It cannot be adapted: no smaller token budget is expected to drop at most {allowed:g} of the mass."
        while low < high:
            middle = (low + high) // 2
            mode = AttentionMode(token_budget=budgets[middle])
            submits = [msgspec.structs.replace(submit, attention=mode) for submit in run.submits]
            foresight = self._forecaster.predict(submits, time.monotonic(), arrival_s=submits[0].arrival_s)
            if foresight is None:
                why_not = " It cannot be adapted: this server cannot predict at present."
                break
            dropped = foresight.prediction.support.dropped_mass
            if dropped is None:
                why_not = " It cannot be adapted: without a support profile nobody knows what a token budget drops."
                break
            if dropped > allowed:
                high = middle
            elif _is_met(options, foresight.prediction):
                said = AskedAttention.of(asked)
                adapted = Adapted(asked=said, token_budget=budgets[middle], expected_dropped_mass=dropped)
                found, high = Run(submits, foresight, adapted), middle
            else:
                low = middle + 1
                why_not = _not_enough(budgets[middle], dropped, foresight.prediction)
        return found, why_not

    def _budgets(self, asked: AttentionMode, submits: Sequence[Submit]) -> list[int]:
        """Falling, each three quarters of the one before, down to the least that the server allows."""
        longest = max(len(submit.prompt_token_ids) + submit.sampling.max_tokens for submit in submits)
        budget = min(longest, asked.token_budget or longest) * 3 // 4
        found = []
        while budget > self._least_budget:
            found.append(budget)
            budget = budget * 3 // 4
        return [*found, self._least_budget] if self._least_budget < longest else found


def _not_enough(token_budget: int, dropped: float, prediction: Prediction) -> str:
    """Of the smallest budget that may be taken."""
    price = "" if prediction.money is None else f" and {prediction.money.upper:.3g} {prediction.currency}"
    return (
        f" Adapted to a token budget of {token_budget}, which drops {dropped:.2g} of the attention's mass, it would "
        f"take up to {prediction.total_s.upper:.3g} s{price} now, with all that are there."
    )


def _is_dear(options: VashistaOptions, prediction: Prediction) -> bool:
    if options.max_cost is None:
        return False
    assert prediction.money is not None, "there are prices"
    return prediction.money.upper > options.max_cost


def _is_met(options: VashistaOptions, prediction: Prediction) -> bool:
    is_late = options.deadline_s is not None and prediction.total_s.upper > options.deadline_s
    return not is_late and not _is_dear(options, prediction)
