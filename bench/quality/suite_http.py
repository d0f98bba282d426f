"""Asks a running server the suite's questions with the OpenAI client: what its users get.

The whole prompt is read densely there, so that sparse attention begins with the answer. How a request attends is asked
for in `extra_body`, what was dropped comes back in `usage.vashista.support`. Temperature 0; the connection stays on the
machine or the LAN that `--url` names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from suite_report import Mode, Result
from suite_samples import Question
from tasks import score

MODULE = "server"
TIMEOUT_S = 600.0


class Server:
    """An OpenAI-compatible server; its first model is asked."""

    def __init__(self, url: str, key: str, concurrency: int) -> None:
        """url: with or without /v1. SystemExit if nothing answers."""
        base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._client = openai.OpenAI(base_url=base, api_key=key or "none", timeout=TIMEOUT_S, max_retries=2)
        self._concurrency = concurrency
        try:
            self.model = self._client.models.list().data[0].id
        except openai.OpenAIError as error:
            raise SystemExit(f"{base} does not answer as an OpenAI server: {error}") from error

    def ask(self, questions: Sequence[Question], mode: Mode, on_reply: Callable[[], None]) -> list[Result]:
        """A result for each task, samples in their order. Raises the client's error for a reply that is none."""

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
            answers = list(pool.map(ask_one, questions))
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
