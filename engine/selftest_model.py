"""The model's part of `vashista selftest`: known answers, recall out of a long prompt, sparse against dense.

`engine/selftest.py` makes one `ModelTest` for the CPU in float32, and one more for a GPU where there is one, and calls
its checks in order. Requests go through `Engine` as the server's do. `engine/selftest_write.py` uses the same class to
make the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vashista.engine.config import EngineConfig
from vashista.engine.engine import Engine
from vashista.engine.errors import ERRORS, InternalError
from vashista.engine.messages import (
    DENSE,
    AttentionMode,
    FinishReason,
    SamplingParams,
    Submit,
    SupportReport,
    TokenLogprobs,
)
from vashista.engine.model_config import load_model_config
from vashista.engine.sample_text import read_sample_text
from vashista.engine.selftest_answers import KnownAnswer, RecallAnswers, encode_prompt, hide_codes
from vashista.engine.selftest_check import CheckFailed, CheckSkipped
from vashista.engine.tokenizer import Tokenizer

ROOM_TOKENS = 256
"""Beyond the passage: question and answer."""
LOGPROB_LIMIT = 2e-3
"""Nats by which a log probability may differ between processors."""
MAX_REQUESTS = 8


class Answer:
    """What one request came to."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.text = ""
        self.support: SupportReport | None = None


class ModelTest:
    """A loaded model, and what it answers."""

    def __init__(self, folder: Path, num_passage_tokens: int, config: EngineConfig) -> None:
        """Raises the engine's errors of a start. `config`: device, dtype and num_threads count."""
        model_config = load_model_config(folder)
        self.folder = folder
        self.tokenizer = Tokenizer.load(folder, model_config.vocab_size)
        self.engine = Engine(
            EngineConfig(
                model_dir=str(folder),
                device=config.device,
                dtype=config.dtype,
                num_threads=config.num_threads,
                max_context=min(num_passage_tokens + ROOM_TOKENS, model_config.max_position_embeddings),
                max_running_requests=MAX_REQUESTS,
                audit_rate=1.0,  # every head-step, so that means can be compared
                dense_below=0,
            )
        )
        self._passage: list[int] = []
        self._dense: list[Answer] = []

    @property
    def is_sparse_possible(self) -> bool:
        """Whether the attention module can leave tokens out."""
        return self.engine.ready.attention != "dense"

    def describe(self) -> str:
        """What was loaded, and whether the model's support profile was there."""
        ready = self.engine.ready
        text = f"{ready.num_parameters / 1e6:.1f} M parameters in {ready.dtype} on {ready.device_name}"
        if self.is_sparse_possible and not ready.has_support_profile:
            text += "; no support profile: sparse requests have no measured budgets, and no head is exempt"
        return text

    def check_known(self, known: Sequence[KnownAnswer]) -> str:
        """Prompts give the recorded tokens and greedy continuations."""
        for answer in known:
            found = encode_prompt(self.folder, self.tokenizer, answer.prompt, answer.is_chat)
            if found != answer.prompt_token_ids:
                raise CheckFailed(f"the prompt {answer.prompt!r} has other tokens than recorded")
        answers = self.complete([a.prompt_token_ids for a in known], [len(a.token_ids) for a in known])
        largest = 0.0
        for right, seen in zip(known, answers, strict=True):
            place = next((i for i, pair in enumerate(zip(right.token_ids, seen.token_ids, strict=False))
                          if pair[0] != pair[1]), None)  # fmt: skip
            if place is not None or len(seen.token_ids) != len(right.token_ids):
                place = len(seen.token_ids) if place is None else place
                raise CheckFailed(
                    f"after {right.prompt!r} token {place + 1} is {self._spell(seen.token_ids[place : place + 1])}, "
                    f"not {self._spell(right.token_ids[place : place + 1])}"
                )
            largest = max(largest, *(abs(a.logprob - b) for a, b in zip(seen.logprobs, right.logprobs, strict=True)))
        if not largest <= LOGPROB_LIMIT:
            raise CheckFailed(f"a log probability is off by {largest:.1e}; at most {LOGPROB_LIMIT:.0e} is right")
        return f"{sum(len(a.token_ids) for a in known)} tokens of {len(known)} prompts, to {largest:.0e} nats"

    def check_recall(self, recall: RecallAnswers | None) -> str:
        """Codes hidden in a long prompt are repeated, in full attention."""
        self._need(recall)
        assert recall is not None
        self._dense = self.ask(recall, recall.asked, DENSE)
        self._compare_codes(recall, self._dense)
        return f"{len(recall.asked)} of {len(recall.asked)} codes out of {len(self._passage)} tokens"

    def check_sparse(self, recall: RecallAnswers | None) -> str:
        """The same with a part of the context; what is dropped is below its bound."""
        self._need(recall, sparse=True)
        assert recall is not None
        answers = self.ask(recall, recall.asked, AttentionMode(token_budget=recall.token_budget))
        self._compare_codes(recall, answers)
        masses, bounds = [], []
        for answer in answers:
            support = answer.support
            if support is None or support.audit is None:
                raise CheckFailed("a request with a token budget attended to everything, or was not audited")
            num_sparse = round((1 - support.dense_share) * support.num_head_steps)
            if support.audit.num_audits != num_sparse:
                raise CheckFailed(f"{support.audit.num_audits} of {num_sparse} sparse head-steps were audited")
            mass = support.audit.dropped_mass * (1 - support.dense_share)  # the bound's mean is over dense ones, too
            if mass > support.dropped_mass_bound:
                raise CheckFailed(
                    f"the dropped mass is {mass:.6f}, above its bound of {support.dropped_mass_bound:.6f}"
                )
            masses.append(mass)
            bounds.append(support.dropped_mass_bound)
        return (
            f"{len(answers)} of {len(answers)} codes with {recall.token_budget} tokens kept; dropped mass "
            f"{sum(masses) / len(masses):.2f}, audited, bound {sum(bounds) / len(bounds):.2f}"
        )

    def check_identity(self, recall: RecallAnswers | None) -> str:
        """With a budget that covers the context every token and log probability is that of full attention."""
        self._need(recall, sparse=True)
        assert recall is not None
        if not self._dense:
            raise CheckSkipped("there is nothing to compare with: recall in full attention was not answered")
        # Asked again: the passage now comes from the prefix cache for both, and BLAS rounds a row of a short product
        # otherwise than the same row of a long one.
        dense = self.ask(recall, recall.asked, DENSE)
        covered = self.ask(recall, recall.asked, AttentionMode(token_budget=2 * self.engine.ready.max_context))
        for name, full, seen in zip(recall.asked, dense, covered, strict=True):
            if (full.token_ids, full.logprobs) != (seen.token_ids, seen.logprobs):
                raise CheckFailed(f"the code of {name}: tokens or log probabilities differ from full attention")
        num_tokens = sum(len(answer.token_ids) for answer in covered)
        return f"{num_tokens} tokens and their log probabilities, to the bit"

    def ask(self, recall: RecallAnswers, names: Sequence[str], mode: AttentionMode) -> list[Answer]:
        """Each name's question after the passage; as many tokens as its code and a full stop have."""
        if not self._passage:
            self._passage = hide_codes(self.tokenizer, read_sample_text(None), recall)
        questions = [self.tokenizer.encode(recall.question.format(name=name), add_special_tokens=False)
                     for name in names]  # fmt: skip
        sizes = [len(self.tokenizer.encode(f" {recall.codes[name]}.", add_special_tokens=False)) for name in names]
        prompts = [self._passage + question for question in questions]
        # The first one leaves the passage in the prefix cache for the others.
        first = self.complete(prompts[:1], sizes[:1], mode)
        return first + self.complete(prompts[1:], sizes[1:], mode)

    def complete(
        self, prompts: Sequence[list[int]], sizes: Sequence[int], mode: AttentionMode = DENSE, num_top: int = 0
    ) -> list[Answer]:
        """Greedy continuations of so many tokens, with log probabilities. Raises the error that ends a request."""
        answers = [Answer() for _ in prompts]
        for index, (prompt, size) in enumerate(zip(prompts, sizes, strict=True)):
            sampling = SamplingParams(seed=0, max_tokens=size, temperature=0.0, ignore_eos=True, logprobs=num_top)
            self.engine.submit(Submit(str(index), prompt, sampling, arrival_s=0.0, attention=mode))
        while self.engine.has_work:
            for event in self.engine.step():
                answer = answers[int(event.request_id)]
                answer.token_ids += event.token_ids
                answer.logprobs += event.logprobs or []
                answer.text += event.text
                answer.support = event.support or answer.support
                if event.finish_reason is FinishReason.ERROR:
                    error = ERRORS.get(event.error_code or "", InternalError)
                    raise error(event.error_message or "The engine gave no reason.")
        return answers

    def _need(self, recall: RecallAnswers | None, sparse: bool = False) -> None:
        if recall is None:
            raise CheckSkipped("the model recalled no code when its answers were written")
        if sparse and not self.is_sparse_possible:
            raise CheckSkipped(f"the shape of this model has no sparse attention on {self.engine.ready.device}")

    def _compare_codes(self, recall: RecallAnswers, answers: Sequence[Answer]) -> None:
        wrong = [f"{answer.text.strip()!r} for {name}, not {recall.codes[name]}"
                 for name, answer in zip(recall.asked, answers, strict=True)
                 if recall.codes[name] not in answer.text]  # fmt: skip
        if wrong:
            raise CheckFailed(f"{len(wrong)} of {len(answers)} codes are wrong: {'; '.join(wrong)}")

    def _spell(self, token_ids: list[int]) -> str:
        if not token_ids:
            return "missing"
        return f"{self.tokenizer.decode(token_ids, skip_special_tokens=False)!r} ({token_ids[0]})"
