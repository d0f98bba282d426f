"""Asks a running server the suite's questions with the OpenAI client: what its users get.

The whole prompt is read densely there, so that sparse attention begins with the answer. How a request attends is asked
for in `extra_body`, what was dropped comes back in `usage.vashista.support`. Temperature 0; the connection stays on the
machine or the LAN that `--url` names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from suite_options import SuiteError
from suite_report import Mode, Result
from suite_samples import Question
from tasks import score

MODULE = "server"
TIMEOUT_S = 600.0
NOT_READY = 503
POLL_S = 1.0


class Server:
    """An OpenAI-compatible server; its first model is asked."""

    def __init__(self, url: str, key: str, concurrency: int) -> None:
        """url: with or without /v1. Raises SuiteError if nothing answers there, or nothing that has a model."""
        self.base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._client = openai.OpenAI(base_url=self.base, api_key=key or "none", timeout=TIMEOUT_S, max_retries=2)
        self._concurrency = concurrency
        try:
            models = list(self._client.models.list().data)
        except (openai.OpenAIError, ValueError, TypeError) as error:
            raise SuiteError(f"{self.base} does not answer as an OpenAI server: {error}") from error
        if not models:
            raise SuiteError(f"{self.base} has no model")
        self.model = models[0].id

    def wait_until_ready(
        self,
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Ask for one token until it comes: a server lists its model before it has loaded it, and answers 503 then.

        Raises SuiteError if it still does after `limit_s`, and at once for any other error.
        """
        client = self._client.with_options(max_retries=0)
        ends_at, said = clock() + limit_s, ""
        while True:
            try:
                client.completions.create(model=self.model, prompt="The", max_tokens=1, temperature=0.0)
                return
            except openai.APIStatusError as error:
                if error.status_code != NOT_READY:
                    raise SuiteError(f"{self.base} does not complete a prompt: {error}") from error
                reason = str(error)
            except openai.OpenAIError as error:
                raise SuiteError(f"{self.base} does not complete a prompt: {error}") from error
            if clock() >= ends_at:
                raise SuiteError(
                    f"{self.base} was not ready within {limit_s:g} s (--ready-s allows more); it says: {reason}"
                )
            if reason != said:
                print(f"{self.base} is not ready, waiting for {limit_s:g} s at most: {reason}", flush=True)
                said = reason
            sleep(POLL_S)

    def ask(self, questions: Sequence[Question], mode: Mode, on_reply: Callable[[], None]) -> list[Result]:
        """A result for each task, samples in their order. Raises SuiteError for a reply that is none."""

        def ask_one(question: Question) -> tuple[float, dict[str, float | None]]:
            reply = self._client.completions.create(
                model=self.model,
                prompt=question.sample.prompt,
                max_tokens=question.sample.max_tokens,
                temperature=0.0,
                extra_body={"vashista": {"attention": wanted(mode)}},
            )
            on_reply()
            return score(question.sample, reply.choices[0].text), support_of(reply.usage)

        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                answers = list(pool.map(ask_one, questions))
            except openai.OpenAIError as error:
                raise SuiteError(f"{self.base} gave no reply ({mode.name}): {error}") from error
        results: dict[str, Result] = {}
        for question, (value, support) in zip(questions, answers, strict=True):
            sample = question.sample
            result = results.setdefault(
                sample.task, Result(sample.task, question.context, MODULE, mode.name, sample.chance, [])
            )
            result.values.append(value)
            if support:
                result.support.append(support)
        return list(results.values())


def wanted(mode: Mode) -> dict[str, Any]:
    """The request's `attention`."""
    if mode.is_dense:
        return {"mode": "dense"}
    if mode.token_budget is not None:
        return {"mode": "sparse", "token_budget": mode.token_budget}
    return {"mode": "sparse", "max_dropped_mass": mode.max_dropped_mass}


def support_of(usage: Any) -> dict[str, float | None]:
    """What a sparse request left out; {} for a dense one."""
    extra = (usage.model_extra or {}).get("vashista") if usage is not None else None
    support = (extra or {}).get("support")
    if not support:
        return {}
    audit = support.get("audit")
    return {
        "estimate": support.get("dropped_mass_estimate"),
        "bound": support.get("dropped_mass_bound"),
        "gap": support.get("support_gap"),
        "attended": support["tokens_attended"] / max(support["tokens_visible"], 1),
        "audit": audit["dropped_mass"] if audit else None,
    }
